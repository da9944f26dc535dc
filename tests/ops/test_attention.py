import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tolerance import assert_close

from moe_jax.config import ConfigError
from moe_jax.ops.attention import attention, choose_implementation
from moe_jax.ops.attention_blocks import blocks

SEGMENTS_BS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [0, 5, 5, 5, 5, 5, 5, 5, 5, 0]], np.int32)
B, S, H, G, N = 2, 10, 4, 2, 8


def _qkv(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (B, S, heads, N), dtype) for key, heads in zip(keys, (H, G, G), strict=True))


def _sees(b, s, t, window):
    """Whether token s of row b sees token t."""
    same = SEGMENTS_BS[b, s] == SEGMENTS_BS[b, t] != 0
    return same and t <= s and (window == 0 or s - t < window)


def _loop(q, k, v, window, sink_H=None, scale=N**-0.5, softcap=0.0):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, s, h in np.ndindex(B, S, H):
        g = h // (H // G)
        seen = [t for t in range(S) if _sees(b, s, t, window)]
        if seen:
            score = np.array([q[b, s, h] @ k[b, t, g] * scale for t in seen])
            p = np.exp(softcap * np.tanh(score / softcap) if softcap else score)
            y[b, s, h] = p @ v[b, seen, g] / (p.sum() + (np.exp(sink_H[h]) if sink_H is not None else 0))
    return y


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_against_a_loop(window, dtype):
    q, k, v = _qkv(dtype)
    y = attention(q, k, v, jnp.asarray(SEGMENTS_BS), window=window)
    assert y.dtype == dtype
    assert_close(y, _loop(q, k, v, window))


EXTRAS = {
    "scale": dict(scale=0.7),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sink_H=np.array([-2.0, 0.0, 1.0, 9.0], np.float32)),
    "all": dict(scale=0.7, softcap=1.5, sink_H=np.array([-2.0, 0.0, 1.0, 9.0], np.float32)),
}


@pytest.mark.parametrize(
    ("extras", "width", "dtype"),
    [*((extras, 4, jnp.float32) for extras in EXTRAS), ("all", 12, jnp.float32), ("all", 4, jnp.bfloat16)],
)
def test_extras_and_values_of_another_width_against_a_loop(extras, width, dtype):
    q, k, _ = _qkv(dtype)
    v = jax.random.normal(jax.random.key(1), (B, S, G, width), dtype)
    y = attention(q, k, v, jnp.asarray(SEGMENTS_BS), window=3, **EXTRAS[extras])
    assert y.dtype == dtype
    assert_close(y, _loop(q, k, v, 3, **EXTRAS[extras]))


@pytest.mark.parametrize(("extras", "window"), [*((extras, 40) for extras in EXTRAS), ("all", 0)])
def test_gradients_of_extras_in_several_blocks_against_autodiff(extras, window):
    length, M = 150, 4
    kinds = dict(EXTRAS[extras])
    sink_H = jnp.asarray(kinds.pop("sink_H", np.full(H, -np.inf, np.float32)))
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, length, h, w) for h, w in ((H, N), (G, N), (G, M), (H, M))]
    q, k, v, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], length // 3, axis=1))
    distance = np.arange(length)[:, None] - np.arange(length)
    sees = (distance >= 0) & ((distance < window) if window else True) & (segments[:, :, None] == segments[:, None, :])

    def expected(q, k, v, sink_H):
        k, v = (jnp.repeat(a, H // G, axis=2) for a in (k, v))
        score = jnp.einsum("BSHN,BTHN->BHST", q, k) * kinds.get("scale", N**-0.5)
        if softcap := kinds.get("softcap"):
            score = softcap * jnp.tanh(score / softcap)
        score = jnp.where(sees[:, None], score, -jnp.inf)
        sink = jnp.broadcast_to(sink_H[None, :, None, None], (B, H, length, 1))
        weight = jax.nn.softmax(jnp.concatenate([score, sink], axis=-1), axis=-1)[..., :-1]
        return jnp.where((segments != 0)[:, :, None, None], jnp.einsum("BHST,BTHM->BSHM", weight, v), 0)

    def ours(q, k, v, sink_H):
        return attention(q, k, v, segments, sink_H if "sink_H" in EXTRAS[extras] else None, window=window, **kinds)

    (y, back), (y_expected, back_expected) = (jax.vjp(jax.jit(f), q, k, v, sink_H) for f in (ours, expected))
    assert_close(y, y_expected)
    for actual, gradient in zip(back(g), back_expected(g), strict=True):
        assert_close(actual, gradient)


def test_a_huge_sink_or_score_overflows_nothing():
    q, k, v = _qkv()
    for size, sink in ((1.0, 1e4), (1e3, 0.0)):
        y, back = jax.vjp(lambda q, sink: attention(q, k, v, jnp.asarray(SEGMENTS_BS), sink), size * q, jnp.full(H, sink))
        assert all(np.all(np.isfinite(a)) for a in (y, *back(jnp.ones_like(y))))
        assert np.any(np.asarray(y)) == (sink == 0.0)


@pytest.mark.parametrize("window", [0, 3])
def test_gradients_show_exactly_who_sees_whom(window):
    q, k, v = _qkv()

    def total(kv_BST):  # each pair (s, t) may move t's key and value for s alone
        def one(s):
            moved = kv_BST[:, s, :, None, None]
            return attention(q, k + moved, v + moved, jnp.asarray(SEGMENTS_BS), window=window)[:, s].sum()

        return sum(one(s) for s in range(S))

    influence_BST = np.asarray(jax.jit(jax.grad(total))(jnp.zeros((B, S, S))))
    expected = np.array([[[_sees(b, s, t, window) for t in range(S)] for s in range(S)] for b in range(B)])
    np.testing.assert_array_equal(influence_BST != 0, expected)


@pytest.mark.parametrize("window", [0, 2, 40, 100])
def test_several_blocks_against_jax_with_gradients(window):
    length = 150
    assert len(blocks(length, window)) == 3
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (B, length, h, N)) for key, h in zip(keys, (H, G, G, H), strict=True))
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], length // 3, axis=1))
    same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    local = (window - 1, 0) if window else None

    def expected(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, local_window_size=local)

    ours = jax.vjp(jax.jit(lambda *qkv: attention(*qkv, segment_ids, window=window)), q, k, v)
    theirs = jax.vjp(jax.jit(expected), q, k, v)
    assert_close(ours[0], theirs[0])
    for actual, gradient in zip(ours[1](g), theirs[1](g), strict=True):
        assert_close(actual, gradient)


@pytest.mark.parametrize("window", [0, 1, 70])
@pytest.mark.parametrize("length", [1, 64, 150, 1000])
def test_blocks_hold_every_pair_in_reach_and_little_else(length, window):
    seen = np.zeros((length, length), int)
    for rows, keys in blocks(length, window):
        seen[rows, keys] += 1
    distance = np.arange(length)[:, None] - np.arange(length)
    in_reach = (distance >= 0) & ((distance < window) if window else True)
    assert seen[in_reach].min() == seen.max() == 1
    widest = max(rows.stop - rows.start for rows, _ in blocks(length, window))
    assert not seen[(distance <= -widest) | (distance >= window + widest if window else False)].any()


def test_nothing_of_the_size_of_all_scores_is_kept_for_the_gradient():
    q = jax.ShapeDtypeStruct((1, 512, 1, N), jnp.float32)
    segment_ids = jnp.ones((1, 512), jnp.int32)
    kept = jax.eval_shape(lambda *qkv: jax.vjp(lambda *x: attention(*x, segment_ids), *qkv)[1], q, q, q)
    floats = [x.size for x in jax.tree.leaves(kept) if x.dtype == jnp.float32]
    assert floats
    assert max(floats) <= 512 * N


def test_padding_is_zero_forward_and_backward():
    padding = SEGMENTS_BS == 0
    y, pullback = jax.vjp(lambda *qkv: attention(*qkv, jnp.asarray(SEGMENTS_BS)), *_qkv())
    for array in (y, *pullback(jnp.ones_like(y))):
        array = np.asarray(array)
        assert np.all(np.isfinite(array))
        assert np.all(array[padding] == 0)
        assert np.any(array[~padding] != 0)


@pytest.mark.parametrize(
    ("args", "chosen"),
    [
        ((jnp.bfloat16, 64, "gpu"), "cudnn"),
        ((jnp.float32, 64, "gpu"), "xla"),
        ((jnp.bfloat16, 60, "gpu"), "xla"),
        ((jnp.bfloat16, 64, "tpu"), "xla"),
    ],
)
def test_auto_takes_cudnn_where_it_can(args, chosen):
    assert choose_implementation("auto", *args) == chosen


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (dict(v_head_dim=32), r"but the values' width is 32; use"),
        (dict(softcap=30.0), r"but model.attention.softcap is 30.0; use"),
        (dict(sinks=True), r"but model.attention.sinks is True; use"),
    ],
)
def test_what_cudnn_cannot_do_goes_to_xla_or_is_refused(extra, message):
    args = (jnp.bfloat16, 64, "gpu")
    assert choose_implementation("auto", *args, **extra) == "xla"
    with pytest.raises(ConfigError, match=message):
        choose_implementation("cudnn", *args, **extra)


def test_bad_arguments_are_refused_in_a_sentence():
    q, k, v = _qkv()
    with pytest.raises(ConfigError, match=r"'cudnn' needs a GPU.* but the platform is 'cpu'; use 'auto' or 'xla'"):
        attention(q, k, v, jnp.asarray(SEGMENTS_BS), implementation="cudnn")
    with pytest.raises(ConfigError, match="'flash' is unknown"):
        attention(q, k, v, jnp.asarray(SEGMENTS_BS), implementation="flash")
    with pytest.raises(ValueError, match="3 query heads over 2 key/value heads"):
        attention(q[:, :, :3], k, v, jnp.asarray(SEGMENTS_BS))


def test_inside_shard_map_split_by_rows_and_heads():
    qkv, segment_ids_BS, sink_H = _qkv(), jnp.asarray(SEGMENTS_BS), jnp.arange(4.0)

    def run(q, k, v, sink_H, segment_ids_BS):
        def answer(q, k, v, sink_H):
            return attention(q, k, v, segment_ids_BS, sink_H, window=3)

        y, pullback = jax.vjp(answer, q, k, v, sink_H)
        return y, *pullback(jnp.cos(y))

    mesh = mesh_of(data=2, tensor=2)
    heads, rows = P("data", None, "tensor", None), P("data", None)
    with jax.set_mesh(mesh):
        specs = (heads,) * 3 + (P("tensor"), rows)
        island = jax.jit(jax.shard_map(run, in_specs=specs, out_specs=(heads,) * 4 + (P("tensor"),)))
        actual = island(*(jax.reshard(a, s) for a, s in zip((*qkv, sink_H, segment_ids_BS), specs, strict=True)))
    for a, e in zip(actual, jax.jit(run)(*qkv, sink_H, segment_ids_BS), strict=True):
        assert_close(a, e)
