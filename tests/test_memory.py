"""Commands keep the memory that a step frees: the next one takes it again, without the system."""

import platform
import subprocess
import sys

import pytest

TAKE = """
import ctypes, resource, threading
from mmdiff import commands

def take():
    block, before = ctypes.c_void_p(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert libc.posix_memalign(ctypes.byref(block), 64, ctypes.c_size_t(1 << 26)) == 0
    ctypes.memset(block, 1, 1 << 26)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

libc = ctypes.CDLL(None)
commands._keep_memory()
for _ in range(2):
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc keeps what it likes")
def test_a_block_that_a_thread_has_freed_is_there_for_the_next_thread():
    done = subprocess.run([sys.executable, "-c", TAKE], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first > 8 and second < 8  # page faults; of 16,384 pages of 4 KiB or 32 of 2 MiB
