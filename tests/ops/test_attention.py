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


def _loop(q, k, v, window):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    y = np.zeros_like(q)
    for b, s, h in np.ndindex(B, S, H):
        g = h // (H // G)
        seen = [t for t in range(S) if _sees(b, s, t, window)]
        if seen:
            p = np.exp([q[b, s, h] @ k[b, t, g] / np.sqrt(N) for t in seen])
            y[b, s, h] = (p / p.sum()) @ v[b, seen, g]
    return y


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_against_a_loop(window, dtype):
    q, k, v = _qkv(dtype)
    y = attention(q, k, v, jnp.asarray(SEGMENTS_BS), window=window)
    assert y.dtype == dtype
    assert_close(y, _loop(q, k, v, window))


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

    ours = jax.vjp(lambda *qkv: attention(*qkv, segment_ids, window=window), q, k, v)
    theirs = jax.vjp(expected, q, k, v)
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


def test_bad_arguments_are_refused_in_a_sentence():
    q, k, v = _qkv()
    with pytest.raises(ConfigError, match=r"'cudnn' needs a GPU.* but the platform is 'cpu'; use 'auto' or 'xla'"):
        attention(q, k, v, jnp.asarray(SEGMENTS_BS), implementation="cudnn")
    with pytest.raises(ConfigError, match="'flash' is unknown"):
        attention(q, k, v, jnp.asarray(SEGMENTS_BS), implementation="flash")
    with pytest.raises(ValueError, match="3 query heads over 2 key/value heads"):
        attention(q[:, :, :3], k, v, jnp.asarray(SEGMENTS_BS))


def test_inside_shard_map_split_by_rows_and_heads():
    qkv, segment_ids_BS = _qkv(), jnp.asarray(SEGMENTS_BS)

    def run(q, k, v, segment_ids_BS):
        y, pullback = jax.vjp(lambda *qkv: attention(*qkv, segment_ids_BS, window=3), q, k, v)
        return y, *pullback(jnp.cos(y))

    mesh = mesh_of(data=2, tensor=2)
    heads, rows = P("data", None, "tensor", None), P("data", None)
    with jax.set_mesh(mesh):
        island = jax.jit(jax.shard_map(run, in_specs=(heads,) * 3 + (rows,), out_specs=(heads,) * 4))
        actual = island(*(jax.reshard(a, heads) for a in qkv), jax.reshard(segment_ids_BS, rows))
    for a, e in zip(actual, jax.jit(run)(*qkv, segment_ids_BS), strict=True):
        assert_close(a, e)
