"""Errors that cross process borders, and which of them trying again cannot heal."""

from __future__ import annotations

import pickle
import traceback


def is_final(error: BaseException) -> bool:
    """True for what impactx itself raised: a named cause, which is still there at the next try.

    Everything else (a peer that died, a device that failed) may go away.
    """
    return type(error).__module__.partition(".")[0] == "impactx"


def portable(error: Exception) -> Exception:
    """The error, where it is the same after a journey; else one with its text, and where it came
    from.

    Tracebacks do not travel: an error that no user can read without one takes it along in its text.
    """
    if is_final(error):
        try:
            if str(pickle.loads(pickle.dumps(error))) == str(error):
                return error
        except Exception:  # it does not survive the journey: its text does, below
            pass
    return RuntimeError("".join(traceback.format_exception(error)))
