"""Assignments that no expert answered: by cause over the steps, by place in the row."""

import numpy as np

from moe_jax.analysis.report import palette
from moe_jax.analysis.report.curves import draw, titled
from moe_jax.analysis.report.markup import Html, paragraph, sentence_list
from moe_jax.analysis.report.pictures import Gallery, panels
from moe_jax.analysis.report.runs import Run
from moe_jax.train.observation import CAUSES

WORDS = {"capacity": "at a full expert", "sender": "at a full sender", "receiver": "at a full receiver"}
UNIT = "% of the assignments"


def drops(run: Run, gallery: Gallery) -> list[Html]:
    """A picture where something was dropped, and a sentence that says whether it was, and whether it could be."""
    if not run.config.model.moe.may_drop:
        return [paragraph(_cannot(run.config.model.moe))]
    made_N = _of_steps(run, "router/load")
    lost = {cause: _of_steps(run, f"router/dropped_{cause}") for cause in CAUSES}
    lost = {cause: lost_N for cause, lost_N in lost.items() if lost_N.sum() > 0 and len(lost_N) == len(made_N)}
    evaluated = run.last is not None and bool(run.last.dropped_CL.any())
    words = paragraph(" ".join([_how(run.config.model.moe), _in_training(lost, made_N), *_in_evaluation(run)]))
    if not lost and not evaluated:
        return [words]
    figure, axes = panels("Assignments that no expert answered", bool(lost) + evaluated)
    if lost:
        steps_N = run.series("router/load")[0]
        for i, cause in enumerate(CAUSES):
            if cause in lost:
                draw(axes[0], steps_N, 100 * lost[cause] / np.maximum(made_N, 1), i, label=WORDS[cause])
        titled(axes[0], "Training steps, by cause", UNIT)
        axes[0].legend()
        axes[0].set_ylim(bottom=0)
    if evaluated:
        _by_place(axes[-1], run)
    return [
        words,
        gallery.show(figure, "drops", _in_training(lost, made_N) + "".join(f" {text}" for text in _in_evaluation(run))),
    ]


def _of_steps(run, key):
    """Summed over layers and experts, [N]."""
    value = run.series(key)[1]
    return value.reshape(len(value), -1).sum(-1) if len(value) else np.zeros(0)


def _by_place(ax, run):
    seen = run.last
    share_P = seen.place_dropped_PL.sum(1) / np.maximum(seen.place_assigned_PL.sum(1), 1)
    width_P = np.diff([*seen.place_P, max(run.config.data.seq_len, int(seen.place_P[-1]) + 1)])
    ax.bar(seen.place_P, 100 * share_P, width_P * 0.9, align="edge", color=palette.series(0))
    titled(ax, f"Evaluation of step {seen.about.step:,}, by place", UNIT, "place of the token in its row")
    ax.set_ylim(bottom=0)


def _in_training(lost, made_N):
    total = sum(lost_N.sum() for lost_N in lost.values())
    if not total:
        return f"Nothing was dropped in the {len(made_N)} logged steps."
    causes = [f"{lost_N.sum() / total:.0%} {WORDS[cause]}" for cause, lost_N in lost.items()]
    share_N = sum(lost.values()) / np.maximum(made_N, 1)
    return (
        f"{total / made_N.sum():.2%} of the assignments of the logged steps were dropped ({sentence_list(causes)}),"
        f" {share_N[-1]:.2%} in the last of them."
    )


def _in_evaluation(run):
    seen = run.last
    if seen is None:
        return []
    if not seen.dropped_CL.sum():
        return ["Nothing was dropped in the last evaluation."]
    share_P = seen.place_dropped_PL.sum(1) / np.maximum(seen.place_assigned_PL.sum(1), 1)
    whole = seen.dropped_CL.sum() / max(seen.load_LE.sum(), 1)
    return [f"The last evaluation lost {whole:.2%}; the first places of a row {share_P[0]:.2%}, the last {share_P[-1]:.2%}."]


def _how(moe):
    ways = []
    if moe.dispatch == "capacity":
        ways.append(f"an expert has room for {moe.capacity_factor:g} times an equal share (capacity dispatch)")
    if moe.exchange_factor > 0 and moe.exchange_overflow == "drop":
        ways.append(f"the exchange between devices has room for {moe.exchange_factor:g} times the balanced number of rows")
    return f"This model can drop: {' and '.join(ways)}."


def _cannot(moe):
    if moe.exchange_factor > 0:
        return f"This model drops nothing: dispatch {moe.dispatch}, and what is too much for the exchange is gathered in full."
    return f"This model drops nothing: dispatch {moe.dispatch}, and the exchange has room for the worst case."
