"""Evaluation against the model's own logits, summed by hand in NumPy, on one device and on eight."""

import functools
import math

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import build
from moe_jax.train.evaluate import evaluate, make_eval_step

TOKEN_BYTES = (
    np.random.default_rng(3).integers(0, 5, tiny.VOCAB - 3).astype(np.int32)
)  # three ids are padding of the vocabulary


def batches(seed):
    """Packed rows with padding; a third of the targets is not counted, and none that the tokenizer does not have."""
    batch = tiny.batch(seed, rows=8)
    rng = np.random.default_rng(seed + 10)
    batch["loss_weights"] *= rng.random(batch["loss_weights"].shape) < 0.7
    batch["targets"] %= len(TOKEN_BYTES)
    return batch


DOMAINS = {"code": [batches(0), batches(1)], "prose": [batches(2)]}


@functools.cache
def model():
    """Switch with jitter, which evaluation must switch off."""
    config = tiny.config("switch")
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, params, bias = build(config.model, seed=4)
        forward = jax.jit(lambda *inputs: nnx.merge(graphdef, params, bias)(*inputs)[0])
        inputs = ("tokens", "segment_ids", "positions")
        logits = {
            domain: [np.asarray(forward(*(shard_batch(mesh, b)[name] for name in inputs)), np.float64) for b in members]
            for domain, members in DOMAINS.items()
        }
    return logits


def by_hand(domains):
    """Loss, perplexity and bits per byte, token by token."""
    nats, counted, num_bytes = 0.0, 0, 0
    for domain in domains:
        for batch, logits_BSV in zip(DOMAINS[domain], model()[domain], strict=True):
            for row, column in np.argwhere(batch["loss_weights"]):
                logits_V, target = logits_BSV[row, column], batch["targets"][row, column]
                nats -= logits_V[target] - math.log(sum(math.exp(logit) for logit in logits_V))
                counted += 1
                num_bytes += int(TOKEN_BYTES[target])
    return {"loss": nats / counted, "perplexity": math.exp(nats / counted), "bits_per_byte": nats / math.log(2) / num_bytes}


def measured(mesh_name, token_bytes=TOKEN_BYTES, domains=("code", "prose")):
    config = tiny.config("switch", mesh_name)
    mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
    with jax.set_mesh(mesh):
        graphdef, params, bias = build(config.model, seed=4)
        eval_step = make_eval_step(config.model, graphdef, token_bytes)
        return evaluate(eval_step, params, bias, mesh, {domain: DOMAINS[domain] for domain in domains})


@pytest.mark.parametrize("mesh_name", ["one device", "data 2 expert 4"])
def test_figures_are_those_of_the_logits(mesh_name):
    metrics = measured(mesh_name)
    for prefix, domains in (("eval/code/", ["code"]), ("eval/prose/", ["prose"]), ("eval/", ["code", "prose"])):
        for name, value in by_hand(domains).items():
            assert metrics[prefix + name] == pytest.approx(value, rel=1e-5), prefix + name
    assert metrics["eval/code/loss"] != pytest.approx(metrics["eval/prose/loss"], rel=1e-3)
    tokens = {domain: sum(int((b["segment_ids"] > 0).sum()) for b in members) for domain, members in DOMAINS.items()}
    for domain in ("code", "prose"):
        np.testing.assert_array_equal(metrics[f"eval/{domain}/load"].sum(axis=-1), [tokens[domain]] * 2)  # K = 1, two layers
    np.testing.assert_array_equal(metrics["eval/load"], metrics["eval/code/load"] + metrics["eval/prose/load"])


def test_no_bits_per_byte_where_no_target_has_bytes():
    metrics = measured("one device", np.zeros_like(TOKEN_BYTES), ["prose"])
    assert metrics["eval/loss"] == pytest.approx(by_hand(["prose"])["loss"], rel=1e-5)
    assert not any("bits" in name for name in metrics)
