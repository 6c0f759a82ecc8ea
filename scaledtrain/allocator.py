"""The host's memory between two steps: kept for the next one, not given back and asked for anew."""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # that glibc takes
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep what tensors on the CPU leave free, as a GPU's allocator does.

    A step of training frees gigabytes of activations, and the next one asks for as many. glibc
    gives what is free at the end of its heap back to the operating system, and takes pages of it
    again, each of which is zeroed first when it is touched: thousands in a step, which can be some
    percent of its time, and differ from run to run with where things happen to lie. After this call
    the process's memory does not shrink before its end; at most, it is what it was.

    It does nothing where the user has chosen otherwise (``MALLOC_...`` or ``GLIBC_TUNABLES`` in the
    environment), and without glibc. Single tensors above 32 MiB are given back as before.

    Returns:
        Whether it is so now.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER)
    )
