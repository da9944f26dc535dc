"""Validation loss over the steps, of runs and of runs that go on where others ended, their seeds together."""

import glob
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.analysis.ablation import paired_difference
from moe_jax.analysis.figure import make_figure
from moe_jax.config import ConfigError

LOSS = "eval/loss"


@dataclass(frozen=True)
class Curve:
    """The validation loss of one kind of run.

    Attributes:
      steps_N: of training in all, at each evaluation.
      loss_SN: of each seed.
      joins: steps at which another run took over.
    """

    steps_N: np.ndarray
    loss_SN: np.ndarray
    joins: tuple[int, ...]


def read_curve(parts: str) -> Curve:
    """The curve of "A+B+...", each a run folder or a pattern of them, one a seed in the order of their names; B goes on after A.

    Raises:
      ConfigError: no run there, one without an evaluation, or parts or seeds that do not fit each other.
    """
    steps_N, losses, joins, start = [], [], [], 0
    for pattern in parts.split("+"):
        folders = sorted(glob.glob(pattern))
        if not folders:
            raise ConfigError(f"{pattern!r} is no folder of a run; give one, or a pattern of several.")
        runs = [_evaluations(folder) for folder in folders]
        if any(run.keys() != runs[0].keys() for run in runs):
            raise ConfigError(f"{pattern!r}: its runs were evaluated at different steps; compare finished runs of one config.")
        steps_N += [start + step for step in runs[0]]
        losses.append(np.array([list(run.values()) for run in runs]))
        start += max(runs[0])
        joins.append(start)
    if len({len(loss_SN) for loss_SN in losses}) > 1:
        raise ConfigError(
            f"{parts!r} has {' and '.join(str(len(loss_SN)) for loss_SN in losses)} runs; give as many seeds of each."
        )
    return Curve(np.array(steps_N), np.concatenate(losses, axis=1), tuple(joins[:-1]))


def _evaluations(folder):
    """{step: loss} of the run in `folder`."""
    path = pathlib.Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl; give the folder of a run.")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not (found := {record["step"]: record[LOSS] for record in records if LOSS in record}):
        raise ConfigError(f"{path} has no evaluation; give a run that was evaluated (train.eval_every).")
    return found


def loss_table(curves: Mapping[str, Curve]) -> str:
    """Markdown: each curve's last loss, the mean over seeds, and its paired difference to that of the last curve.

    The difference has a 95 % interval (`ablation.paired_difference`) where there are several seeds and as many of both.
    """
    reference = list(curves.values())[-1]
    lines = ["| run | seeds | steps | validation loss | difference | 95 % interval | verdict |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, curve in curves.items():
        last_S = curve.loss_SN[:, -1]
        cells = [name, str(len(last_S)), f"{curve.steps_N[-1]:,}", f"{last_S.mean():.4f}"]
        if curve is reference:
            cells += ["", "", "reference"]
        elif len(last_S) != len(reference.loss_SN):
            cells += ["", "", "other seeds"]
        else:
            difference = paired_difference(last_S - reference.loss_SN[:, -1])
            verdict = ("better" if difference.mean < 0 else "worse") if difference.resolved else "not resolved"
            cells += [f"{difference.mean:+.4f}", f"± {difference.half_width:.4f}", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def save_loss_plot(curves: Mapping[str, Curve], path: str | os.PathLike, *, skip: int = 0) -> None:
    """Writes a PNG: a line for each curve, the mean over its seeds, with the range of the seeds behind it; dots where a run took over.

    Args:
      curves: by the name to show.
      path: of the picture.
      skip: steps at the beginning that are not shown.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    figure = make_figure(7.5, 4.2)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        shown = curve.steps_N > skip
        steps_N, loss_SN = curve.steps_N[shown], curve.loss_SN[:, shown]
        (line,) = axes.plot(steps_N, loss_SN.mean(0), label=name, linewidth=1.4)
        axes.fill_between(steps_N, loss_SN.min(0), loss_SN.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        at = np.isin(steps_N, curve.joins)
        axes.plot(steps_N[at], loss_SN.mean(0)[at], "o", color=line.get_color(), markersize=5)
    axes.set_xlabel("steps in all")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
