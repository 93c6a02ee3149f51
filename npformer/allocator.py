"""What the C library does with freed memory: worth as much here as any trick of arithmetic."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
KEEP = 1 << 30  # bytes: more than any array of a training step
OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX")
KEEP_OLD = 1 << 25  # glibc before 2.35 refuses a larger M_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory for the next array; True where that worked.

    By default glibc takes every large array from the kernel and hands it back when it is freed,
    and each new one pays a page fault for every 4 KiB.  A training step makes and drops the same
    arrays over and over.  The price is that the process never shrinks below its peak.

    Threads share one pool of memory: by default each has one of its own, whose settings are not
    these, and two threads spend a tenth of a step on page faults.

    The trainer and the benchmarks call this; importing npformer does not.  On any other C library
    (musl, macOS, Windows) it does nothing and returns False; so it does where the environment has
    settings of malloc already: somebody has decided.
    """
    decided = any(name in os.environ for name in OF_THE_USER)
    decided = decided or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if decided or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt  # 1 where the value was taken, 0 where not
    taken = mallopt(M_MMAP_THRESHOLD, KEEP) or mallopt(M_MMAP_THRESHOLD, KEEP_OLD)
    return bool(taken and mallopt(M_TRIM_THRESHOLD, KEEP) and mallopt(M_ARENA_MAX, 1))
