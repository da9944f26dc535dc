import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tolerance import assert_close

from moe_jax.config import ConfigError
from moe_jax.ops.attention import attention, choose_implementation

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
