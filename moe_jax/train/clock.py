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
        self._totals = dict.fromkeys(PARTS, 0.0)
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
            seconds = time.perf_counter() - start
            self._seconds[name] += seconds
            self._totals[name] += seconds

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

    def breakdown(self, steps: int) -> str:
        """One line: seconds of the `steps` steps so far, by part, and a step's own time."""
        total = sum(self._totals.values())
        parts = ", ".join(
            f"{name} {seconds:.1f} s ({seconds / max(total, 1e-9):.0%})" for name, seconds in self._totals.items()
        )
        return (
            f"time    {total:.1f} s for {steps} steps: {parts}; a step {1e3 * self._totals['step'] / max(steps - 1, 1):.1f} ms"
        )
