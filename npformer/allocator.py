"""What the C library does with freed memory: worth as much here as any trick of arithmetic."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory for the next array; True where that worked.

    By default glibc takes every large array from the kernel and hands it back when it is freed,
    and each new one pays a page fault for every 4 KiB.  A training step makes and drops the same
    arrays over and over.  The trainer and the benchmarks call this, importing npformer does not;
    on other C libraries it does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, 1 << 30) for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
