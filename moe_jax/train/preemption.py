"""Being told to stop: a platform's SIGTERM, one Ctrl-C, or the notice that any process of a run has had.

While steps are taken, a notice waits for the step under way and its checkpoint. At any other time, while programs compile or a
checkpoint is read, there is nothing to save and a SIGTERM ends the process at once; so does a second one at any time. Both exit with
the status that a shell gives a process that a signal ended. What comes within `SAME_NOTICE` seconds of the first is no second one: a
scheduler tells every process of a job, and a launcher among them passes on what it was told.

Several processes must stop after the same step. There JAX's preemption service passes the notice of one on to all and agrees on the
step; it has its own handler of SIGTERM from `jax.distributed.initialize` on, which this module leaves in place.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 128 + signal.SIGTERM  # 143: preempted; the same command goes on where it stopped
SAME_NOTICE = 1.0  # seconds


def hear(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Has `handler` called for these signals, but for those that are ignored (`nohup`), and returns the handlers before it."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in heard}


def hear_no_more(earlier: Mapping[int, Any]) -> None:
    """Puts back the handlers that `hear` returned."""
    for number, handler in earlier.items():
        signal.signal(number, handler)


class PreemptedError(Exception):
    """The run was told to stop and has: nothing is lost. `exit_status` is the program's: `EXIT_STATUS`, or 130 after a Ctrl-C."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


class Notice:
    """Listens for a notice to stop, a context manager; on leaving it the earlier handlers are back.

    Signals are left as they are outside the main thread (Python hears them nowhere else), where they are ignored (`nohup`), and in a
    run of several processes without JAX's preemption service, which could not agree on a step.
    """

    def __init__(self):
        self._signal: int | None = None
        self._held = self._agrees = False
        self._earlier: dict[int, object] = {}

    def hold(self) -> None:
        """From here on a notice waits for `asked`, which is called after every step."""
        self._held = True

    def asked(self, step: int) -> bool:
        """Whether the run is to stop after `step`: the same answer in all processes, which ask after every step."""
        if self._agrees:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def stop(self, step: int, workdir: str, saved: int | None) -> None:
        """Raises PreemptedError, which says that `step` was the last one and which finished checkpoint, `saved`, is in `workdir`."""
        name = signal.Signals(self._signal or signal.SIGTERM).name
        where = f"whose checkpoint is in {workdir}"
        if saved != step:
            where = f"without a checkpoint of it; {'none' if saved is None else f'that of step {saved}'} is in {workdir}"
        raise PreemptedError(
            f"{name}: stopped after step {step}, {where}; run the same command again to go on from there.",
            128 + (self._signal or signal.SIGTERM),
        )

    def release(self, step: int, workdir: str, saved: int | None) -> None:
        """Ends what `hold` began, after the last step. Raises PreemptedError where a notice came too late for `asked`."""
        if self._signal is not None:
            self.stop(step, workdir, saved)
        self._held = False

    def __enter__(self) -> "Notice":
        if threading.current_thread() is not threading.main_thread():
            return self
        service = jax.distributed.is_initialized() and jax.config.jax_enable_preemption_service
        if jax.process_count() > 1 and not service:
            return self
        self._agrees = service
        if not service:
            self._listen()
        self._earlier = hear((signal.SIGINT,) if service else (signal.SIGTERM, signal.SIGINT), self._heard)
        return self

    def __exit__(self, *_) -> None:
        hear_no_more(self._earlier)
        if self._earlier and not self._agrees:
            self._listen_no_more()
        self._earlier = {}

    def _heard(self, number, frame):
        """Runs in the main thread, between two operations of Python: not while it waits for a device or a compiler."""
        if number == signal.SIGINT and (self._signal is not None or not self._held):
            if callable(self._earlier[number]):
                self._earlier[number](number, frame)  # Python's own raises KeyboardInterrupt
            return
        self._signal = number
        if self._agrees:
            os.kill(os.getpid(), signal.SIGTERM)  # tells JAX's service, and so the other processes

    def _listen(self):
        """Python writes the number of each signal it handles into a pipe at once, whatever the main thread waits for."""
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._end_at_once_where_nothing_waits, name="preemption", daemon=True)
        self._listener.start()

    def _listen_no_more(self):
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writing)
        self._listener.join()
        os.close(self._reading)

    def _end_at_once_where_nothing_waits(self):
        first = None
        while byte := os.read(self._reading, 1):
            if byte[0] != signal.SIGTERM:
                continue
            if first is not None and time.monotonic() - first < SAME_NOTICE:
                continue
            if first is not None or not self._held:
                why = "no step was under way" if first is None else "a second one"
                os.write(2, f"SIGTERM: {why}, so the run ends at once; run the same command again to go on.\n".encode())
                os._exit(EXIT_STATUS)
            first = time.monotonic()
