"""Counts by arithmetic against the arrays of a model, feature by feature; FLOPs and caches against sums by hand."""

import dataclasses

import jax
import pytest

from moe_jax.analysis.describe import abstract_params, parts_of
from moe_jax.config import AttentionConfig, Config, MeshConfig, ModelConfig, MoEConfig, RouterConfig
from moe_jax.layers import mlp
from moe_jax.mesh import abstract_mesh
from moe_jax.routing import make_router
from moe_jax.sizes import GATED, CacheSize, cache_size, flops_per_token, num_params

GQA = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
LATENT = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4, kv_rank=6, rope_head_dim=2)
MOE = MoEConfig(num_experts=4, d_ff=8, num_shared_experts=0, router=RouterConfig("mixtral", 2))
DENSE = MoEConfig(num_experts=0)
TINY = ModelConfig(vocab_size=64, d_model=16, num_layers=3, d_ff=24, attention=GQA, moe=MOE)


def tiny(attention=None, moe=None, **model) -> ModelConfig:
    """TINY with other fields, those of its groups as dicts."""
    groups = {"attention": dataclasses.replace(GQA, **(attention or {})), "moe": dataclasses.replace(MOE, **(moe or {}))}
    return dataclasses.replace(TINY, **groups, **model)


MODELS = {
    "experts": tiny(),
    "a dense layer first, shared experts": tiny(moe={"first_dense": 1, "num_shared_experts": 2}),
    "dense": dataclasses.replace(TINY, moe=DENSE),
    "every other layer, gelu, tied": tiny(moe={"every": 2}, num_layers=4, activation="gelu", tied_embeddings=True),
    "relu": tiny(activation="relu"),
    "geglu": tiny(activation="geglu"),
    "expert biases": tiny(moe={"expert_bias": True}),
    "expert biases without a gate": tiny(moe={"expert_bias": True}, activation="gelu"),
    "clamped": tiny(activation="swiglu_clamped"),
    "shared width and gate": tiny(moe={"num_shared_experts": 2, "shared_d_ff": 5, "shared_gate": True}),
    "router bias": tiny(moe={"router": RouterConfig("mixtral", 2, {"bias": True})}),
    "balancing bias": tiny(moe={"router": RouterConfig("deepseek", 2), "first_dense": 1}),
    "null experts": tiny(moe={"router": RouterConfig("zero_experts", 2)}),
    "router with a baseline": tiny(moe={"router": RouterConfig("reinforce", 1)}),
    "no router weights": tiny(moe={"router": RouterConfig("hash", 2)}),
    "biases of attention": tiny({"qkv_bias": True, "out_bias": True}),
    "sinks": tiny({"sinks": True}),
    "norm per head": tiny({"qk_norm": "head"}),
    "norm over heads": tiny({"qk_norm": "full"}),
    "latent": dataclasses.replace(TINY, attention=LATENT),
    "latent, queries and values too": dataclasses.replace(TINY, attention=dataclasses.replace(LATENT, q_rank=5, v_head_dim=3)),
    "LayerNorm": tiny(norm="layer"),
    "LayerNorm without bias": tiny(norm="layer_no_bias", post_norms=True),
    "norms after": tiny(norm="layer", post_norms=True),
    "head bias": tiny(head_bias=True),
    "tied with a head bias": tiny(head_bias=True, tied_embeddings=True),
    "one token more": tiny(moe={"first_dense": 1, "num_shared_experts": 1}, mtp_layers=1),
    "one token more, dense": dataclasses.replace(TINY, moe=DENSE, mtp_layers=1),
    "one token more, of everything": tiny(
        {"qkv_bias": True, "qk_norm": "head"},
        {"router": RouterConfig("mixtral", 2, {"bias": True}), "expert_bias": True},
        norm="layer",
        post_norms=True,
        head_bias=True,
        mtp_layers=1,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_part_equals_the_arrays(name):
    config = Config(model=MODELS[name], mesh=MeshConfig(data=1))
    parts = parts_of(abstract_params(config, abstract_mesh(config, 1)))
    count = num_params(config.model)
    assert {part: getattr(count, part) for part in parts} == parts
    assert count.total == sum(parts.values()) - parts["mtp"]
    assert (count.mtp > 0) == (config.model.mtp_layers > 0)


def test_the_gated_activations_are_those_of_the_layers():
    assert set(GATED) == set(mlp.GATED)


def test_active_parameters():
    """Of 4 experts 2: half the experts are idle. A tied table is the head, which every token uses."""
    count = num_params(tiny(moe={"first_dense": 1}))
    assert count.experts == 2 * 4 * 3 * 16 * 8
    assert count.active == count.total - count.experts // 2
    assert count.active_without_embedding == count.active - 64 * 16
    tied = num_params(tiny(moe={"first_dense": 1}, tied_embeddings=True, head_bias=True))
    assert tied.active == tied.active_without_embedding == count.active - 64 * 16 + 64


def test_router_state_is_beside_the_parameters():
    model = MODELS["balancing bias"]
    state = jax.eval_shape(make_router(model.moe.router, 4).init_state)
    count = num_params(model)
    assert count.router_state == 2 * sum(array.size for array in state.values()) == 2 * 4
    assert count.total == num_params(tiny(moe={"first_dense": 1})).total


BY_HAND = ModelConfig(
    vocab_size=5,
    d_model=2,
    num_layers=1,
    d_ff=3,
    attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=2),
    moe=DENSE,
)


def by_hand(**attention):
    return dataclasses.replace(BY_HAND, attention=dataclasses.replace(BY_HAND.attention, **attention))


def test_flops_by_hand():
    """D=2, one head of width 2, F=3, V=5, one dense layer, S=3.

    Weights: q, k, v, o 4 * 2*2 = 16, FFN 3 * 2*3 = 18, head 2*5 = 10; twice their sum is 88. A token sees (1 + 2 + 3) / 3 = 2
    tokens on average: scores and values 2 * 2 FLOPs per head channel and token seen, 4 * 2 * 2 = 16.
    """
    assert flops_per_token(BY_HAND, 3) == 88 + 16
    assert flops_per_token(by_hand(window=1), 3) == 88 + 8  # each sees itself only
    assert flops_per_token(by_hand(qkv_bias=True, out_bias=True, sinks=True, qk_norm="head"), 3) == 88 + 16


def test_flops_where_some_layers_have_a_window():
    """Of 4 layers the second and the fourth see 2 tokens on average, the others 1: 2 * 16 + 2 * 8 over the context."""
    model = dataclasses.replace(by_hand(window=1, full_every=2), num_layers=4)
    assert flops_per_token(model, 3) == 2 * (4 * (16 + 18) + 10) + 48


def test_flops_of_latent_attention_by_hand():
    """kv_rank 3, positions 4, values 1 wide, one head: q 2*(2+4) = 12, latent 2*3 and keys' positions 2*4, up 3*(2+1), o 1*2.

    Those are 37 weights where there were 16. A token's score costs 2 * 6, its value 2 * 1, for 2 tokens seen: 28.
    """
    model = by_hand(kv_rank=3, rope_head_dim=4, v_head_dim=1)
    assert flops_per_token(model, 3) == 2 * (37 + 18 + 10) + 28
    assert (
        flops_per_token(by_hand(kv_rank=3, rope_head_dim=4, v_head_dim=1, q_rank=5), 3) == 2 * (25 + 5 * (2 + 6) + 18 + 10) + 28
    )


def test_flops_of_experts():
    """Twice the weights of the 2 chosen experts, of the router, of the shared expert and its gate; no biases."""
    model = tiny(moe={"num_shared_experts": 1, "shared_d_ff": 5, "shared_gate": True, "expert_bias": True})
    dense = tiny(moe={"num_experts": 0, "num_shared_experts": 0})
    a_layer = 2 * 3 * 16 * 8 + 16 * 4 + 3 * 16 * 5 + 16
    assert flops_per_token(model, 7) - flops_per_token(dense, 7) == 2 * 3 * (a_layer - 3 * 16 * 24)


def test_caches():
    """Keys and values of 2 heads of width 4 in 3 layers; a latent of 6 and 2 for positions; windows bound their layers."""
    assert cache_size(TINY) == CacheSize(growth=3 * 2 * 2 * 4, window_growth=0, window=0)
    assert cache_size(dataclasses.replace(TINY, attention=LATENT)) == CacheSize(3 * (6 + 2), 0, 0)
    assert cache_size(tiny({"window": 5})) == CacheSize(0, 48, 5)
    mixed = cache_size(tiny({"window": 5, "full_every": 3}))
    assert mixed == CacheSize(16, 32, 5)
    assert [mixed.values(length) for length in (1, 5, 100)] == [48, 5 * 48, 100 * 16 + 5 * 32]
