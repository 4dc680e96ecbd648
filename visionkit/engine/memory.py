"""How the process asks the system for memory."""
from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4                      # malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next allocation instead of handing it back to the system.

    A training step on a CPU allocates and frees the same hundreds of megabytes again and again. By default glibc maps each large block
    anew, and the system clears it page by page.

    Returns:
        whether it was done: only on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):                        # musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
