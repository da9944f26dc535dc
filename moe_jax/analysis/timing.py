"""Timing rivals fairly on a machine that is shared: in turn, in one process, and told with their spread."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int = 9, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` for each function, every repeat calling all of them in turn.

    The first `warmup` rounds (compilation, first touch of memory) are not kept. Each call is waited for.
    """
    seconds = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, greatest) of seconds / baseline, repeat by repeat: what slows a whole repeat cancels."""
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
