"""What guards find and say, and `events.jsonl`, where it stands: one JSON object an event."""

import json
import math
import os
import pathlib
import threading
from dataclasses import dataclass

import jax

from moe_jax.train.files import write_atomic
from moe_jax.train.writers import lines_up_to
from moe_jax.validation import RefusalError


class TrainingError(RefusalError):
    """A guard ended the run; the message names the step, the figure, the last good checkpoint and what to do."""


@dataclass(frozen=True)
class Finding:
    """What a guard found in a step.

    Attributes:
      guard: its name.
      value, threshold: the figure, and what it was held against.
      what, remedy: the two parts of a sentence: what is the matter, and what to do.
    """

    guard: str
    value: float
    threshold: float
    what: str
    remedy: str


@dataclass(frozen=True)
class Event:
    """A finding of a step that is to be spoken of, and whether to "warn" or to "stop"."""

    step: int
    action: str
    finding: Finding

    def sentence(self, state_of_run: str = "") -> str:
        """The one sentence; `state_of_run` stands between what is the matter and what to do."""
        return f"step {self.step}: {'; '.join(filter(None, (self.finding.what, state_of_run, self.finding.remedy)))}."


class EventLog:
    """Appends events, from any thread. In a run of several processes only the first one writes; without an event there is no file."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
        """
        Args:
          workdir: the run's folder.
          resume_step: the step of the checkpoint the run goes on from: events after it are cut off, as those steps come again.
        """
        self._path, self._lock = pathlib.Path(workdir) / "events.jsonl", threading.Lock()
        self._writes = jax.process_index() == 0
        if self._writes and self._path.exists():
            kept = "".join(lines_up_to(self._path, resume_step))
            write_atomic(self._path, kept) if kept else self._path.unlink()

    def write(self, step: int, guard: str, action: str, sentence: str, value: float, threshold: float) -> None:
        """One line; what is not finite stands as null."""
        if not self._writes:
            return
        figures = {name: x if math.isfinite(x) else None for name, x in (("value", value), ("threshold", threshold))}
        event = {"step": step, "guard": guard, "action": action, "sentence": sentence} | figures
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
