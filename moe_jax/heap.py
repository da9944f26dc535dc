"""How a program of ours treats the memory it frees."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Lets glibc keep what it frees instead of giving it back to the kernel; elsewhere nothing happens.

    On the CPU every train step allocates its temporaries anew, in one piece. Returned to the kernel, which gives out zeroed pages, they
    cost the quickstart 200,000 page faults and about a third of its time per step. So no allocation has a mapping of its own, however
    large, and the heap is never trimmed. For programs, before they allocate much; a library must not do this to its caller.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        arena_max, mmap_max, top_pad, trim_threshold = -8, -4, -2, -1  # malloc.h
        for option, value in ((arena_max, 1), (mmap_max, 0), (top_pad, 2**28), (trim_threshold, -1)):
            mallopt(option, value)
