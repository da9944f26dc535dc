"""The whole model: causal, blind across documents, deaf to padding, the same from every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tolerance import assert_close

from moe_jax.config import AttentionConfig
from moe_jax.mesh import EXPERT_AXES, make_mesh, shard_batch
from moe_jax.models.transformer import build, token_ids

VARIANTS = {
    "moe": {},
    "dense": dict(num_experts=0),
    "every other layer": dict(first_dense=1, every=2),
    "window, biases, qk-norm, tied, gelu": dict(
        model=dict(
            activation="gelu",
            tied_embeddings=True,
            attention=AttentionConfig(
                num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="head", window=3, qkv_bias=True, out_bias=True
            ),
        )
    ),
}


@functools.cache
def model_of(variant, mesh="one device"):
    config = tiny.config("mixtral", mesh, **VARIANTS[variant])
    mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
    with jax.set_mesh(mesh):
        graphdef, params, bias = build(config.model, seed=1)

    @jax.jit
    def logits(params, tokens, segment_ids, positions):
        return nnx.merge(graphdef, params, bias)(tokens, segment_ids, positions)[0]

    return mesh, params, logits


def apply(variant, batch, mesh="one device"):
    mesh, params, logits = model_of(variant, mesh)
    with jax.set_mesh(mesh):
        arrays = shard_batch(mesh, batch)
        return np.asarray(logits(params, arrays["tokens"], arrays["segment_ids"], arrays["positions"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_token_or_another_document(variant):
    """By gradient: d logits[t] / d embedding[s] is zero unless s <= t in the same document, and it is not zero at s = t."""
    config = tiny.config("mixtral", **VARIANTS[variant])
    batch = tiny.batch(rows=1)
    batch["segment_ids"][:] = [1, 1, 1, 2, 2, 2, 2, 0]
    batch["positions"][:] = [0, 1, 2, 0, 1, 2, 3, 0]
    batch["tokens"][:] = np.arange(8)  # all different: a row of the table is a position
    with jax.set_mesh(make_mesh(config, jax.devices()[:1])):
        graphdef, params, bias = build(config.model, seed=1)

        @jax.jit
        @jax.grad
        def gradient(table_VD, t):
            """Of a function of the logits at t; columns of the row's own tokens are left out, as a tied head reads the table too."""
            model = nnx.merge(graphdef, params | {"embed": {"table_VD": table_VD}}, bias)
            logits_BSV, _ = model(*(jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions")))
            here_S, others_V = jnp.arange(8) == t, jnp.arange(tiny.VOCAB) >= 8
            return jnp.sum(jnp.sin(logits_BSV) * here_S[:, None] * others_V)

        table_VD = params["embed"]["table_VD"]
        influence = np.stack([np.abs(np.asarray(gradient(table_VD, t)))[:8].max(axis=-1) for t in range(8)])  # [to, from]
    segment = batch["segment_ids"][0]
    window = config.model.attention.window or 8
    layers = config.model.num_layers
    for t in range(7):
        for s in range(8):
            reachable = s <= t and segment[s] == segment[t] and t - s <= layers * (window - 1)
            if not reachable:
                assert influence[t, s] == 0, f"{variant}: position {t} depends on {s}"
        assert influence[t, t] > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_neighbours_change_nothing(variant):
    """A document gives the same logits alone, after another document, and before any amount of padding."""
    rng = np.random.default_rng(0)
    document = rng.integers(0, tiny.VOCAB, 4)

    def row(before, after):
        tokens = np.concatenate([rng.integers(0, tiny.VOCAB, before), document, rng.integers(0, tiny.VOCAB, after)])
        segments = np.repeat([1, 2, 0], [before, 4, after])
        positions = np.concatenate([np.arange(before), np.arange(4), np.zeros(after)])
        arrays = dict(tokens=tokens, segment_ids=segments, positions=positions)
        return {name: array[None].astype(np.int32) for name, array in arrays.items()}

    alone = apply(variant, row(0, 4))[0, :4]
    assert_close(apply(variant, row(4, 0))[0, 4:], alone)
    assert_close(apply(variant, row(2, 2))[0, 2:6], alone)


@pytest.mark.parametrize("mesh", ["data 2 expert 4", "fsdp 2 expert 2 tensor 2"])
def test_initial_parameters_and_logits_are_those_of_one_device(mesh):
    _, expected, _ = model_of("moe")
    _, actual, _ = model_of("moe", mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, expected)
    assert_close(apply("moe", tiny.batch(), mesh), apply("moe", tiny.batch()))


def test_parameters_are_laid_out_as_designed():
    _, params, _ = model_of("moe", "fsdp 2 expert 2 tensor 2")
    moe = params["groups"]["moe"]["moe"]
    assert moe["experts"]["w_up_EDF"].sharding.spec == jax.P(None, EXPERT_AXES, "fsdp", "tensor")
    assert moe["experts"]["w_down_EFD"].addressable_shards[0].data.shape == (2, 4, 4, 8)
    assert params["head"]["w_DV"].sharding.spec == jax.P("fsdp", "tensor")
    assert params["groups"]["moe"]["attention"]["wo_HND"].sharding.spec == jax.P(None, "tensor", None, "fsdp")


def test_stacked_experts_start_alike():
    """The standard deviation is the config's for every expert: the expert axis is no fan."""
    _, params, _ = model_of("moe")
    stacked = np.asarray(params["groups"]["moe"]["moe"]["experts"]["w_up_EDF"])
    np.testing.assert_allclose(stacked.std(axis=(2, 3)), 0.2, rtol=0.35)
    assert len(np.unique(stacked[:, :, 0, 0])) == stacked.shape[0] * stacked.shape[1]


def test_bfloat16_compute_is_near_float32():
    config = tiny.config("mixtral", num_experts=0, model=dict(dtype="bfloat16", init_std=0.05))
    exact = tiny.config("mixtral", num_experts=0, model=dict(init_std=0.05))
    results = []
    for c in (config, exact):
        mesh = make_mesh(c, jax.devices()[:1])
        with jax.set_mesh(mesh):
            graphdef, params, bias = build(c.model, seed=1)
            batch = shard_batch(mesh, tiny.batch())
            model = nnx.merge(graphdef, params, bias)
            results.append(jax.jit(lambda b, model=model: model(b["tokens"], b["segment_ids"], b["positions"])[0])(batch))
        assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert results[0].dtype == jnp.bfloat16
    error = np.asarray(results[0], np.float32) - np.asarray(results[1])
    assert np.sqrt(np.mean(error**2)) < 2e-2 * np.sqrt(np.mean(np.asarray(results[1]) ** 2))


def test_token_ids_are_places_in_the_batch():
    mesh = make_mesh(tiny.config(mesh="data 2 expert 4"))
    with jax.set_mesh(mesh):
        tokens = shard_batch(mesh, tiny.batch())["tokens"]
        ids = jax.jit(token_ids)(tokens)
    np.testing.assert_array_equal(ids, np.arange(tiny.BATCH * tiny.SEQ_LEN).reshape(tiny.BATCH, tiny.SEQ_LEN))
    assert ids.sharding == tokens.sharding


def test_a_model_without_a_vocabulary_is_refused():
    config = tiny.config(model=dict(vocab_size=0))
    with jax.set_mesh(make_mesh(config, jax.devices()[:1])), pytest.raises(ValueError, match=r"model\.vocab_size = 0"):
        build(config.model, seed=0)
