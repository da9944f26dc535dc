"""Expert by layer, expert by expert: load over the steps, choices made together, weights that are alike."""

import numpy as np

from moe_jax.analysis.report import palette
from moe_jax.analysis.report.markup import Html, details, paragraph, table
from moe_jax.analysis.report.pictures import FRAMES, Frame, Gallery, color_bar, heat_map, new_figure, panels
from moe_jax.analysis.report.runs import Run, evenly
from moe_jax.analysis.specialisation_pairs import coactivation, strongest_pairs

STEPS = 60  # logged steps that the slider stops at, besides evaluations
LAYERS = 12  # shown beside each other, evenly spaced; the rest is said to be left out
COLUMNS = 32  # experts of a table
LEAST = 5.0  # tokens expected of a pair that is shown


def load(run: Run, gallery: Gallery) -> list[Html]:
    """Layer x expert, load as a multiple of an equal share, with a slider over the logged steps and evaluations."""
    import matplotlib

    stops = _stops(run)
    if not stops:
        return [paragraph("This run logged no loads of its experts.")]
    share_NLE = np.stack([share for _, share in stops])
    last_LE = share_NLE[-1]
    top = 2.0 if last_LE.max() <= 2 else 4.0
    norm, colors = matplotlib.colors.TwoSlopeNorm(1.0, 0.0, top), matplotlib.colormaps["RdBu_r"]
    L, E = last_LE.shape
    figure = new_figure(
        "Load of each expert as a multiple of an equal share", max(5.0, min(9.4, 0.35 * E + 2.2)), 1.6 + 0.42 * min(L, 20)
    )
    ax = figure.add_subplot()
    image = heat_map(ax, last_LE, colors, norm, name=FRAMES)
    ax.set_yticks(range(L)[:: -(-L // 20)], [str(layer) for layer in run.layers[:: -(-L // 20)]])
    extend = "max" if share_NLE.max() > top else "neither"
    places = [0, 1, top] if L < 3 else [0, 0.5, 1, 1.5, 2] if top == 2 else [0, 0.5, 1, 2, 3, 4]
    color_bar(figure, image, ax, "load / equal share", extend=extend, ticks=places)
    frames = [Frame(colors(norm(share_LE), bytes=True), label, _loaded(run, share_LE)) for label, share_LE in stops]
    return [gallery.show(figure, "load", frames[-1].finding, frames), _load_table(run, stops[-1])]


def together(run: Run, gallery: Gallery) -> list[Html]:
    """Choices made together, as a multiple of what choices without preferences would give; the strongest pairs in words."""
    seen = run.last
    if seen.about.top_k < 2 and seen.row_choice_RSLM.shape[-1] < 2:
        return [paragraph("A token has one expert in this run, so no two experts are chosen together.")]
    pairs = coactivation(seen)
    lift_LEE = np.where(pairs.expected_LEE >= LEAST, pairs.lift_LEE, np.nan)
    finite = lift_LEE[np.isfinite(lift_LEE)]
    if not finite.size:
        return [paragraph("Too few tokens chose two experts for pairs to be compared.")]
    shown = _shown(run)
    figure = _squares(
        run,
        f"Experts chosen together, step {seen.about.step}",
        pairs.lift_LEE,
        "tokens / expected, log scale",
        0.25,
        4.0,
        log=True,
    )
    strongest = strongest_pairs(pairs, 8)
    rows = [
        (
            f"{pair.experts[0]} and {pair.experts[1]}",
            str(run.layers[pair.layer]),
            f"{pair.tokens:,}",
            f"{pair.expected:,.0f}",
            f"{pair.lift:.2f}",
            f"{pair.conditional[0]:.0%} and {pair.conditional[1]:.0%}",
        )
        for pair in strongest
    ]
    words = "No pair is expected in 20 tokens or more, so none is named."
    if strongest:
        first = strongest[0]
        words = (
            f"Experts {first.experts[0]} and {first.experts[1]} of layer {run.layers[first.layer]} are chosen together most,"
            f" against what their loads would give: {first.lift:.2f} times as often. Half of all pairs lie between"
            f" {np.quantile(finite, 0.25):.2f} and {np.quantile(finite, 0.75):.2f} times. Grey: fewer than {LEAST:.0f} tokens"
            " expected."
        )
    header = ("experts", "layer", "tokens that chose both", "expected", "times as often", "of each one's tokens")
    parts = [gallery.show(figure, "chosen-together", words + _left_out(run, shown))]
    return [*parts, table("Pairs chosen together most, against expectation", header, rows)] if rows else parts


def alike(run: Run, gallery: Gallery) -> Html:
    """Cosine of the weights of each two experts."""
    seen = run.last
    E = seen.about.num_experts
    other_LEE = np.where(np.eye(E, dtype=bool), np.nan, seen.similarity_LEE)
    limit = max(float(np.nanmax(np.abs(other_LEE))), 0.01)
    figure = _squares(
        run, f"Likeness of the experts' weights, step {seen.about.step}", other_LEE, "cosine", -limit, limit, log=False
    )
    place = np.unravel_index(np.nanargmax(np.abs(other_LEE)), other_LEE.shape)
    words = (
        f"The weights of two experts have a cosine of {np.nanmean(other_LEE):.3f} on average; the largest in size,"
        f" {other_LEE[place]:.3f}, is that of experts {min(place[1:])} and {max(place[1:])} of layer {run.layers[place[0]]}."
    )
    alike = " Cosines near 0 are those of weights that have nothing to do with each other." if limit < 0.2 else ""
    return gallery.show(figure, "weights-alike", words + alike + _left_out(run, _shown(run)))


def _squares(run, title, value_LEE, label, low, high, *, log):
    """Expert x expert for the layers shown, one colour bar."""
    import matplotlib

    shown = _shown(run)
    norm = matplotlib.colors.LogNorm(low, high) if log else matplotlib.colors.Normalize(low, high)
    figure, axes = panels(title, len(shown), width=3.9 if len(shown) == 1 else 0.0, height=3.2 if len(shown) == 1 else 2.5)
    for ax, layer in zip(axes, shown, strict=True):
        value_EE = value_LEE[layer]
        values = np.maximum(value_EE, low) if log else value_EE
        image = heat_map(ax, np.ma.masked_invalid(values), "PuOr_r", norm, y_label="expert", most=8)
        ax.set_facecolor(palette.NOTHING)
        ax.set_title(f"layer {run.layers[layer]}", loc="left")
    bar = color_bar(figure, image, axes, label, extend="both" if log else "neither")
    if log:
        bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
        bar.minorticks_off()
    return figure


def _shown(run):
    """Places among the MoE layers of those that have a panel."""
    return evenly(range(len(run.layers)), LAYERS)


def _left_out(run, shown):
    return f" {len(shown)} of the {len(run.layers)} MoE layers are shown." if len(shown) < len(run.layers) else ""


def _stops(run):
    """(label, share [L, E]) of the records that the slider stops at, steps ascending."""
    found = []
    for key, kind, order in (("router/load", "training step", 0), ("eval/load", "evaluation", 1)):
        steps_N, load_NLE = run.series(key)
        records = list(zip(steps_N.tolist(), load_NLE, strict=True))
        found += [(step, order, f"{kind}, step {step:,}", load_LE) for step, load_LE in evenly(records, STEPS)]
    found.sort(key=lambda stop: stop[:2])
    return [
        (label[0].upper() + label[1:], load_LE / np.maximum(load_LE.mean(-1, keepdims=True), 1e-9))
        for *_, label, load_LE in found
    ]


def _loaded(run, share_LE):
    """Each layer's most loaded expert, of many layers the most uneven one's."""
    layers = range(len(share_LE)) if len(share_LE) <= 4 else [int(share_LE.max(-1).argmax())]
    told = [
        f"layer {run.layers[layer]}: expert {share_LE[layer].argmax()} has {share_LE[layer].max():.2f} times an equal share,"
        f" expert {share_LE[layer].argmin()} {share_LE[layer].min():.2f} times"
        for layer in layers
    ]
    dead = int((share_LE == 0).sum())
    most = "Of all layers the most uneven is " if len(share_LE) > 4 else ""
    text = most + "; ".join(told)
    idle = f"; {dead} expert{'s' * (dead != 1)} got no token" if dead else "; no expert is without a token"
    return f"{text[0].upper()}{text[1:]}{idle}."


def _load_table(run, stop):
    label, share_LE = stop
    E = share_LE.shape[1]
    kept = range(min(E, COLUMNS))
    rows = [(str(layer), *(f"{share_LE[i, e]:.2f}" for e in kept)) for i, layer in enumerate(run.layers)]
    first = f", the first {COLUMNS} experts" if E > COLUMNS else ""
    caption = f"Load / equal share{first}. {label}"
    return details("The numbers of the last one", table(caption, ("layer", *(f"e{e}" for e in kept)), rows))
