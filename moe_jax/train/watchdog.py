"""A thread that notices when a run stands still: a collective that waits for a dead process, a file system that does not answer."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from moe_jax.processes import RUN_AGAIN

LENIENCE = 6  # times the limit of a step that compilation, an evaluation and a checkpoint are given


class Watchdog:
    """Speaks once when nothing has been done for `seconds`, and dumps the stacks of all threads; a context manager.

    It speaks again only after the run went on. The main thread may hang anywhere outside of Python all the while.
    """

    def __init__(
        self,
        seconds: float,
        action: str,
        workdir: str | os.PathLike,
        report: Callable[[int, str, float, float], Any],
        step: int = 0,
        end: Callable[[int], Any] = os._exit,
    ):
        """
        Args:
          seconds: that a step may take; `LENIENCE` times as long for the first.
          action: "off", "warn", or "stop", which ends the process with `RUN_AGAIN`.
          workdir: of `stacks_PROCESS.txt`, to which the stacks are appended; they go to standard error, too.
          report: is given the last finished step, a sentence, and the seconds waited and allowed.
          step: the step from which the run goes on.
          end: ends the process.
        """
        self._seconds, self._action, self._report, self._end = seconds, action, report, end
        self._path = pathlib.Path(workdir) / f"stacks_{jax.process_index()}.txt"
        self._step, self._over, self._spoken_of = step, threading.Event(), None
        self._thread = threading.Thread(target=self._watch, name="moe_jax watchdog", daemon=True)
        self._expect(f"step {step + 1}, which is compiled first,", LENIENCE)

    def beat(self, step: int) -> None:
        """Step `step` is finished."""
        self._step = step
        self._expect(f"step {step + 1}", 1)

    @contextlib.contextmanager
    def patient(self, what: str) -> Iterator[None]:
        """Inside, `what` is done in place of steps."""
        self._expect(what, LENIENCE)
        try:
            yield
        finally:
            self.beat(self._step)

    def check(self, now: float) -> None:
        """Speaks if what is being done has taken too long at the time `now`, of `time.monotonic`."""
        doing = what, since, allowed = self._doing
        if doing is self._spoken_of or now - since < allowed:
            return
        self._spoken_of = doing
        stops = self._action == "stop"
        process = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
        sentence = (
            f"{process}{what} has not finished in {now - since:.1f} seconds, more than guards.stall_seconds allows ({allowed:.1f}):"
            f" {f'the process ends with status {RUN_AGAIN}' if stops else 'the run may hang'}; the stacks of all threads are in"
            f" {self._path}."
        )
        try:
            print(sentence, file=sys.stderr, flush=True)
            self._dump(sentence)
            self._report(self._step, sentence, now - since, allowed)
            sys.stdout.flush()
        finally:  # whatever the files and the pipes say
            if stops:
                self._end(RUN_AGAIN)

    def _expect(self, what, lenience):
        self._doing = (what, time.monotonic(), lenience * self._seconds)

    def _dump(self, sentence):
        """To the file first: standard error may be closed, or a pipe that nobody reads."""
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a standard error without a file descriptor
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)

    def _watch(self):
        while not self._over.wait(min(self._seconds / 10, 5.0)):
            self.check(time.monotonic())

    def __enter__(self) -> "Watchdog":
        self._expect(f"step {self._step + 1}, which is compiled first,", LENIENCE)
        if self._action != "off":
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
