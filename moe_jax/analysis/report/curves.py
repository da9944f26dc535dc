"""What is logged over the steps as curves: losses, the balance of the experts, the router's health, the parts of a step's time."""

from collections.abc import Sequence

import numpy as np

from moe_jax.analysis.report import palette
from moe_jax.analysis.report.markup import Html, paragraph, sentence_list, table
from moe_jax.analysis.report.overview import duration
from moe_jax.analysis.report.pictures import Gallery, panels, thinned, ticks
from moe_jax.analysis.report.runs import Run

MANY = 4  # curves have no room for their names beside them
FEW = 8  # layers that have a curve each; of more, the range and the mean are drawn
HEALTH = {
    "router/dead_experts": ("Experts without a token in the step", "experts"),
    "router/entropy": ("Entropy of the router's probabilities", "share of ln E"),
    "router/margin": ("Margin: chosen score less the next", "score"),
    "router/bias_range": ("Range of the balancing bias", "largest less least"),
    "router/gradient_ratio": ("Gradient of auxiliary losses", "norm / norm of the rest"),
    "router/experts_per_token": ("Experts that a token uses", "experts"),
}

FROM_ZERO = ("router/dead_experts", "router/bias_range", "router/gradient_ratio")


def learning(run: Run, gallery: Gallery) -> list[Html]:
    """Training loss, validation loss, by domain in bits per byte where the text's bytes are known, gradient norm."""
    figure, (losses, domains, norms) = panels("Loss and gradient norm over the steps", 3)
    steps_N, loss_N = run.series("train/loss")
    eval_N, eval_loss_N = run.series("eval/loss")
    draw(losses, steps_N, loss_N, 0, label="training")
    draw(losses, eval_N, eval_loss_N, 1, label="validation", marked=True)
    if len(loss_N):
        first = np.nanmax(loss_N[len(loss_N) // 50 :])
        losses.set_ylim(top=max(first, *eval_loss_N, 0) * 1.03)  # the first few records would flatten all others
    titled(losses, "Loss", "nats per token")
    losses.legend()
    unit, key = ("bits per byte", "bits_per_byte") if run.keys("eval/bits_per_byte") else ("nats per token", "loss")
    ends = {}
    for i, domain in enumerate(run.domains):
        domain_N, value_N = run.series(f"eval/{domain}/{key}")
        if len(value_N):
            draw(domains, domain_N, value_N, i, label=domain, marked=True)
            ends[domain] = value_N[-1]
    titled(domains, "Validation by domain", unit)
    if len(ends) > MANY:
        figure.legend(*domains.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    elif ends:
        domains.legend()
    draw(norms, *run.series("train/gradient_norm"), 0)
    titled(norms, "Norm of the gradient, before clipping", "norm")
    norms.set_ylim(bottom=0)
    return [gallery.show(figure, "learning", _learned(loss_N, eval_loss_N, ends, unit))]


def balance(run: Run, gallery: Gallery) -> list[Html]:
    """MaxVio with its noise floor, of a step, of the steps between records, of evaluations; then the router's other figures."""
    places = {
        "of a step": ("router/max_violation", "router/noise_floor"),
        "of all steps since the last record": ("router/window/max_violation", "router/window/noise_floor"),
        "of an evaluation": ("eval/max_violation", "eval/noise_floor"),
    }
    there = {name: keys for name, keys in places.items() if len(run.series(keys[0])[0])}
    parts = []
    if there:
        figure, axes = panels("MaxVio: largest load / mean load - 1", len(there), sharey=True)
        for ax, (name, (key, floor)) in zip(axes, there.items(), strict=True):
            of_layers(ax, run, key, marked=name == "of an evaluation")
            floor_N, value_N = run.series(floor)
            if len(floor_N):
                floors_N = value_N.reshape(len(value_N), -1).mean(-1)
                ax.plot(*thinned(floor_N, floors_N), "--", color=palette.FLOOR, label="noise floor")
            titled(ax, name[0].upper() + name[1:], "MaxVio, log scale")
        _logarithmic(axes)
        _legend(figure, axes)
        parts.append(gallery.show(figure, "max-violation", _balanced(run, there)))
    health = {key: titles for key, titles in HEALTH.items() if np.isfinite(run.series(key)[1]).any()}
    if not _varies(run, "router/experts_per_token"):
        health.pop("router/experts_per_token", None)
    if health:
        figure, axes = panels("The router while it learns", len(health), columns=2 if len(health) == 4 else 3)
        for ax, (key, (title, unit)) in zip(axes, health.items(), strict=True):
            of_layers(ax, run, key)
            titled(ax, title, unit)
            if key in FROM_ZERO:
                ax.set_ylim(bottom=0)
        if "router/gradient_ratio" in health:
            axes[list(health).index("router/gradient_ratio")].axhline(1.0, linestyle="--", color=palette.FLOOR, linewidth=1)
        _legend(figure, axes)
        parts.append(gallery.show(figure, "router", _healthy(run, health)))
    return parts or [paragraph("This run logged no figures of its routers; it was made by an older version.")]


def times(run: Run, gallery: Gallery) -> list[Html]:
    """Where the time went, if the run logged it, and tokens per second."""
    keys = run.keys("time/")
    figure, axes = panels("Speed and time over the steps", 2 if keys else 1)
    draw(axes[0], *run.series("train/tokens_per_second"), 0)
    titled(axes[0], "Speed of the training steps", "tokens per second")
    axes[0].set_ylim(bottom=0)
    speed_N = run.series("train/tokens_per_second")[1]
    median = f"The median of the records is {np.nanmedian(speed_N):,.0f} tokens per second." if len(speed_N) else ""
    if not keys:
        text = "This run logged no parts of its time (time/... in metrics.jsonl), so that only its speed is shown."
        return [gallery.show(figure, "time", median), paragraph(text)]
    total = {}
    for i, key in enumerate(keys):
        steps_N, seconds_N = run.series(key)
        total[key.removeprefix("time/")] = np.nansum(seconds_N)
        draw(axes[1], steps_N, np.cumsum(np.nan_to_num(seconds_N)), i, label=key.removeprefix("time/"))
    titled(axes[1], "Time spent so far, by part", "seconds")
    axes[1].legend()
    whole, order = max(sum(total.values()), 1e-9), sorted(total, key=lambda name: -total[name])
    rows = [(name, duration(total[name]), f"{total[name] / whole:.1%}") for name in order]
    most = f"{median} Most of the logged time, {total[order[0]] / whole:.0%}, went into {order[0]}."
    return [gallery.show(figure, "time", most), table("Where the logged time went", ("part", "time", "share"), rows)]


def draw(ax, steps_N, value_N, i: int, *, label: str | None = None, marked: bool = False) -> None:
    """A curve in the i-th colour; with `marked` each point has a mark, as the few evaluations of a run do."""
    steps_N, value_N = thinned(steps_N, value_N)
    style = {"marker": palette.mark(i), "markersize": 4} if marked or len(steps_N) == 1 else {}
    ax.plot(steps_N, value_N, palette.dash(i), color=palette.series(i), label=label, **style)


def of_layers(ax, run: Run, key: str, *, marked: bool = False) -> None:
    """A figure of every MoE layer over the steps, a curve each; the range and the mean of more than `FEW` layers."""
    steps_N, value_NL = run.series(key)
    if not len(steps_N):
        return
    value_NL = value_NL.reshape(len(value_NL), -1)
    if value_NL.shape[1] <= FEW:
        for i, (layer, value_N) in enumerate(zip(run.layers, value_NL.T, strict=True)):
            draw(ax, steps_N, value_N, i, label=f"layer {layer}", marked=marked)
        return
    steps_N, value_NL = thinned(steps_N, value_NL)
    color = palette.series(0)
    ax.fill_between(
        steps_N,
        np.nanmin(value_NL, 1),
        np.nanmax(value_NL, 1),
        color=color,
        alpha=0.25,
        linewidth=0,
        label="range of the layers",
    )
    ax.plot(
        steps_N, np.nanmean(value_NL, 1), color=color, label="mean of the layers", marker="o" * marked or None, markersize=4
    )


def layer_axis(ax, run: Run) -> None:
    """The x-axis of bars by MoE layer: their numbers in the model, and room beside a single one."""
    count = len(run.layers)
    ax.set_xlim(-0.6 - 0.5 * (count < 3), count - 0.4 + 0.5 * (count < 3))
    ax.set_xticks(ticks(count), [str(run.layers[i]) for i in ticks(count)])
    ax.grid(axis="x", visible=False)


def titled(ax, title: str, unit: str, x_label: str = "step") -> None:
    """Title and labels of axes."""
    ax.set_title(title, loc="left")
    ax.set_ylabel(unit)
    ax.set_xlabel(x_label)
    if x_label == "step":
        ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)


def _logarithmic(axes):
    """A logarithmic y-axis with plain numbers, for axes that share it: MaxVio and its noise floor lie decades below a collapse."""
    from matplotlib.ticker import LogLocator

    ax = axes[0]
    lowest = min((float(np.nanmin(line.get_ydata())) for each in axes for line in each.lines), default=0.1)
    ax.set_yscale("log", nonpositive="clip")
    ax.set_ylim(bottom=max(lowest, 2e-3) / 1.3)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


def _legend(figure, axes):
    """One for all axes, below them, of the curves of the one that has most."""
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))


def _learned(loss_N, eval_loss_N, ends, unit):
    parts = []
    if len(loss_N):
        parts.append(
            f"The training loss went from {loss_N[0]:.2f} to {loss_N[-1]:.2f} nats per token over {len(loss_N)} records."
        )
    if len(eval_loss_N):
        best = f" (its least was {eval_loss_N.min():.3f})" if eval_loss_N[-1] > eval_loss_N.min() else ""
        parts.append(f"The validation loss ended at {eval_loss_N[-1]:.3f}{best}.")
    if ends:
        parts.append(f"By domain, in {unit}: {sentence_list([f'{name} {value:.3f}' for name, value in ends.items()])}.")
    return " ".join(parts) or "Nothing was logged."


def _balanced(run, there):
    """The last of each kind, beside its floor."""
    told = []
    for name, (key, floor) in there.items():
        last_L, floors = np.atleast_1d(run.series(key)[1][-1]), run.series(floor)[1]
        most = f" (largest {last_L.max():.2f})" if len(last_L) > 1 else ""
        beside = f", noise floor {np.mean(floors[-1]):.2f}" if len(floors) else ""
        told.append(f"{name} {last_L.mean():.2f}{most}{beside}")
    return f"The last MaxVio{', mean over layers' * (len(run.layers) > 1)}: {'; '.join(told)}."


def _healthy(run, health):
    parts = []
    if "router/dead_experts" in health:
        dead_NL = run.series("router/dead_experts")[1]
        ever, last = int((dead_NL > 0).any(-1).sum()), int(dead_NL[-1].sum())
        parts.append(
            "No expert was without a token in any logged step."
            if not ever
            else f"In {ever} of {len(dead_NL)} logged steps some expert had no token; in the last, {last or 'none'}."
        )
    ends = {
        "router/entropy": "the entropy of the router's probabilities went from {:.4f} to {:.4f} of the most possible",
        "router/margin": "the margin of its choices from {:.2g} to {:.2g}",
        "router/bias_range": "the range of the bias from {:.2g} to {:.2g}",
        "router/gradient_ratio": "the gradient of the auxiliary losses from {:.2g} to {:.2g} of the rest",
    }
    told = [text.format(*_first_and_last(run, key)) for key, text in ends.items() if key in health]
    if told:
        parts.append(f"From the first record to the last, mean over layers, {sentence_list(told)}.")
    return " ".join(parts)


def _first_and_last(run, key):
    value_NL = run.series(key)[1]
    return np.nanmean(value_NL[0]), np.nanmean(value_NL[-1])


def _varies(run, key):
    value = run.series(key)[1]
    return bool(value.size) and float(np.ptp(value)) > 1e-3


def overlay(ax, runs: Sequence[Run], key: str, title: str, unit: str, *, marked: bool = False) -> None:
    """One figure of several runs, a curve each; of figures of layers, the mean."""
    for i, run in enumerate(runs):
        steps_N, value_N = run.series(key)
        if len(steps_N):
            draw(ax, steps_N, np.nanmean(value_N.reshape(len(value_N), -1), -1), i, label=run.name, marked=marked)
    titled(ax, title, unit)
