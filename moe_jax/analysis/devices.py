"""What a measurement runs on: how many devices, and what becomes of memory that they free."""

import ctypes
import os
import sys

import jax
import numpy as np
from jax.extend.backend import clear_backends

from moe_jax.mesh import emulate_devices


def start_with(count: int) -> None:
    """Starts JAX's CPU backend anew where it does not have `count` devices; arrays of before are gone.

    What runs on one device is to be measured with one: with more, XLA:CPU has as many threads for its products, however few cores the
    machine has, and one large product alone can take several times longer.
    """
    jax.config.update("jax_platforms", "cpu")
    if jax.device_count() != count:
        jax.clear_caches()
        clear_backends()
        emulate_devices(count)


def keep_freed_memory(ready: int) -> None:
    """Has glibc's allocator keep what is freed for what is asked for next; elsewhere it does nothing. Before JAX's backend starts.

    Large arrays are otherwise given back to the system and asked for anew in every step. The kernel clears each page of them again, and a
    virtual machine may fetch it from its host: seconds a step that are neither computation nor memory traffic, and that differ from
    one machine and one minute to the next.

    Args:
      ready: bytes to have at hand from the start; at most half of what the system has left is taken.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1  # malloc.h
    library.mallopt(m_arena_max, 1)
    library.mallopt(m_mmap_max, 0)
    library.mallopt(m_trim_threshold, -1)
    left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    np.ones(min(ready, left // 2), np.uint8)  # touched, freed, kept
