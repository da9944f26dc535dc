"""Whether the experts are of token ids: how far an id alone decides, and each expert's favourites."""

import numpy as np

from moe_jax.analysis.report import palette
from moe_jax.analysis.report.curves import layer_axis, titled
from moe_jax.analysis.report.heat_maps import LAYERS
from moe_jax.analysis.report.markup import Html, details, paragraph, table
from moe_jax.analysis.report.pictures import Gallery, panels
from moe_jax.analysis.report.runs import Run, evenly
from moe_jax.analysis.report.text import piece, token_list, visible
from moe_jax.analysis.specialisation_vocabulary import favourites, vocabulary_specialisation
from moe_jax.validation import RefusalError

FAVOURITES = 8  # of an expert
EXPERTS = 64  # of a table


def vocabulary(run: Run, gallery: Gallery) -> list[Html]:
    """By layer what a token's id tells of its experts, and a table of favourites for each layer shown."""
    seen = run.last
    try:
        special = vocabulary_specialisation(seen)
    except RefusalError as refusal:
        return [paragraph(f"No figures of the vocabulary: {refusal}")]
    figure, (shares, bits) = panels(f"What a token's id tells of its experts, step {seen.about.step}", 2)
    place_L = np.arange(len(run.layers))
    shares.bar(place_L, 100 * special.top_share_L, 0.5, color=palette.series(0), label="observed")
    bits.bar(place_L, special.information_L, 0.5, color=palette.series(0), label="observed")
    style = {
        "linestyle": "none",
        "marker": "o",
        "color": palette.series(1),
        "markersize": 5,
        "label": "if the id did not matter",
    }
    shares.plot(place_L, 100 * special.null_top_share_L, **style)
    shares.set_ylim(0, 100)
    bits.plot(place_L, special.null_information_L, **style)
    titled(shares, f"Assignments to an id's {seen.about.top_k} most used experts", "%", "layer")
    titled(bits, "Information of the id about the expert", "bits per assignment", "layer")
    for ax in (shares, bits):
        layer_axis(ax, run)
    handles, labels = shares.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    best = int(np.nan_to_num(special.top_share_L - special.null_top_share_L).argmax())
    finding = (
        f"In layer {run.layers[best]} {special.top_share_L[best]:.0%} of an id's assignments go to its {seen.about.top_k}"
        f" most used experts, where {special.null_top_share_L[best]:.0%} would if the id did not matter. The"
        f" {len(seen.vocabulary_N):,} ids that were counted are {special.coverage:.1%} of all tokens read."
    )
    shown = evenly(range(len(run.layers)), LAYERS)
    tables = [
        details(f"Favourite tokens of the experts of layer {run.layers[layer]}", _favourites(run, layer)) for layer in shown
    ]
    return [gallery.show(figure, "vocabulary", finding), paragraph(_words(run, best)), *tables]


def _words(run, layer):
    """The expert whose favourite is chosen most one-sidedly."""
    found = {e: favourites(run.last, layer, e, 1) for e in range(run.last.about.num_experts)}
    leading = max((e for e in found if found[e]), key=lambda e: found[e][0].lift, default=None)
    if leading is None:
        return "No id was read often enough (20 times) to be called a favourite."
    first = found[leading][0]
    return (
        f"The favourite of the most one-sided expert of layer {run.layers[layer]}, expert {leading}, is the token"
        f" “{visible(piece(run.tokenizer, first.token))}”: {first.share:.0%} of its {first.tokens:,} occurrences chose the"
        f" expert, {first.lift:.1f} times as many as of all tokens. White space is shown as ␣ ⏎ ⇥."
    )


def _favourites(run, layer):
    seen, rows = run.last, []
    for expert in range(min(seen.about.num_experts, EXPERTS)):
        found = [f for f in favourites(seen, layer, expert, FAVOURITES) if f.lift > 1]
        notes = [
            (f.token, f"{f.share:.0%} of {f.tokens:,} occurrences, {f.lift:.1f} times as often as all tokens") for f in found
        ]
        lift = f"{found[0].lift:.1f}" if found else ""
        share = f"{seen.load_LE[layer, expert] / max(seen.tokens_X.sum(), 1):.1%}"
        rows.append(
            (str(expert), share, lift, token_list(run.tokenizer, notes) if found else "no token that is frequent enough")
        )
    header = (
        "expert",
        "of all tokens",
        "lift of the first",
        "tokens it gets more often than other experts do, the strongest first",
    )
    rest = f"; the first {EXPERTS} experts" if seen.about.num_experts > EXPERTS else ""
    return table(f"Favourite tokens, layer {run.layers[layer]}{rest}", header, rows)
