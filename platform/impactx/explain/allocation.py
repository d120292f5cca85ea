"""The memory that a process of maps keeps instead of giving it back after each forward."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
MAPPED_FROM = 32 << 20  # bytes; glibc's largest value, where its own moving threshold ends up
KEPT = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Let glibc keep up to 1 GiB that was freed at the end of its heap, in this whole process.

    A forward on a CPU frees and takes the same blocks of some megabytes again and again. By default
    glibc gives them back and has them mapped afresh, and the system fills them with zeros, page by
    page: a fifth of a MobileNet's time, in some processes and not in others, since the sizes for
    which it does so move while a process runs (docs/LOG.md). Elsewhere than on Linux with glibc
    nothing happens.

    Returns:
        Whether glibc does.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)) and bool(
        mallopt(M_TRIM_THRESHOLD, KEPT))
