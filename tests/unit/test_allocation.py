"""What a process of maps keeps of its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource
from impactx.explain.allocation import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(20 << 20) for _ in range(5)]
    for block in blocks:
        ctypes.memset(block, 1, 20 << 20)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began

faults(), faults()
print(faults(), keep_freed_memory(), faults() * 0 + faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's allocator")
def test_blocks_that_were_freed_are_not_mapped_afresh():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    assert int(before) >= 16 and kept == "True" and int(after) < int(before) / 8, done.stdout
