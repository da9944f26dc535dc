"""The inference benchmark as a picture: time against batch, and where the advantage goes."""

import os
from collections.abc import Sequence

import numpy as np

from moe_jax.analysis.bench_inference import Experts, expected_distinct
from moe_jax.analysis.figure import make_figure

_COLORS = {"moe": "#1f4e79", "dense_active": "#1a7f37", "dense_total": "#c0392b"}
_NAMES = {
    "moe": "mixture of experts",
    "dense_active": "dense, equal active parameters",
    "dense_total": "dense, equal total parameters",
}
_GRID = "#dddddd"


def save_inference_plot(rows: Sequence[dict], path: str | os.PathLike) -> None:
    """Writes a PNG, a line of three panels for each MoE: milliseconds of a step of decoding against the batch, with their range; distinct
    experts a layer, measured, on the curve of random choice; and the time of a step in those of the two dense models.

    Args:
      rows: of `bench_inference.rows`.
      path: of the picture.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    decode = [row for row in rows if row["phase"] == "decode"]
    names = list(dict.fromkeys(row["experts"] for row in decode))
    figure = make_figure(11.5, 0.9 + 3.2 * len(names))
    panels = figure.subplots(len(names), 3, squeeze=False)
    for (times, experts, ratios), name in zip(panels, names, strict=True):
        family = {model: [r for r in decode if (r["experts"], r["model"]) == (name, model)] for model in _COLORS}
        number, top_k = map(int, name.split("x"))
        _draw_times(times, family, f"{number} experts, {top_k} a token")
        _draw_experts(experts, family["moe"], Experts(number, top_k, 0))
        _draw_ratios(ratios, family["moe"])
        for axes in (times, experts, ratios):
            batches = [row["batch"] for row in family["moe"]]
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.set_xlabel("batch")
            axes.grid(color=_GRID, linewidth=0.6)
            axes.set_axisbelow(True)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def _draw_times(axes, family, title):
    for model, rows in family.items():
        middle, low, high = (np.array([row[f"milliseconds{end}"] for row in rows]) for end in ("", "_min", "_max"))
        spread = np.stack([middle - low, high - middle])
        batches = [row["batch"] for row in rows]
        axes.errorbar(
            batches,
            middle,
            spread,
            color=_COLORS[model],
            label=_NAMES[model],
            marker="o",
            markersize=4,
            linewidth=1.4,
            capsize=2.5,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("ms, one step of decoding")
    axes.set_title(title, fontsize="medium")


def _draw_experts(axes, rows, moe):
    batches = np.array([row["batch"] for row in rows])
    curve = np.geomspace(batches[0], max(batches[-1], 2), 100)
    axes.plot(curve, expected_distinct(moe, curve), color="#7f8c8d", linewidth=1.2, label="E (1 - (1 - K/E)$^B$)")
    axes.plot(batches, [row["distinct_experts"] for row in rows], "o", color=_COLORS["moe"], markersize=5, label="measured")
    axes.set_ylim(0, 1.08 * moe.experts)
    axes.set_ylabel("experts")
    axes.set_title("distinct experts of a layer and step", fontsize="medium")
    axes.legend(frameon=False, loc="lower right")


def _draw_ratios(axes, rows):
    batches = [row["batch"] for row in rows]
    for rival in ("dense_active", "dense_total"):
        middle, low, high = (np.array([row[f"ratio_to_{rival}{end}"] for row in rows]) for end in ("", "_min", "_max"))
        axes.fill_between(batches, low, high, color=_COLORS[rival], alpha=0.15, linewidth=0)
        axes.plot(batches, middle, color=_COLORS[rival], marker="o", markersize=4, linewidth=1.4)
    axes.axhline(1.0, color="#555555", linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("time of a step, mixture / dense")
    axes.set_title("ratio to each dense model", fontsize="medium")
