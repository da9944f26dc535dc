"""How a program of ours gets its memory on a CPU."""

import ctypes
import os
import sys
from collections.abc import Mapping

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a new process whose glibc asks the kernel for huge pages (2 MB); as it is where there is no glibc.

    On the CPU every train step allocates its temporaries anew, hundreds of megabytes in one piece, which the kernel hands out zeroed,
    page by page: 200,000 small pages a step of the quickstart, a third of its time. What the user says of `hugetlb` stays.
    """
    tunables = environment.get(TUNABLES, "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables:
        return dict(environment)
    return {**environment, TUNABLES: ":".join(filter(None, (tunables, HUGE_PAGES)))}


def start_over_with_huge_pages() -> None:
    """Replaces this process by the same program in the environment of `huge_pages`, where that is another; call it before all else."""
    if (environment := huge_pages(os.environ)) != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def keep_freed_memory() -> None:
    """Lets glibc keep all it frees for this process; elsewhere nothing happens.

    For a process on one device that is timed beside others, whose memory leaves the kernel few huge pages. With several emulated
    devices the pieces that are kept are soon a little too small for the next step's temporaries, and the heap grows to three times
    what is in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        arena_max, mmap_max, top_pad, trim_threshold = -8, -4, -2, -1  # malloc.h
        for option, value in ((arena_max, 1), (mmap_max, 0), (top_pad, 2**28), (trim_threshold, -1)):
            mallopt(option, value)
