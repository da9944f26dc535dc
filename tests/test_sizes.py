"""Counts by arithmetic against the arrays of a model, and against published figures."""

import dataclasses

import jax
import pytest
from flax import nnx

from moe_jax.config import AttentionConfig, Config, ModelConfig, MoEConfig, RouterConfig
from moe_jax.mesh import make_mesh
from moe_jax.models.transformer import Transformer
from moe_jax.sizes import flops_per_token, num_params

TINY = ModelConfig(
    vocab_size=64, d_model=16, num_layers=3, d_ff=24, attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
)
MODELS = {
    "moe": dataclasses.replace(TINY, moe=MoEConfig(num_experts=4, d_ff=8, first_dense=1, router=RouterConfig("mixtral", 2))),
    "dense": dataclasses.replace(TINY, moe=MoEConfig(num_experts=0)),
    "every other, gelu, tied, biases": dataclasses.replace(
        TINY,
        num_layers=4,
        activation="gelu",
        tied_embeddings=True,
        attention=dataclasses.replace(TINY.attention, qk_norm=True, qkv_bias=True, out_bias=True),
        moe=MoEConfig(num_experts=4, d_ff=8, every=2, num_shared_experts=0, router=RouterConfig("mixtral", 2)),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_count_equals_the_arrays(name):
    with jax.set_mesh(make_mesh(Config(), jax.devices()[:1])):
        model = nnx.eval_shape(lambda: Transformer(MODELS[name], rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert num_params(MODELS[name]).total == sum(p.size for p in params)


def test_mixtral_8x7b_to_the_digit():
    """46,702,792,704 parameters and 12.88 B active (the model's own config.json; embeddings counted)."""
    mixtral = ModelConfig(
        vocab_size=32000,
        d_model=4096,
        num_layers=32,
        d_ff=14336,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
        moe=MoEConfig(num_experts=8, d_ff=14336, num_shared_experts=0, router=RouterConfig("mixtral", 2)),
    )
    count = num_params(mixtral)
    assert count.total == 46_702_792_704
    assert round(count.active / 1e9, 2) == 12.88
    assert round(count.active_without_embedding / 1e9, 2) == 12.75


def test_flops_by_hand():
    """D=2, one head of width 2, F=3, V=5, one dense layer, S=3.

    Weights: q, k, v, o 4 * 2*2 = 16, FFN 3 * 2*3 = 18, head 2*5 = 10; twice their sum is 88. A token sees (1 + 2 + 3) / 3 = 2
    tokens on average: scores and values 2 * 2 FLOPs per head channel and token seen, 4 * 2 * 2 = 16.
    """
    model = ModelConfig(
        vocab_size=5,
        d_model=2,
        num_layers=1,
        d_ff=3,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2),
        moe=MoEConfig(num_experts=0),
    )
    assert flops_per_token(model, 3) == 88 + 16
    windowed = dataclasses.replace(model, attention=dataclasses.replace(model.attention, window=1))
    assert flops_per_token(windowed, 3) == 88 + 8  # each sees itself only
