"""The decoder's options one by one, each against the formula that `configs/base.py` gives for it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from randomised import randomised
from tolerance import assert_close

from moe_jax.config import AttentionConfig
from moe_jax.layers.block import Block
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import build


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_logits(tied):
    options = dict(tied_embeddings=tied, head_bias=True, embedding_scale=3.0, logit_scale=0.25, logit_softcap=0.5)
    config = tiny.config(num_experts=0, model=dict(num_layers=1, norm="layer", **options))
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, params, _ = build(config.model, seed=1)
        params, batch = randomised(params), shard_batch(mesh, tiny.batch())

        @jax.jit
        def run(params, batch):
            model = nnx.merge(graphdef, params, {})
            inputs = batch["tokens"], batch["segment_ids"], batch["positions"]
            block = jax.tree.map(lambda a: a[0], nnx.state(model.dense))
            block = nnx.merge(nnx.graphdef(Block(config.model, is_moe=False, rngs=nnx.Rngs(0))), block)
            x_BSD, _ = block(3.0 * model.embed(inputs[0]), *inputs[1:])
            return model(*inputs)[0], model.final_norm(x_BSD), params["embed"]["table_VD"]

        logits_BSV, x_BSD, table_VD = jax.device_get(run(params, batch))
    assert ("w_DV" in params["head"]) == (not tied)
    w_DV = table_VD.T if tied else np.asarray(params["head"]["w_DV"])
    raw_BSV = 0.25 * (x_BSD.astype(np.float64) @ w_DV + np.asarray(params["head"]["b_V"]))
    assert np.abs(raw_BSV).max() > 0.5  # the cap bites
    assert_close(logits_BSV, 0.5 * np.tanh(raw_BSV / 0.5))


@pytest.mark.parametrize("is_moe", [False, True])
def test_what_a_block_adds(is_moe):
    model = dict(norm="layer_no_bias", post_norms=True, residual_scale=0.3)
    config = tiny.config(model=model)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        block = Block(config.model, is_moe, rngs=nnx.Rngs(0))
        nnx.update(block, randomised(nnx.to_pure_dict(nnx.state(block, nnx.Param))))
        batch = shard_batch(mesh, tiny.batch())
        x_BSD = shard_batch(mesh, {"x": np.random.default_rng(2).normal(size=(*batch["tokens"].shape, 16)).astype("f4")})["x"]

        @jax.jit
        def run(x_BSD):
            segment_ids_BS, positions_BS = batch["segment_ids"], batch["positions"]
            a_BSD = block.attention(block.attention_norm(x_BSD), segment_ids_BS, positions_BS)
            mid_BSD = x_BSD + 0.3 * block.attention_post_norm(a_BSD)
            h_BSD = block.ffn_norm(mid_BSD)
            y_BSD = block.moe(h_BSD, segment_ids_BS > 0)[0] if is_moe else block.mlp(h_BSD)
            return block(x_BSD, segment_ids_BS, positions_BS)[0], mid_BSD + 0.3 * block.ffn_post_norm(y_BSD)

        actual, expected = jax.device_get(run(x_BSD))
    assert_close(actual, expected)
    norms = [name for name in nnx.to_pure_dict(nnx.state(block)) if name.endswith("norm")]
    assert norms == ["attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"]


def test_the_last_of_every_three_layers_sees_all():
    """Against the same blocks one after the other, each made with the window of its place: 5 layers in stacks of two kinds."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, window=2, full_every=3)
    config = tiny.config(first_dense=1, every=2, model=dict(num_layers=5, attention=attention))
    windows = [2, 2, 0, 2, 2]
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, params, _ = build(config.model, seed=1)
        batch = shard_batch(mesh, tiny.batch(rows=8))
        inputs = batch["tokens"], batch["segment_ids"], batch["positions"]

        @functools.partial(jax.jit, static_argnums=0)
        def layer(kind, block_params, x_BSD):
            is_moe, window = kind
            plain = dataclasses.replace(attention, window=window, full_every=0)
            block = Block(dataclasses.replace(config.model, attention=plain), is_moe, rngs=nnx.Rngs(0))
            return nnx.merge(nnx.graphdef(block), block_params)(x_BSD, *inputs[1:])[0]

        def of(tree, i):
            return jax.tree.map(lambda a: a[i], tree)

        groups = params["groups"]
        blocks = [of(params["dense"], 0)] + [of(groups[name], g) for g in range(2) for name in ("dense_0", "moe")]
        model = nnx.merge(graphdef, params, {})
        x_BSD = model.embed(inputs[0])
        for i, (block_params, window) in enumerate(zip(blocks, windows, strict=True)):
            x_BSD = layer((config.model.is_moe_layer(i), window), block_params, x_BSD)
        expected = model.final_norm(x_BSD)
        actual, _ = jax.jit(lambda params: nnx.merge(graphdef, params, {}).hidden(*inputs))(params)
    assert_close(actual, expected)
