"""What published feed-forward layers have beyond SwiGLU: other activations, biases, gated shared experts of another width; and norms.

The oracle of an MoE layer runs every expert on every token and weighs the answers: no dispatch, no exchange, no devices.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of
from tolerance import assert_close

from moe_jax.config import ModelConfig, MoEConfig, RouterConfig
from moe_jax.layers.basic import Head, LayerNorm, RMSNorm, make_norm, scaled
from moe_jax.layers.mlp import MLP, activate
from moe_jax.layers.moe import MoE
from moe_jax.mesh import batch_spec

B, S, D, F, E, K, LIMIT = 8, 4, 8, 8, 4, 2, 0.6
X = np.linspace(-4, 4, 41)
UP = np.linspace(3, -3, 41)

EXPECTED = {
    "swiglu": UP * X / (1 + np.exp(-X)),
    "geglu": UP * X / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))),
    "swiglu_clamped": (np.clip(UP, -2, 2) + 1) * np.minimum(X, 2) / (1 + np.exp(-1.702 * np.minimum(X, 2))),
    "gelu": UP / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (UP + 0.044715 * UP**3))),
    "relu": np.maximum(UP, 0),
}


@pytest.mark.parametrize("activation", EXPECTED)
def test_activations_by_formula(activation):
    assert_close(activate(activation, jnp.float32(UP), jnp.float32(X), 2.0), EXPECTED[activation])
    assert activate(activation, jnp.zeros(1), jnp.zeros(1)) == 0


@pytest.mark.parametrize("activation", ["relu", "swiglu_clamped"])
def test_dense_layer(activation):
    mlp = MLP(D, F, activation, 0.7, 0.7, jnp.float32, limit=LIMIT, rngs=nnx.Rngs(0))
    x_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)), jnp.float32)
    gate = x_BSD @ mlp.w_gate_DF[...] if activation == "swiglu_clamped" else None
    assert hasattr(mlp, "w_gate_DF") == (activation == "swiglu_clamped")
    expected = activate(activation, x_BSD @ mlp.w_up_DF[...], gate, LIMIT) @ mlp.w_down_FD[...]
    assert_close(mlp(x_BSD), expected)
    assert np.any(expected != activate(activation, x_BSD @ mlp.w_up_DF[...], gate, 9.0) @ mlp.w_down_FD[...]) == (
        gate is not None
    )


def configuration(**moe):
    """An MoE layer with everything on."""
    return MoEConfig(
        **dict(
            num_experts=E,
            d_ff=F,
            num_shared_experts=2,
            shared_d_ff=6,
            shared_gate=True,
            expert_bias=True,
            capacity_factor=100.0,
            router=RouterConfig("mixtral", K, {"bias": True}),
        )
        | moe
    )


def random_params(layer):
    """Values far from the initial ones, biases too, by path; the same for every layout."""
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jax.device_put(rng.normal(size=p.shape).astype(np.float32) * 0.5, p.sharding), state)


def inputs():
    rng = np.random.default_rng(1)
    mask_BS = rng.random((B, S)) < 0.8
    return [rng.normal(size=(B, S, D)).astype(np.float32), mask_BS, rng.normal(size=(B, S, D)).astype(np.float32)]


def values_and_gradients(function, params, x_BSD, g_BSD):
    y_BSD, pullback = jax.vjp(function, params, x_BSD)
    return y_BSD, *pullback(g_BSD)


@functools.cache
def oracle(activation):
    """(y, gradients by parameters and x): every expert on every token."""
    x_BSD, mask_BS, g_BSD = map(jnp.asarray, inputs())
    layer = MoE.standalone(D, configuration(), activation=activation, activation_limit=LIMIT, rngs=nnx.Rngs(0))

    def run(params, x_BSD):
        experts, shared = params["experts"], params["shared"]
        logits_BSE = x_BSD @ params["w_router_DE"] + params["b_router_E"]
        least = jax.lax.stop_gradient(jnp.sort(logits_BSE, axis=-1)[..., -K, None])
        weight_BSE = jax.nn.softmax(jnp.where(logits_BSE >= least, logits_BSE, -jnp.inf)) * mask_BS[..., None]

        def pre(name):
            x_BSEF = jnp.einsum("BSD,EDF->BSEF", x_BSD, experts[f"w_{name}_EDF"]) + experts[f"b_{name}_EF"]
            return x_BSEF, x_BSD @ shared[f"w_{name}_DF"]

        (up, shared_up), (gate, shared_gate) = pre("up"), pre("gate") if "w_gate_EDF" in experts else (None, None)
        h_BSEF = activate(activation, up, gate, LIMIT)
        answer_BSED = jnp.einsum("BSEF,EFD->BSED", h_BSEF, experts["w_down_EFD"]) + experts["b_down_ED"]
        beside_BSD = activate(activation, shared_up, shared_gate, LIMIT) @ shared["w_down_FD"]
        open_BS1 = jax.nn.sigmoid(x_BSD @ params["w_shared_gate_D"])[..., None]
        return jnp.einsum("BSE,BSED->BSD", weight_BSE, answer_BSED) + open_BS1 * beside_BSD

    params = random_params(layer)
    assert params["shared"]["w_up_DF"].shape == (D, 12)
    return jax.jit(functools.partial(values_and_gradients, run))(params, x_BSD, g_BSD)


CASES = {
    "dropless": ({}, "swiglu_clamped", dict(grouped_matmul="cpu")),
    "dropless, other backends": ({}, "swiglu_clamped", dict(grouped_matmul="reference")),
    "capacity": ({}, "relu", dict(dispatch="capacity")),
    "einsum": ({}, "swiglu_clamped", dict(dispatch="einsum")),
    "fsdp expert tensor": (dict(fsdp=2, expert=2, tensor=2), "swiglu_clamped", {}),
    "tensor, reference": (dict(data=2, tensor=4), "swiglu_clamped", dict(grouped_matmul="reference")),
    "ragged, rows to spare": (dict(expert=4, tensor=2), "relu", dict(exchange="ragged")),
    "capacity, expert tensor": (dict(expert=2, tensor=2), "swiglu_clamped", dict(dispatch="capacity", exchange="all_gather")),
}


@pytest.mark.parametrize("case", CASES)
def test_every_dispatch_adds_the_biases_once(case):
    sizes, activation, moe = CASES[case]
    mesh = mesh_of(**sizes) if sizes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        layer = MoE.standalone(D, configuration(**moe), activation=activation, activation_limit=LIMIT, rngs=nnx.Rngs(0))
        params = random_params(layer)
        x_BSD, mask_BS, g_BSD = (jax.reshard(a, batch_spec(a.ndim)) if mesh else jnp.asarray(a) for a in inputs())
        graphdef, _, rest = nnx.split(layer, nnx.Param, ...)

        def run(params, x_BSD):
            return nnx.merge(graphdef, params, rest)(x_BSD, mask_BS)[0]

        actual = jax.jit(functools.partial(values_and_gradients, run))(params, x_BSD, g_BSD)
    expected = oracle(activation)
    assert np.min([np.abs(leaf).max() for leaf in jax.tree.leaves(expected)]) > 1e-3
    pairs = zip(*(jax.tree.leaves_with_path(tree) for tree in (actual, expected)), strict=True)
    for (path, a), (_, e) in pairs:
        assert_close(np.asarray(a), e, what=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["rms", "layer", "layer_no_bias"])
def test_norms_by_formula(name):
    norm = make_norm(ModelConfig(d_model=D, norm=name, norm_eps=0.1))
    assert isinstance(norm, RMSNorm if name == "rms" else LayerNorm)
    assert hasattr(norm, "bias_D") == (name == "layer")
    rng = np.random.default_rng(0)
    x, scale, bias = 3 * rng.normal(size=(5, D)) + 1, rng.normal(size=D), rng.normal(size=D)
    norm.scale_D[...] = jnp.asarray(scale, jnp.float32)
    centred = x if name == "rms" else x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1) * scale
    if name == "layer":
        norm.bias_D[...] = jnp.asarray(bias, jnp.float32)
        expected = expected + bias
    assert_close(norm(jnp.asarray(x, jnp.float32)), expected)
    in_bfloat16 = norm(jnp.asarray(x, jnp.bfloat16))
    assert in_bfloat16.dtype == jnp.bfloat16
    assert_close(in_bfloat16, expected)


def test_a_tied_head_has_a_bias_and_no_matrix():
    with jax.set_mesh(mesh_of()):
        head = Head(11, D, 0.1, jnp.float32, tied=True, bias=True, rngs=nnx.Rngs(0))
        assert list(nnx.to_pure_dict(nnx.state(head))) == ["b_V"]
        plain = Head(11, D, 0.1, jnp.float32, tied=False, bias=False, rngs=nnx.Rngs(0))
        assert list(nnx.to_pure_dict(nnx.state(plain))) == ["w_DV"]


def test_a_scale_is_not_rounded():
    whole = np.arange(100, dtype=np.float32)  # exact in bfloat16
    x = jnp.asarray(whole, jnp.bfloat16)
    np.testing.assert_array_equal(scaled(x, 0.22), jnp.asarray(whole * np.float32(0.22), jnp.bfloat16))
    assert scaled(x, 1.0) is x
    assert np.any(x * 0.22 != scaled(x, 0.22))
