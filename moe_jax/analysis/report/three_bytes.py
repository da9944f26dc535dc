"""What three bytes of text tell of its domain, beside what a token's experts tell: the honest floor of a claim of specialisation."""

from dataclasses import dataclass

import numpy as np

from moe_jax.analysis import trigram
from moe_jax.analysis.report import palette
from moe_jax.analysis.report.curves import layer_axis, titled
from moe_jax.analysis.report.markup import Html
from moe_jax.analysis.report.pictures import Gallery, panels
from moe_jax.analysis.report.runs import Run
from moe_jax.analysis.trigram_experts import ExpertScore, expert_classifier
from moe_jax.validation import RefusalError

TRAIN_BYTES, SCORE_BYTES = 1_000_000, 200_000  # of each domain


@dataclass(frozen=True)
class Floor:
    """What three bytes tell of the domain, and what the experts do, by the same measure; or why that is not known.

    Attributes:
      three_bytes: score of the classifier.
      experts: score of the run's experts.
      missing: a sentence; "" where nothing is missing.
    """

    three_bytes: trigram.TrigramScore | None = None
    experts: ExpertScore | None = None
    missing: str = ""


def byte_floor(run: Run) -> Floor:
    """Trains and scores the classifier of three bytes on the run's own corpus, and the experts on the observation's sample."""
    seen = run.last
    try:
        experts = expert_classifier(seen)
    except RefusalError as refusal:
        return Floor(missing=f"What the experts of a token tell of its domain was not compared with its bytes: {refusal}")
    corpus = run.corpus
    if isinstance(corpus, str):
        return Floor(
            experts=experts, missing=f"What three bytes tell is missing, because the run's text cannot be read here: {corpus}"
        )
    if not np.array_equal(np.argsort(-corpus.validation.counts(), kind="stable")[: len(seen.vocabulary_N)], seen.vocabulary_N):
        return Floor(
            experts=experts,
            missing="What three bytes tell is missing, because the text that the config names is another one by now.",
        )
    wanted = seen.about.domains
    try:
        texts = {
            split_name: {name: list(trigram.texts_of(split, corpus.tokenizer, name, size)) for name in wanted}
            for split_name, split, size in (("train", corpus.train, TRAIN_BYTES), ("score", corpus.validation, SCORE_BYTES))
        }
        return Floor(trigram.train(texts["train"]).score(texts["score"]), experts)
    except RefusalError as refusal:
        return Floor(experts=experts, missing=f"What three bytes tell is missing: {refusal}")


def classifiers(run: Run, floor: Floor, gallery: Gallery) -> Html:
    """All experts of a token against its last three bytes, as classifiers of its domain."""
    experts, three = floor.experts, floor.three_bytes
    figure, axes = panels("Telling the domain of a token: its experts against three bytes", 2)
    place_L = np.arange(len(run.layers))
    sides = (
        (
            experts.information_L,
            experts.information_bits,
            three and three.information_bits,
            "Information",
            "bits of the domain",
        ),
        (100 * experts.accuracy_L, 100 * experts.accuracy, three and 100 * three.accuracy, "Accuracy", "% of the tokens"),
    )
    for ax, (value_L, together, bytes_, title, unit) in zip(axes, sides, strict=True):
        ax.bar(place_L, value_L, 0.5, color=palette.series(0), label="experts of the layer")
        ax.axhline(together, color=palette.series(2), linestyle="-.", label="experts of all layers")
        if bytes_ is not None:
            ax.axhline(bytes_, color=palette.series(1), label="last three bytes")
        if unit.startswith("%"):
            ax.axhline(100 * experts.majority, color=palette.FLOOR, linestyle="--", linewidth=1, label="knowing nothing")
            ax.set_ylim(0, 100)
        layer_axis(ax, run)
        titled(ax, title, unit, "layer")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    beside = "" if three is None else f", the last three bytes of {three.accuracy:.0%}"
    finding = (
        f"The experts of all layers together name the domain of {experts.accuracy:.0%} of the tokens, those of the best layer"
        f" alone of {experts.accuracy_L.max():.0%}{beside}; guessing gets {experts.majority:.0%}."
    )
    return gallery.show(figure, "three-bytes", finding)
