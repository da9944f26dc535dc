"""Metrics on disk: one JSON object a step in `metrics.jsonl`, a bounded number of scalars in TensorBoard too."""

import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.train.files import write_atomic

_LOG = logging.getLogger(__name__)


class MetricWriter:
    """Appends a run's metrics, a context manager. In a run of several processes only the first one writes.

    `metrics.jsonl` has lines {"step": 10, "train/loss": 2.5, "moe/load": [[...]]}; numbers that are not finite stand as null.
    Steps increase, so a step stands once, also in a run that was killed and resumed.
    """

    def __init__(self, workdir: str | os.PathLike, tensorboard: bool = True, resume_step: int | None = None):
        """
        Args:
          workdir: the run's folder; made if absent.
          tensorboard: write scalars and lists over layers to `workdir/tensorboard` as well.
          resume_step: the step of the checkpoint the run goes on from: what was logged after it is cut off. None starts anew.
        """
        self._file = self._tensorboard = None
        self._last = -1 if resume_step is None else resume_step
        if jax.process_index() != 0:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        write_atomic(path, "".join(lines_up_to(path, resume_step)))
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            import tensorboardX  # which imports torch where there is one: seconds that other runs do not wait for

            # an event file of its own a start; purge_step hides what earlier ones hold from that step on
            self._tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=self._last + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one step: all of it to `metrics.jsonl`; to TensorBoard finite numbers, and of lists over layers [L] their least, mean and
        largest, so that it gets no more of them for a deeper model.

        Raises:
          ValueError: `step` is not after the last one written (or resumed from), or a metric is named "step".
        """
        if step <= self._last:
            raise ValueError(f"Metrics of step {step} come after those of step {self._last}; write every step once, in order.")
        if "step" in metrics:
            raise ValueError('A metric is named "step", which is the name of the step itself; rename it.')
        self._last = step
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | {name: _finite(value) for name, value in plain.items()}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in plain.items():
                for scalar, number in _scalars(name, value):
                    if math.isfinite(number):  # what is not would be a line of tensorboardX's warnings each
                        self._tensorboard.add_scalar(scalar, number, step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text of a step, for TensorBoard alone."""
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, text, step)

    def sync(self) -> None:
        """Returns when every line written is on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def lines_up_to(path: pathlib.Path, step: int | None) -> list[str]:
    """The whole lines of an earlier start up to `step` (None: no line); a line that a kill cut short is left out."""
    if step is None or not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (json.JSONDecodeError, KeyError, TypeError):
            _LOG.warning("Left out an unreadable line of %s: %.60s", path, line)
            continue
        if keep:
            kept.append(line + "\n")
    return kept


def _scalars(name, value):
    """A number as it is, a list over layers as three; nothing of larger arrays and strings."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, list) and value and not any(isinstance(v, list) for v in value):
        yield from ((f"{name}/min", min(value)), (f"{name}/mean", sum(value) / len(value)), (f"{name}/max", max(value)))


def _plain(value):
    """Python numbers, strings and nested lists from those, NumPy's and JAX's."""
    return value if isinstance(value, str) else np.asarray(value).tolist()


def _finite(value):
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
