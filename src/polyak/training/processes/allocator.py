"""Keep the memory that training frees, instead of handing it back to the system every step."""

from __future__ import annotations

import ctypes
import platform

# mallopt(3): names of <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more on 64-bit systems


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep freed memory for the next step; returns whether it will.

    Every step allocates and frees the same activations. By default glibc returns part of them to
    the system each time and the kernel clears the pages again: page faults that depend on the
    order of allocations, and so differ between rules. Other C libraries are left alone. Called
    by processes that train or time, never on import.

    Source: mallopt(3), Linux man-pages.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept: bool = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) == 1
    return mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1 and kept
