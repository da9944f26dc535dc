"""A program that runs others, one after the other: a notice to stop goes on to the one under way, which saves its step and ends."""

import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.train.preemption import PreemptedError, hear, hear_no_more

# What is heard, and what the program under way is told: a terminal that closes is no reason to lose a step.
PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGHUP: signal.SIGTERM}


class PassingOn:
    """Runs programs and listens for signals, a context manager of the main thread; on leaving it the earlier handlers are back.

    Signals that are ignored (`nohup`) stay so. Each program is in a process group of its own, so that a Ctrl-C comes once, from here.
    """

    def __init__(self):
        self._told: int | None = None  # the first signal
        self._running = False
        self._process: subprocess.Popen | None = None
        self._earlier: dict[int, Any] = {}

    def run(self, name: str, command: Sequence[str], last_words: Callable[[], str], **where: Any) -> int:
        """Runs a program to its end and returns its status, a signal as a shell has it.

        Args:
          name: of the program, for people.
          command: its words.
          last_words: gives the last line that it wrote, once it has ended.
          where: of `subprocess.Popen`: stdout, stderr, env.

        Raises:
          PreemptedError: a notice came while it ran. It was passed on, and the program has ended.
        """
        self._running = True
        try:
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, **where) as self._process:
                if self._told:  # while it was being started
                    self._process.send_signal(PASSED_ON[self._told])
                status = self._process.wait()
        finally:
            self._running, self._process = False, None
        status = status if status >= 0 else 128 - status
        if self._told:
            self._stop(f"passed on to {name}, which ended with status {status} and said last: {last_words()}")
        return status

    def _heard(self, number, frame):
        """Runs in the main thread, between two operations of Python, and while it waits for a program."""
        self._told = self._told or number
        if not self._running:
            self._stop("stopped between two runs")
        if self._process is not None:
            self._process.send_signal(PASSED_ON[number])

    def _stop(self, what):
        name = signal.Signals(self._told).name
        raise PreemptedError(f"{name}: {what.rstrip('.')}. Run the same command again to go on.", 128 + self._told)

    def __enter__(self) -> "PassingOn":
        self._earlier = hear(PASSED_ON, self._heard)
        return self

    def __exit__(self, *_) -> None:
        hear_no_more(self._earlier)
