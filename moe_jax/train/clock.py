"""Where the time of a run goes, seen from the host."""

import contextlib
import time
from collections.abc import Iterator

PARTS = ("data", "compile", "step", "evaluate", "checkpoint")


class Clock:
    """Seconds by part, and tokens per second without what is not training (compilation, evaluation, checkpoints).

    Parts follow one another. Devices work while the host goes on, so that a step's time is where the host waits for it.
    """

    def __init__(self, tokens_per_step: int, step: int):
        self._tokens_per_step = tokens_per_step
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self.restart(step)

    def restart(self, step: int) -> None:
        """From here on speed counts; `step` steps are done."""
        self._step, self._time = step, time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside is of this part of `PARTS`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def tokens_per_second(self, step: int) -> float:
        """Of the steps up to `step` since the last call or restart."""
        seconds, steps = time.perf_counter() - self._time, step - self._step
        self.restart(step)
        return steps * self._tokens_per_step / seconds

    def seconds(self) -> dict[str, float]:
        """`time/PART` since the last call."""
        parts = {f"time/{name}": value for name, value in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return parts
