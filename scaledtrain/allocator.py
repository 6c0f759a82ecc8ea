"""The host's memory between two steps: kept for the next one, not given back and asked for anew."""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # that glibc takes
_NEVER = -1
_CHOSEN_BY = {
    *("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"),
    "MALLOC_TRIM_THRESHOLD_",
}


def keep_freed_memory() -> bool:
    """Let this process keep what tensors on the CPU leave free, as a GPU's allocator does.

    A step of training frees gigabytes of activations, and the next one asks for as many. glibc
    gives what is free at the end of its heap back to the operating system, and takes pages of it
    again, each of which is zeroed first when it is touched: thousands in a step, which can be some
    percent of its time, and differ from run to run with where things happen to lie. After this call
    what the main thread frees stays the process's. That may be more than it would have needed,
    where sizes change from step to step and pieces that are free are too small for the next.

    It does nothing where the user has chosen otherwise (glibc's variables in the environment), and
    where memory is not glibc's matter: on other systems, or with another allocator preloaded.
    Single tensors of 32 MiB or more are given back all the same.

    Returns:
        Whether glibc was told.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if platform.libc_ver()[0] != "glibc" or not _CHOSEN_BY.isdisjoint(os.environ):
        return False
    process, glibc = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
    if _address(process.malloc) != _address(glibc.malloc):
        return False
    return bool(
        glibc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        and glibc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    )


def _address(function: ctypes._NamedFuncPointer) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
