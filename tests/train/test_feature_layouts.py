"""Layout invariance of the options of the decoder and its experts, all on at once, from parameters that are far from 0 and 1.

What begins at 0 (biases) or 1 (norms) could be added twice or never without a trace in `test_layout_invariance.py`.
"""

import functools

import jax
import numpy as np
import pytest
import tiny
from randomised import randomised
from tolerance import assert_close

from moe_jax.config import AttentionConfig, RouterConfig
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import build
from moe_jax.train.step import make_gradient_fn

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
LAYOUTS = {
    "accumulation and remat": ("gpt-oss", dict(mesh="fsdp 2 expert 2 tensor 2", accumulation=4, remat="full"), {}),
    "state, all_gather, einsum": (
        "a state",
        dict(mesh="data 2 expert 4", accumulation=4),
        dict(exchange="all_gather", dispatch="einsum", capacity_factor=100.0),
    ),
    "tensor, capacity": (
        "gpt-oss",
        dict(mesh="expert_outer 2 expert 2 tensor 2"),
        dict(dispatch="capacity", capacity_factor=100.0),
    ),
    "ragged, bounded": (
        "gpt-oss",
        dict(mesh="fsdp 2 expert 2 tensor 2"),
        dict(exchange="ragged", exchange_factor=1.0, exchange_overflow="exact", exchange_chunks=2),
    ),
    "rewards": ("rewards", dict(mesh="fsdp 2 expert 2 tensor 2"), {}),
}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, router in ROUTERS.items():
        monkeypatch.setitem(tiny.ROUTERS, name, router)


def measure(router, layout, moe):
    """Gradients, next router state and metrics of one step, as NumPy arrays by path."""
    config = tiny.config(router, **layout, model=MODEL, **MOE | moe)
    mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
    with jax.set_mesh(mesh):
        graphdef, params, state = build(config.model, seed=3)
        state = jax.tree.map(lambda b: b + 0.02 * (jax.numpy.arange(b.shape[-1]) % 3), state)
        step = jax.jit(make_gradient_fn(config, graphdef))
        gradients, state, metrics = step(randomised(params), state, shard_batch(mesh, tiny.batch()), jax.random.key(5))
    tree = {"gradient": gradients, "state": state, "metric": metrics}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def reference(router):
    return measure(router, {}, {})


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_numbers(name):
    router, layout, moe = LAYOUTS[name]
    expected, actual = reference(router), measure(router, layout, moe)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        if path.startswith("['metric']['exchange/"):
            continue  # what travels is what differs
        if value.dtype.kind == "i":
            np.testing.assert_array_equal(actual[path], value, err_msg=path)
        else:
            assert_close(actual[path], value, what=path)


def test_the_reference_exercises_every_parameter():
    expected = reference("gpt-oss")
    assert all(np.abs(value).max() > 1e-7 for path, value in expected.items() if path.startswith("['gradient']"))
    for name in ("b_down_ED", "b_gate_EF", "b_router_E", "w_shared_gate_D", "b_V", "w_embed_DD", "ffn_post_norm", "bias_D"):
        assert any(f"'{name}'" in path for path in expected), name
    assert expected["['metric']['router/load']"].shape == (3, 8)
    assert expected["['metric']['loss/mtp']"] > 1
