"""The one exception of this package."""

from __future__ import annotations


class DataError(ValueError):
    """A data set cannot be used as it is.

    The message names the file, row or class, says what was expected and what to do. It is meant for
    the person who started the job, without a traceback.
    """
