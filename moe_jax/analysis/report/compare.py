"""Several runs beside each other: what differs in their configs, their curves over each other, their last figures."""

from collections.abc import Sequence

import numpy as np

from moe_jax.analysis.report.curves import overlay
from moe_jax.analysis.report.markup import Html, paragraph, sentence_list, table
from moe_jax.analysis.report.overview import steps_done
from moe_jax.analysis.report.pictures import Gallery, panels
from moe_jax.analysis.report.runs import Run, differing_fields
from moe_jax.sizes import flops_per_token, num_params

CURVES = {
    "train/loss": ("Training loss", "nats per token", False),
    "eval/loss": ("Validation loss", "nats per token", True),
    "router/max_violation": ("MaxVio of a step, mean over layers", "MaxVio", False),
    "router/dead_experts": ("Idle experts, mean over layers", "experts", False),
    "router/entropy": ("Entropy, mean over layers", "share of ln E", False),
    "train/tokens_per_second": ("Speed", "tokens per second", False),
}
LAST = {
    "train/loss": ("training loss", ".4f"),
    "eval/loss": ("validation loss", ".4f"),
    "eval/bits_per_byte": ("bits per byte", ".4f"),
    "router/window/max_violation": ("MaxVio since the record before", ".2f"),
    "eval/max_violation": ("MaxVio of the evaluation", ".2f"),
    "router/dead_experts": ("experts without a token", ".1f"),
    "router/dropped_fraction": ("dropped", ".2%"),
    "train/tokens_per_second": ("tokens per second", ",.0f"),
}


def side_by_side(runs: Sequence[Run], gallery: Gallery) -> list[Html]:
    """What differs, the curves, the last figures."""
    names = [run.name for run in runs]
    differing = differing_fields(runs)
    rows = [(field, *values) for field, values in differing]
    said = table("Config fields that differ", ("field", *names), rows) if rows else paragraph("Their configs do not differ.")
    curves = {key: titles for key, titles in CURVES.items() if any(len(run.series(key)[0]) for run in runs)}
    figure, axes = panels("The runs over each other", len(curves))
    for ax, (key, (title, unit, marked)) in zip(axes, curves.items(), strict=True):
        overlay(ax, runs, key, title, unit, marked=marked)
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return [said, gallery.show(figure, "side-by-side", _best(runs)), _figures(runs, names)]


def _best(runs):
    """Which run ended lowest."""
    ends = {run.name: run.series("eval/loss")[1][-1] for run in runs if len(run.series("eval/loss")[1])}
    if len(ends) < 2:
        return "Fewer than two of the runs were evaluated, so that their losses are not compared."
    order = sorted(ends, key=ends.__getitem__)
    values = sentence_list([f"{name} {ends[name]:.3f}" for name in order])
    seeds = "One run each says nothing of what another seed would do."
    return f"Validation losses at the end, in nats per token, the lowest first: {values}. {seeds}"


def _figures(runs, names):
    rows = [("steps", *(f"{steps_done(run):,}" for run in runs))]
    rows.append(("parameters", *(f"{num_params(run.config.model).total:,}" for run in runs)))
    rows.append(("active for a token", *(f"{num_params(run.config.model).active:,}" for run in runs)))
    rows.append(
        ("FLOPs of a token, forward", *(f"{flops_per_token(run.config.model, run.config.data.seq_len):,}" for run in runs))
    )
    for key, (label, form) in LAST.items():
        values = [run.series(key)[1] for run in runs]
        if any(len(value_N) for value_N in values):
            rows.append((label, *(format(float(np.nanmean(value_N[-1])), form) if len(value_N) else "" for value_N in values)))
    return table("The last figures, means over layers", ("", *names), rows)
