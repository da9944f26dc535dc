"""The experts' weights, and how the choices of a run settle."""

import numpy as np

from moe_jax.analysis.report import palette
from moe_jax.analysis.report.curves import FEW, draw, titled
from moe_jax.analysis.report.heat_maps import LAYERS, alike
from moe_jax.analysis.report.markup import Html, paragraph
from moe_jax.analysis.report.pictures import Gallery, panels
from moe_jax.analysis.report.runs import Run, evenly
from moe_jax.analysis.specialisation_saturation import saturation
from moe_jax.validation import RefusalError


def weights(run: Run, gallery: Gallery) -> list[Html]:
    """Norms, then likeness of each two experts."""
    norm_LE = run.last.expert_norm_LE
    shown = evenly(range(len(run.layers)), LAYERS)
    E = norm_LE.shape[1]
    figure, (ax,) = panels(f"Norms of the experts' weights, step {run.last.about.step}", 1, width=7.5)
    for i, layer in enumerate(shown):
        # sorted, so that layers can be compared and a few outliers show at the ends
        sorted_E = np.sort(norm_LE[layer])[::-1]
        draw(ax, np.arange(1, E + 1), sorted_E, i, label=f"layer {run.layers[layer]}", marked=E <= 32)
    titled(ax, "Experts of a layer from the largest to the smallest", "norm", "rank of the expert")
    ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right center")
    ratio_L = norm_LE.max(1) / np.maximum(norm_LE.min(1), 1e-30)
    worst = int(ratio_L.argmax())
    finding = (
        f"The largest expert of layer {run.layers[worst]} has {ratio_L[worst]:.2f} times the norm of the smallest, more than"
        f" in any other layer; experts {norm_LE[worst].argmax()} and {norm_LE[worst].argmin()}."
        if len(run.layers) > 1
        else f"The largest expert (number {norm_LE[0].argmax()}) has {ratio_L[0]:.2f} times the norm of the smallest (number"
        f" {norm_LE[0].argmin()})."
    )
    parts = [gallery.show(figure, "norms", finding)]
    return [*parts, alike(run, gallery)] if E > 1 else parts


def settled(run: Run, gallery: Gallery) -> list[Html]:
    """Router saturation: choices in common with the last evaluation, and with the one before."""
    if len(run.observed) < 2:
        return [
            paragraph(
                "Saturation compares two evaluations, and this run has one; train on, or with a smaller train.eval_every."
            )
        ]
    try:
        found = saturation(run.observations)
    except RefusalError as refusal:
        return [paragraph(f"No figures of saturation: {refusal}")]
    figure, (last, previous) = panels(
        "Router saturation: experts of a token that it has in another evaluation too", 2, sharey=True
    )
    few = len(run.layers) <= FEW
    for ax, value_NL in ((last, found.last_NL), (previous, found.previous_NL)):
        for i in range(len(run.layers) if few else 1):
            value_N = value_NL[:, i] if few else value_NL.mean(1)
            draw(
                ax,
                found.steps_N,
                100 * value_N,
                i,
                label=f"layer {run.layers[i]}" if few else "mean of the layers",
                marked=True,
            )
        ax.axhline(100 * found.uniform, linestyle="--", color=palette.FLOOR, linewidth=1, label="two unrelated even routers")
        ax.set_ylim(0, 103)
    last.plot(found.steps_N, 100 * found.chance_NL.mean(1), ":", color=palette.FLOOR, label="unrelated, with these loads")
    titled(last, "With the last evaluation", "% of the experts")
    titled(previous, "With the evaluation before", "% of the experts")
    handles, labels = last.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    first, before = found.last_NL[0].mean(), np.nanmean(found.previous_NL[-1])
    finding = (
        f"At step {found.steps_N[0]:,} tokens had {first:.0%} of the experts they have at the end; between the last two"
        f" evaluations {before:.0%} stayed. Two routers that have nothing to do with each other share"
        f" {found.chance_NL[0].mean():.0%} under these loads."
    )
    return [gallery.show(figure, "saturation", finding)]
