from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import mesh_of
from one_attention import build, inputs, random_params, run
from tolerance import assert_close

from moe_jax.config import AttentionConfig, ModelConfig, RopeConfig
from moe_jax.layers.attention import Attention
from moe_jax.layers.latent_attention import LatentAttention, make_attention
from moe_jax.mesh import batch_spec

D = 8
PLAIN = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
EVERYTHING = replace(
    PLAIN,
    qk_norm="full",
    qkv_clip=1.0,
    sinks=True,
    scale=0.3,
    softcap=2.0,
    qkv_bias=True,
    out_bias=True,
    window=3,
    full_every=2,
    rope=RopeConfig(theta=100.0, dim=2),
)
LATENT = AttentionConfig(
    num_heads=4,
    num_kv_heads=4,
    head_dim=6,
    kv_rank=8,
    rope_head_dim=4,
    v_head_dim=3,
    rope=RopeConfig(theta=100.0, interleaved=True),
)
CASES = {
    "everything": EVERYTHING,
    "norm by head": replace(PLAIN, qk_norm="head"),
    "latent": replace(LATENT, q_rank=6, window=3, full_every=2),
    "latent, plain queries": replace(LATENT, v_head_dim=0),
}


def model_of(attention, **fields):
    return ModelConfig(d_model=D, attention=attention, **fields)


def softmax_by_hand(q, k, v, segments, window, scale, softcap=0.0, sinks=None):
    """q of H heads, k and v of as many; a loop over rows, tokens and heads in float64."""
    B, S, H, _ = q.shape
    y = np.zeros((B, S, H, v.shape[-1]))
    for b, s, h in np.ndindex(B, S, H):
        seen = [t for t in range(s + 1) if segments[b, t] == segments[b, s] != 0 and (not window or s - t < window)]
        if seen:
            score = k[b, seen, h] @ q[b, s, h] * scale
            weight = np.exp(softcap * np.tanh(score / softcap) if softcap else score)
            y[b, s, h] = weight @ v[b, seen, h] / (weight.sum() + (0 if sinks is None else np.exp(sinks[h])))
    return y


def turn(x, positions, width, theta, interleaved):
    """The first `width` widths of x rotate, as complex numbers."""
    half = width // 2
    even, odd = (x[..., 0:width:2], x[..., 1:width:2]) if interleaved else (x[..., :half], x[..., half:width])
    turned = (even + 1j * odd) * np.exp(1j * positions[..., None, None] * theta ** (-np.arange(half) / half))
    pairs = (turned.real, turned.imag)
    joined = np.stack(pairs, -1).reshape(*even.shape[:-1], width) if interleaved else np.concatenate(pairs, -1)
    return np.concatenate([joined, x[..., width:]], -1)


def rms_normed(x, scale, axes):
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize("window", [0, 3])
def test_everything_at_once_against_numpy(window):
    config = model_of(replace(EVERYTHING, window=window, full_every=0))
    mesh, (x, segments, positions, g) = mesh_of(), inputs(D)
    p = random_params(config, mesh)
    actual, _ = run(config, mesh, p, (x, segments, positions, g))
    q, k, v = (
        np.einsum("BSD,DHN->BSHN", x.astype(float), p[f"w{n}"]) + p[f"b{n.replace('D', '')}"]
        for n in ("q_DHN", "k_DGN", "v_DGN")
    )
    q, k = rms_normed(q, p["q_norm"]["scale_HN"], (-2, -1)), rms_normed(k, p["k_norm"]["scale_GN"], (-2, -1))
    q, k, v = (np.clip(a, -1, 1) for a in (q, k, v))
    q, k = (turn(a, positions, 2, 100.0, False) for a in (q, k))
    k, v = (np.repeat(a, 2, axis=2) for a in (k, v))
    y = softmax_by_hand(q, k, v, segments, window, 0.3, 2.0, p["sink_H"])
    assert_close(actual["y"], np.einsum("BSHN,HND->BSD", y, p["wo_HND"]) + p["bo_D"])


@pytest.mark.parametrize("q_rank", [0, 6])
def test_latents_against_numpy(q_rank):
    config = model_of(replace(LATENT, q_rank=q_rank))
    mesh, (x, segments, positions, g) = mesh_of(), inputs(D)
    p = random_params(config, mesh)
    actual, _ = run(config, mesh, p, (x, segments, positions, g))
    x = x.astype(float)
    if q_rank:
        q = np.einsum("BSR,RHN->BSHN", rms_normed(x @ p["wq_down_DR"], p["q_latent_norm"]["scale_R"], -1), p["wq_up_RHN"])
    else:
        q = np.einsum("BSD,DHN->BSHN", x, p["wq_DHN"])
    latent = rms_normed(x @ p["wkv_down_DR"], p["kv_latent_norm"]["scale_R"], -1)
    k, v = (np.einsum("BSR,RHN->BSHN", latent, p[name]) for name in ("wk_up_RHN", "wv_up_RHN"))
    k_rope = turn((x @ p["wk_rope_DN"])[:, :, None], positions, 4, 100.0, True)
    q = np.concatenate([q[..., :6], turn(q[..., 6:], positions, 4, 100.0, True)], -1)
    k = np.concatenate([k, np.repeat(k_rope, 4, axis=2)], -1)
    y = softmax_by_hand(q, k, v, segments, 0, 10**-0.5)
    assert_close(actual["y"], np.einsum("BSHN,HND->BSD", y, p["wo_HND"]))


@pytest.mark.parametrize("case", CASES)
def test_sharded_equals_one_device_with_gradients(case):
    config, arrays = model_of(CASES[case]), inputs(D)
    sees_all = True if CASES[case].full_every else None
    params = random_params(config, mesh_of())
    expected, actual = (run(config, mesh, params, arrays, sees_all) for mesh in (mesh_of(), mesh_of(data=2, fsdp=2, tensor=2)))
    jax.tree.map_with_path(lambda path, a, e: assert_close(a, e, what=str(path)), actual, expected)
    for path, gradient in jax.tree.leaves_with_path(actual[1]):
        assert np.any(gradient), path


@pytest.mark.parametrize("case", ["everything", "latent"])
@pytest.mark.parametrize("sees_all", [False, True])
def test_the_flag_lifts_the_window(case, sees_all):
    config, mesh, arrays = model_of(CASES[case]), mesh_of(data=2, tensor=2), inputs(D)
    params = random_params(config, mesh)
    static = model_of(replace(CASES[case], window=0 if sees_all else 3, full_every=0))
    actual, expected = run(config, mesh, params, arrays, sees_all), run(static, mesh, params, arrays)
    jax.tree.map(assert_close, actual, expected)
    other, _ = run(config, mesh, params, arrays, not sees_all)
    assert np.max(np.abs(other["y"] - actual[0]["y"])) > 0.01


def test_the_flag_keeps_nothing_more_for_the_gradient():
    config, arrays = model_of(EVERYTHING), inputs(D, rows=2, length=130)

    def kept(sees_all):
        with jax.set_mesh(mesh_of()):
            graphdef, params = build(config)
            x, *rows = (jax.reshard(jnp.asarray(a), batch_spec(a.ndim)) for a in arrays[:3])

            def pullback(params, x, sees_all):
                return jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x, *rows, sees_all), params, x)[1]

            leaves = jax.tree.leaves(jax.eval_shape(pullback, params, x, sees_all))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    without = kept(None)
    assert without > 2 * 130 * D * 4
    assert kept(jnp.asarray(True)) <= without + 8  # the flag


@pytest.mark.parametrize("case", ["everything", "latent"])
def test_in_bfloat16(case):
    config, mesh, arrays = model_of(replace(CASES[case], qkv_clip=0.0)), mesh_of(), inputs(D)
    params = random_params(config, mesh)
    actual, expected = (
        run(replace(config, dtype="bfloat16"), mesh, params, arrays, False),
        run(config, mesh, params, arrays, False),
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.sqrt(np.mean((a - e) ** 2)) <= 2e-2 * np.sqrt(np.mean(e**2))


def test_latents_where_there_is_a_rank():
    with jax.set_mesh(mesh_of()):
        made = {k: make_attention(model_of(c), 0.02, jnp.float32, rngs=nnx.Rngs(0)) for k, c in CASES.items()}
    assert {k: type(m) for k, m in made.items()} == {k: LatentAttention if "latent" in k else Attention for k in CASES}
