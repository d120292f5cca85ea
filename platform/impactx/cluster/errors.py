"""Errors that cross process borders, and which of them another try cannot heal."""

from __future__ import annotations

import pickle
import traceback


def is_final(error: BaseException) -> bool:
    """Return whether another try would end the same way.

    That is so for what impactx itself raised: it names a cause that is still there. Everything
    else, such as a peer that died or a device that failed, may go away.
    """
    return type(error).__module__.partition(".")[0] == "impactx"


def portable(error: Exception) -> Exception:
    """Return the error itself where it survives a journey, else one with its text and traceback.

    Tracebacks do not travel: an error that no user can read without one takes it along in its text.
    """
    if is_final(error):
        try:
            if str(pickle.loads(pickle.dumps(error))) == str(error):
                return error
        # It does not survive the journey; its text does.
        except Exception:
            pass
    return RuntimeError("".join(traceback.format_exception(error)))
