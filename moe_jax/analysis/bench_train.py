"""Training speed of a config beside the same model with a dense FFN of the active width, in one process and in turn."""

import dataclasses
import statistics
from collections.abc import Callable

import jax

from moe_jax.analysis import timing
from moe_jax.config import Config
from moe_jax.data.corpus import load_corpus
from moe_jax.data.pipeline import train_iterator
from moe_jax.mesh import emulate_devices, make_mesh, shard_batch
from moe_jax.sizes import flops_per_token, num_params, with_vocabulary
from moe_jax.train import run
from moe_jax.train.state import create
from moe_jax.train.step import make_train_step


def dense_twin(config: Config) -> Config:
    """The same model without experts: every layer's FFN has the mean active width, so weights used per token are equal.

    The router's weights, E x D a layer, are the twin's saving.
    """
    model, moe = config.model, config.model.moe
    num_moe = model.num_moe_layers
    width = (model.num_layers - num_moe) * model.d_ff + num_moe * (moe.router.top_k + moe.num_shared_experts) * moe.d_ff
    dense = dataclasses.replace(moe, num_experts=0, num_shared_experts=0, first_dense=0)
    return dataclasses.replace(config, model=dataclasses.replace(model, d_ff=round(width / model.num_layers), moe=dense))


def rows(config: Config, repeats: int) -> list[dict]:
    """Benchmark rows for `config`: whole train steps (forward, backward, AdamW) on real batches, medians with spread."""
    run.check(config)
    emulate_devices(config.mesh.emulate)
    mesh = make_mesh(config)
    corpus = load_corpus(config.data)
    config = with_vocabulary(config, corpus.tokenizer.vocab_size)
    batch = next(train_iterator(corpus.train, config.data, config.train.seed))
    contenders = {"moe": config, "dense": dense_twin(config)}
    with jax.set_mesh(mesh):
        batch = shard_batch(mesh, {name: batch[name] for name in run.BATCH_FIELDS})
        steps = {name: stepper(c, batch) for name, c in contenders.items()}
        times = timing.interleaved(steps, repeats=repeats, warmup=2)
    tokens = config.data.batch_size * config.data.seq_len
    ratio, low, high = timing.ratio(times["dense"], times["moe"])  # of speeds: dense time over MoE time
    results = []
    for name, c in contenders.items():
        seconds, count = statistics.median(times[name]), num_params(c.model)
        results.append(
            {
                "config": name,
                "parameters": count.total,
                "active": count.active,
                "mesh": "x".join(map(str, mesh.devices.shape)),
                "tokens_per_second": tokens / seconds,
                "milliseconds": 1e3 * seconds,
                "milliseconds_min": 1e3 * min(times[name]),
                "milliseconds_max": 1e3 * max(times[name]),
                "gflops_per_second": 3e-9 * flops_per_token(c.model, c.data.seq_len) * tokens / seconds,
                "ratio_to_dense_active": ratio if name == "moe" else 1.0,
                "ratio_min": low if name == "moe" else 1.0,
                "ratio_max": high if name == "moe" else 1.0,
            }
        )
    return results


def stepper(config: Config, batch: dict[str, jax.Array]) -> Callable[[], jax.Array]:
    """A function that takes one more step from a fresh state on the same batch, on the ambient mesh, and returns the loss."""
    graphdef, optimizer, state = create(config)
    step, key = make_train_step(config, graphdef, optimizer), jax.random.key(0)
    held = [state]

    def one_step():
        held[0], metrics = step(held[0], batch, key)
        return metrics["train/loss"]

    return one_step
