"""Layout invariance of the options of the decoder and its experts, all on at once."""

import functools

import numpy as np
import pytest
import tiny
from one_step import assert_same, measure

from moe_jax.config import AttentionConfig, RouterConfig

MODEL = dict(
    activation="swiglu_clamped",
    activation_limit=0.8,
    norm="layer",
    norm_eps=0.3,  # larger than what comes: rounding errors are not blown up
    post_norms=True,
    head_bias=True,
    embedding_scale=2.0,
    residual_scale=0.6,
    logit_scale=0.7,
    logit_softcap=4.0,
    mtp_layers=1,
    mtp_loss_weight=0.5,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, window=3, full_every=2, qkv_bias=True, out_bias=True),
)
MOE = dict(expert_bias=True, num_shared_experts=2, shared_d_ff=6, shared_gate=True)
ROUTERS = {
    "gpt-oss": RouterConfig("mixtral", 2, {"bias": True}),
    "a state": tiny.ROUTERS["deepseek"],
    "rewards": RouterConfig("reinforce", 2, {"entropy_weight": 0.01}),
}
LAYOUTS = {  # each router with another mesh, exchange and dispatch
    "gpt-oss": (
        dict(mesh="fsdp 2 expert 2 tensor 2", accumulation=4, remat="full"),
        dict(dispatch="capacity", capacity_factor=100.0),
    ),
    "a state": (
        dict(mesh="data 2 expert 4", accumulation=4),
        dict(exchange="all_gather", dispatch="einsum", capacity_factor=100.0),
    ),
    "rewards": (
        dict(mesh="expert_outer 2 expert 2 tensor 2"),
        dict(exchange="ragged", exchange_factor=1.0, exchange_overflow="exact"),
    ),
}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, router in ROUTERS.items():
        monkeypatch.setitem(tiny.ROUTERS, name, router)


@functools.cache
def reference(router):
    return measure(tiny.config(router, model=MODEL, **MOE))


@pytest.mark.parametrize("router", LAYOUTS)
def test_the_same_numbers(router):
    layout, moe = LAYOUTS[router]
    assert_same(measure(tiny.config(router, **layout, model=MODEL, **MOE | moe)), reference(router))


def test_the_reference_exercises_every_parameter():
    expected = reference("gpt-oss")
    assert all(np.abs(value).max() > 1e-7 for path, value in expected.items() if path.startswith("['gradient']"))
    for name in ("b_down_ED", "b_gate_EF", "b_router_E", "w_shared_gate_D", "b_V", "w_embed_DD", "ffn_post_norm", "bias_D"):
        assert any(f"'{name}'" in path for path in expected), name
    assert expected["['metric']['router/load']"].shape == (3, 8)
    assert expected["['metric']['loss/mtp']"] > 1
