"""Where the tokens went over a run: each expert's share, step by step, and the experts that got none."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.analysis.figure import make_figure
from moe_jax.config import ConfigError


def read_loads(workdir: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], loads [N, L, E]) of the logged steps of the run in `workdir`.

    Raises:
      ConfigError: no run there, or one without experts.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{workdir} has no metrics.jsonl; give the folder of a run.")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if "router/load" in record]
    if not records:
        raise ConfigError(f"{path} has no expert loads; give a run of a model with experts.")
    return np.array([record["step"] for record in records]), np.array([record["router/load"] for record in records])


def short_names(workdirs: Sequence[str]) -> list[str]:
    """The paths without the first parts and the last parts that all of them share; one path keeps its last part."""
    parts = [pathlib.PurePath(workdir).parts for workdir in workdirs]
    if len(set(parts)) == 1:
        return [name[-1] for name in parts]
    first, last = _shared(parts), _shared([name[::-1] for name in parts])
    return ["/".join(name[first : len(name) - last] or name) for name in parts]


def _shared(names):
    """How many parts from the front all names have in common."""
    return next((i for i, column in enumerate(zip(*names, strict=False)) if len(set(column)) > 1), min(map(len, names)))


def save_load_plot(runs: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike) -> None:
    """Writes a PNG: above, for each run, the load of every expert over the steps in the layer that ends least balanced, experts
    sorted by their last load, as a multiple of an equal share; below, the experts without a token and MaxVio, all layers.

    Args:
      runs: what `read_loads` returns, by the name to show.
      path: of the picture.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    figure = make_figure(2.2 * max(len(runs), 3) + 1.0, 5.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.0, 1.0))
    axes = upper.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for ax, (name, (steps, load_NLE)) in zip(axes, runs.items(), strict=True):
        share_NLE = load_NLE / np.maximum(load_NLE.mean(-1, keepdims=True), 1e-9)
        layer = int(share_NLE[-1].max(-1).argmax())
        share_NE = share_NLE[:, layer, np.argsort(-share_NLE[-1, layer])]
        edges = (steps[0] - 0.5, steps[-1] + 0.5, share_NE.shape[1] - 0.5, -0.5)
        image = ax.imshow(share_NE.T, aspect="auto", extent=edges, cmap="magma", vmin=0, vmax=4, interpolation="nearest")
        ax.set_title(f"{name}, layer {layer}", fontsize="medium")
        ax.set_xlabel("step")
        ax.set_yticks(range(0, share_NE.shape[1], -(-share_NE.shape[1] // 8)))
    axes[0].set_ylabel("expert, most loaded first")
    upper.colorbar(image, ax=list(axes), label="load / equal share", extend="max")
    dead_axes, violation_axes = lower.subplots(1, 2)
    for name, (steps, load_NLE) in runs.items():
        dead_axes.plot(steps, (load_NLE == 0).sum(-1).mean(-1), label=name, linewidth=1.4)
        violation_N = (load_NLE.max(-1) / np.maximum(load_NLE.mean(-1), 1e-9) - 1).mean(-1)
        violation_axes.plot(steps, violation_N, label=name, linewidth=1.4)
    dead_axes.set_title("experts without a token in the step, mean over layers", fontsize="medium")
    violation_axes.set_title("MaxVio of the step, mean over layers", fontsize="medium")
    violation_axes.set_ylim(bottom=0)
    for ax in (dead_axes, violation_axes):
        ax.set_xlabel("step")
        ax.grid(color="#dddddd", linewidth=0.6)
    lower.legend(handles=dead_axes.get_lines(), loc="outside lower center", ncols=len(runs), frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
