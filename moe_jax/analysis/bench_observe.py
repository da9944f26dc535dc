"""What the observatory costs: steps and evaluations of a config with and without it, in one process and in turn."""

import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable

import jax

from moe_jax.analysis import timing
from moe_jax.analysis.bench_train import stepper
from moe_jax.config import Config, ConfigError
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.data.pipeline import train_iterator
from moe_jax.mesh import emulate_devices, make_mesh, shard_batch
from moe_jax.sizes import with_vocabulary
from moe_jax.train import run
from moe_jax.train.evaluate import evaluate, make_eval_step
from moe_jax.train.expert_weights import expert_weights
from moe_jax.train.observatory import Observer, can_observe, summary
from moe_jax.train.state import create

STEPS = 4  # of a timed call


def rows(config: Config, repeats: int) -> list[dict]:
    """A row for an evaluation and two a contender, its steps and the sum of both: `added_percent` is of a step's time.

    The config stands as it is and, where its router has no auxiliary loss, with a balance loss too, whose gradient is then told apart
    from the rest. An evaluation's cost is spread over `train.eval_every` steps. Ratios are medians over repeats taken in turn, with the
    least and the greatest.

    Raises:
      ConfigError: a model that has nothing to observe.
    """
    if not can_observe(config.model):
        raise ConfigError(
            "the config has no router that chooses, so nothing is observed; give one with experts and another router."
        )
    run.check(config)
    emulate_devices(config.mesh.emulate)
    mesh = make_mesh(config)
    corpus = load_corpus(config.data)
    config = with_vocabulary(config, corpus.tokenizer.vocab_size)
    contenders = {"as configured": config}
    if config.model.moe.balance_loss_weight == 0:
        contenders["with a balance loss"] = _with_balance_loss(config)
    with jax.set_mesh(mesh):
        steps = {name: _steps(contender, corpus, mesh, repeats) for name, contender in contenders.items()}
        first = next(iter(steps.values()))
        sides = {side: _evaluation(_observing(config, side == "with"), corpus, mesh) for side in first}
        seconds = timing.interleaved(sides, repeats, warmup=1)
    spread = config.train.eval_every * statistics.median(first["without"])
    added = [100 * (a - b) / spread for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    results = [evaluation := _row("as configured", "evaluation", seconds, added)]
    for name, of_steps in steps.items():
        percents = [100 * (a / b - 1) for a, b in zip(of_steps["with"], of_steps["without"], strict=True)]
        results.append(step := _row(name, "step", of_steps, percents))
        both = {
            f"added_percent{end}": step[f"added_percent{end}"] + evaluation[f"added_percent{end}"]
            for end in ("", "_min", "_max")
        }
        results.append({"config": name, "part": "both", "milliseconds": None, "milliseconds_without": None} | both)
    return results


def _with_balance_loss(config):
    moe = dataclasses.replace(config.model.moe, balance_loss_weight=0.01)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def _steps(config, corpus, mesh, repeats):
    """Seconds of a step "with" and "without"."""
    batch = next(train_iterator(corpus.train, config.data, config.train.seed))
    batch = shard_batch(mesh, {field: batch[field] for field in run.BATCH_FIELDS})
    sides = {side: _several(stepper(_observing(config, side == "with"), batch)) for side in ("with", "without")}
    seconds = timing.interleaved(sides, repeats, warmup=2)
    return {side: [s / STEPS for s in of_side] for side, of_side in seconds.items()}


def _row(name, part, seconds, percents):
    return {
        "config": name,
        "part": part,
        "milliseconds": 1e3 * statistics.median(seconds["with"]),
        "milliseconds_without": 1e3 * statistics.median(seconds["without"]),
        "added_percent": statistics.median(percents),
        "added_percent_min": min(percents),
        "added_percent_max": max(percents),
    }


def _observing(config, observe):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, observe=observe))


def _several(one_step: Callable[[], jax.Array]) -> Callable[[], jax.Array]:
    return lambda: [one_step() for _ in range(STEPS)][-1]


def _evaluation(config: Config, corpus: Corpus, mesh: jax.sharding.Mesh) -> Callable[[], dict]:
    """A whole evaluation as the loop does it, its file included."""
    graphdef, _, state = create(config)
    observe = config.train.observe
    eval_step = make_eval_step(config.model, graphdef, corpus.tokenizer.token_bytes(), observe=observe)
    batches = run.evaluation_batches(config, corpus, mesh)

    def whole():
        observer = Observer(config, tuple(batches), corpus.validation.counts()) if observe else None
        figures = evaluate(eval_step, state.params, state.router_state, mesh, batches, observer=observer)
        if observer is not None:
            now = observer.finish(0, state.router_state, expert_weights(state.params), corpus.tokenizer.kind)
            with tempfile.TemporaryDirectory() as folder:
                now.save(pathlib.Path(folder) / "observation.npz")
            figures |= summary(now)
        return figures

    return whole
