"""Whether the experts are of domains: shares, information against a permutation null, and what three bytes of text tell already."""

import math

import numpy as np

from moe_jax.analysis.report import palette
from moe_jax.analysis.report.curves import layer_axis, titled
from moe_jax.analysis.report.guide import missing
from moe_jax.analysis.report.heat_maps import LAYERS
from moe_jax.analysis.report.markup import Html, paragraph, sentence_list, table
from moe_jax.analysis.report.pictures import Gallery, color_bar, heat_map, panels, ticks
from moe_jax.analysis.report.runs import Run, evenly
from moe_jax.analysis.report.three_bytes import Floor, byte_floor, classifiers
from moe_jax.analysis.specialisation import QUANTILE, Specialisation, specialisation
from moe_jax.validation import RefusalError

PERMUTATIONS = 500
DOMAINS = 6  # drawn as dots; of more, a heat map


def domains(run: Run, gallery: Gallery) -> list[Html]:
    """Figures and verdict of the last observation."""
    seen = run.last
    if len(seen.about.domains) < 2:
        return [
            paragraph(
                f"The run was evaluated on one domain ({seen.about.domains[0]}), so that experts cannot differ by domain."
            )
        ]
    try:
        special = specialisation(seen, PERMUTATIONS)
    except RefusalError as refusal:
        return [paragraph(f"No figures of specialisation: {refusal}")]
    floor = byte_floor(run)
    words = verdicts(run, special, floor)
    overall = paragraph(_overall(run, special, floor))
    parts = [overall, _shares(run, special, gallery), _information(run, special, gallery)]
    if floor.experts is not None:
        parts.append(classifiers(run, floor, gallery))
    if floor.missing:
        parts.append(missing(floor.missing))
    return [*parts, _verdict_table(run, special, words)]


def verdicts(run: Run, special: Specialisation, floor: Floor) -> list[str]:
    """A sentence for each MoE layer."""
    sentences = []
    for i in range(len(run.layers)):
        if not special.above_null_L[i]:
            sentences.append("no specialisation by domain that can be told from chance")
            continue
        text = "experts differ by domain more than chance allows"
        if floor.three_bytes is not None:
            more = floor.experts.information_L[i] - floor.three_bytes.information_bits
            text += (
                f"; they tell {more:.2f} bits more of it than three bytes do"
                if more > 0
                else "; not shown to know more of it than three bytes tell"
            )
        sentences.append(text)
    return sentences


def _overall(run, special, floor):
    """The verdict of the run, what three bytes tell, and on how many documents it stands."""
    above = [str(layer) for layer, above in zip(run.layers, special.above_null_L, strict=True) if above]
    if not above:
        parts = ["No layer's experts differ by domain more than shuffled documents do: there is no specialisation to report."]
    else:
        best = int(special.excess_L.argmax())
        share = special.excess_L[best] / max(special.domain_entropy_L[best], 1e-12)
        parts = [
            f"{len(above)} of {len(run.layers)} MoE layers are above the null (layer{'s' * (len(above) > 1)}"
            f" {sentence_list(above)}).",
            f"In the strongest, layer {run.layers[best]}, one expert choice tells {share:.1%} of what there is to know of"
            " the domain, beyond what shuffled documents do.",
        ]
    if floor.three_bytes is not None:
        parts.append(_beside_bytes(floor, bool(above)))
    documents = sentence_list([f"{count} of {name}" for name, count in zip(special.domains, special.documents_X, strict=True)])
    parts.append(f"Documents read: {documents}.")
    if (ways := _labellings(special.documents_X)) < 1 / (1 - QUANTILE):
        parts.append(
            f"So few can be dealt out among the domains in only {ways:.0f} ways that nothing could have been above the"
            f" {QUANTILE:.0%} line: evaluate more rows (train.eval_rows)."
        )
    return " ".join(parts)


def _beside_bytes(floor, above):
    experts, three = float(floor.experts.information_L.max()), floor.three_bytes
    bits = f"{three.information_bits:.2f} of {three.entropy_bits:.2f} bits"
    text = f"The last three bytes of the text tell {bits} of the domain, the experts of a token in the best layer {experts:.2f}"
    if experts > three.information_bits:
        return f"{text}: they know more than letters." if above else f"{text}."
    return f"{text}: no sign of more than letters." if above else f"{text}."


def _labellings(documents_X):
    """Ways to deal the documents out among domains of these sizes."""
    return math.exp(math.lgamma(documents_X.sum() + 1) - sum(math.lgamma(count + 1) for count in documents_X))


def _shares(run, special, gallery):
    """Each domain's distribution over experts: dots, and the equal share."""
    shown = evenly(range(len(run.layers)), LAYERS)
    E = special.share_XLE.shape[-1]
    title = f"Share of each domain's assignments that an expert gets, step {run.last.about.step}"
    if len(special.domains) > DOMAINS:
        return _lift_map(run, special, shown, gallery)
    figure, axes = panels(title, len(shown), columns=3 if E <= 32 else 1, sharey=True)
    for ax, layer in zip(axes, shown, strict=True):
        share_XE = 100 * np.nan_to_num(special.share_XLE[:, layer])
        ax.vlines(range(E), share_XE.min(0), share_XE.max(0), color=palette.FLOOR, linewidth=1)
        for x, name in enumerate(special.domains):
            style = {"marker": palette.mark(x), "color": palette.series(x), "markersize": 4 if E <= 64 else 2}
            ax.plot(range(E), share_XE[x], linestyle="none", label=name, **style)
        ax.axhline(100 / E, color=palette.FLOOR, linestyle="--", linewidth=1, label="equal share")
        titled(ax, f"layer {run.layers[layer]}", "% of the assignments", "expert")
        ax.set_xticks(ticks(E, 8 if E <= 32 else 32))
    axes[0].set_ylim(bottom=0)  # of all, which share it
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    return gallery.show(figure, "domains", _furthest(run, special))


def _lift_map(run, special, shown, gallery):
    """Domain x expert, share over the share of all domains, where there are too many domains for dots."""
    import matplotlib

    title = f"Share of a domain's assignments over that of all domains, step {run.last.about.step}"
    figure, axes = panels(title, len(shown), height=1.2 + 0.16 * len(special.domains), columns=2)
    for ax, layer in zip(axes, shown, strict=True):
        norm = matplotlib.colors.TwoSlopeNorm(1.0, 0.0, 2.0)
        image = heat_map(ax, special.lift_XLE[:, layer], "RdBu_r", norm, y_label="", most=8)
        ax.set_yticks(range(len(special.domains)), special.domains)
        ax.set_title(f"layer {run.layers[layer]}", loc="left")
    color_bar(figure, image, axes, "times the share of all", extend="max")
    return gallery.show(figure, "domains", _furthest(run, special))


def _furthest(run, special):
    """The expert whose share of one domain is furthest above its share of all text."""
    load_LE = run.last.load_LE
    overall_LE = load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1)
    more_XLE = np.nan_to_num(special.share_XLE) - overall_LE
    x, layer, e = np.unravel_index(more_XLE.argmax(), more_XLE.shape)
    share, overall = special.share_XLE[x, layer, e], overall_LE[layer, e]
    return (
        f"Expert {e} of layer {run.layers[layer]} leans most to one domain: it gets {share:.1%} of the assignments of"
        f" {special.domains[x]} and {overall:.1%} of all, {share / max(overall, 1e-12):.2f} times as many. An equal share is"
        f" {1 / special.share_XLE.shape[-1]:.1%}."
    )


def _information(run, special, gallery):
    """Information by layer: observed, corrected, the null's mean and 99 % line."""
    figure, (ax,) = panels("What one expert choice tells of the domain, by layer", 1, width=7.5)
    place_L = np.arange(len(run.layers))
    ax.bar(place_L, special.information_L, 0.5, color=palette.series(0), alpha=0.35, label="observed")
    ax.plot(
        place_L,
        special.corrected_L,
        linestyle="none",
        marker="D",
        color=palette.series(0),
        markersize=5,
        label="corrected for few counts",
    )
    ax.plot(
        place_L,
        special.null_mean_L,
        linestyle="none",
        marker="o",
        color=palette.series(1),
        markersize=5,
        label="documents shuffled: mean",
    )
    line = f"documents shuffled: {QUANTILE:.0%} line"
    ax.hlines(special.null_high_L, place_L - 0.35, place_L + 0.35, color=palette.series(1), linewidth=2, label=line)
    layer_axis(ax, run)
    titled(ax, "", "bits per assignment", "layer")
    ax.set_ylim(bottom=min(0, float(special.corrected_L.min()) * 1.1))
    figure.legend(loc="outside right center")
    best = int(special.excess_L.argmax())
    finding = (
        f"The most is in layer {run.layers[best]}: {special.information_L[best]:.3f} bits, where shuffled documents have"
        f" {special.null_mean_L[best]:.3f} on average and {special.null_high_L[best]:.3f} at their {QUANTILE:.0%} line."
        f" {int(special.above_null_L.sum())} of {len(run.layers)} layers are above that line."
    )
    return gallery.show(figure, "information", finding)


def _verdict_table(run, special, words):
    header = ("layer", "information", "corrected", "null mean", f"null {QUANTILE:.0%}", "p", "verdict")
    rows = [
        (
            str(layer),
            *(
                f"{values_L[i]:.4f}"
                for values_L in (special.information_L, special.corrected_L, special.null_mean_L, special.null_high_L)
            ),
            f"{special.p_L[i]:.3f}",
            words[i],
        )
        for i, layer in enumerate(run.layers)
    ]
    return table("Specialisation by domain, bits per assignment", header, rows)
