"""The guards of a run at work: what they find is said, written, and acted upon."""

import contextlib
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.config import Config
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.events import Event, EventLog, Finding, TrainingError
from moe_jax.train.finite import not_finite
from moe_jax.train.guards import FIGURES, Guards, is_finite
from moe_jax.train.state import TrainState
from moe_jax.train.watchdog import Watchdog
from moe_jax.train.writers import MetricWriter


class Guarded:
    """Guards, their events and the watchdog of one run, a context manager.

    Every process looks at the same figures and comes to the same end; only the first one prints and writes.
    """

    def __init__(
        self,
        config: Config,
        guards: Guards,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        say: Callable[[str], None],
        start: int | None,
    ):
        """
        Args:
          config, guards, checkpoints: of the run.
          writer: gets every sentence as a text of TensorBoard's.
          say: prints a sentence, in the first process.
          start: the step of the checkpoint that the run goes on from.
        """
        self._config, self._checkpoints, self._writer, self._say = config, checkpoints, writer, say
        self._guards, self._log = guards, EventLog(config.workdir, start)
        limits = config.guards
        self._watchdog = Watchdog(limits.stall_seconds, limits.stall, config.workdir, self._stalled, start or 0)

    def look(self, step: int, metrics: dict[str, jax.Array]) -> tuple[dict[str, np.ndarray], bool]:
        """Waits for a step and looks at it.

        Returns: the figures that guards look at, on the host, and whether the step was taken rather than skipped.

        Raises:
          TrainingError: a guard whose action is "stop" spoke.
        """
        figures = jax.device_get({name: metrics[name] for name in FIGURES if name in metrics})
        self._watchdog.beat(step)
        for event in self._guards.look(step, figures):
            self._speak(event)
        return figures, is_finite(figures)

    def patient(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Inside, `what` is done in place of steps: it is given longer before it counts as a stall."""
        return self._watchdog.patient(what)

    def may_save(self, step: int, state: TrainState) -> bool:
        """Whether to save `state` after step `step`, which was looked at.

        Not while steps are being skipped: a run that goes on from there would skip on, and newer checkpoints push older ones out.

        Raises:
          TrainingError: it holds numbers that are not finite, or the disk has no room for it and `guards.disk` is "stop".
        """
        self._checkpoints.wait()  # what is still being written takes room
        if bad := not_finite(state):
            names = f"{bad[0]}{f' and {len(bad) - 1} more arrays' if len(bad) > 1 else ''}"
            what = f"{names} of the state to be saved holds numbers that are not finite"
            self._speak(Event(step, "stop", Finding("non_finite", float(len(bad)), 0.0, what, "lower optimizer.learning_rate")))
        if self._guards.skipping and step < self._config.train.steps:
            what, remedy = (
                "no checkpoint is made while steps are being skipped",
                "the next is made when it is due after a finite step",
            )
            self._speak(Event(step, "warn", Finding("non_finite", 1.0, 0.0, what, remedy)))
            return False
        return self._has_room(step, state)

    def _has_room(self, step, state):
        if self._config.guards.disk == "off":
            return True
        needed = self._config.guards.disk_factor * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = _least(free_bytes(self._checkpoints.folder))
        if free >= needed:
            return True
        what = (
            f"{self._checkpoints.folder} has {_megabytes(free)} free and a checkpoint wants {_megabytes(needed)}, so that none is"
            " written"
        )
        remedy = "make room there, lower train.keep_checkpoints, or choose another workdir"
        self._speak(Event(step, self._config.guards.disk, Finding("disk", float(free), needed, what, remedy)))
        return False

    def _speak(self, event):
        """Writes an event and says it, or stops the run."""
        stops, good = event.action == "stop", ""
        if stops:
            latest = self._checkpoints.latest()
            where = "there is none" if latest is None else str(self._checkpoints.folder / str(latest))
            good = f"the run is stopped, last good checkpoint: {where}"
        sentence, found = event.sentence(good), event.finding
        self._log.write(event.step, found.guard, event.action, sentence, found.value, found.threshold)
        self._writer.write_text(event.step, f"guards/{found.guard}", sentence)
        if stops:
            raise TrainingError(sentence)
        self._say(sentence)

    def _stalled(self, step, sentence, value, threshold):
        self._log.write(step, "stall", self._config.guards.stall, sentence, value, threshold)

    def __enter__(self) -> "Guarded":
        self._watchdog.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._watchdog.__exit__(*exception)


def free_bytes(folder: pathlib.Path) -> int:
    """Bytes free for this user on the file system where `folder` is, or will be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _least(number):
    """The least of all processes' numbers, so that all do the same."""
    if jax.process_count() == 1:
        return number
    return int(np.min(multihost_utils.process_allgather(np.array(number, np.float64))))


def _megabytes(number):
    return f"{number / 1e6:,.1f} MB"
