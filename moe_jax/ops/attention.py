"""Causal attention over packed documents."""

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError
from moe_jax.mesh import target_platform
from moe_jax.ops.attention_blocks import attend_in_blocks
from moe_jax.ops.varying import vary_alike

CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_MAX_HEAD_DIM = 128


def attention(
    q_BSHN: jax.Array,
    k_BSGN: jax.Array,
    v_BSGM: jax.Array,
    segment_ids_BS: jax.Array,
    sink_H: jax.Array | None = None,
    *,
    window: int = 0,
    scale: float = 0.0,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention (1706.03762, equation 1); softmax in float32.

    A token sees the tokens of its own segment up to itself. Query head h reads key/value head `h // (H / G)` (grouped-query
    attention, 2305.13245).

    Args:
      q_BSHN: queries. Arrays are one device's own: call it inside `shard_map`, or on one device.
      k_BSGN: keys; H is a multiple of G.
      v_BSGM: values; their width M may differ from N.
      segment_ids_BS: int32, the document of each token; 0 is padding, which is seen by nobody and whose own rows are zero.
      sink_H: a score of each query head that takes part in every softmax and has no value, so that weights sum to less than 1
        (gpt-oss, 2508.10925); None for none. It is neither scaled nor capped.
      window: a token sees itself and the `window - 1` tokens before it; 0 means all.
      scale: multiplies queries times keys; 0 means N^-1/2.
      softcap: c: scaled scores become c tanh(score / c) (Gemma 2, 2408.00118, section 2); 0 means no cap.
      implementation: "xla", "cudnn" or "auto" (see `choose_implementation`).

    Returns: [B, S, H, M] in q's dtype.

    Raises:
      ConfigError: an implementation that is unknown or cannot do this.
      ValueError: H is not a multiple of G.
    """
    N, M = q_BSHN.shape[-1], v_BSGM.shape[-1]
    if q_BSHN.shape[2] % k_BSGN.shape[2]:
        raise ValueError(
            f"attention was given {q_BSHN.shape[2]} query heads over {k_BSGN.shape[2]} key/value heads; the first must be a multiple."
        )
    implementation = choose_implementation(
        implementation, q_BSHN.dtype, N, v_head_dim=M, softcap=softcap, sinks=sink_H is not None
    )
    scale = scale or N**-0.5
    same_BST = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]  # padding sees padding: no softmax is over nothing
    if implementation == "cudnn":
        local = (window - 1, 0) if window else None
        y_BSHM = jax.nn.dot_product_attention(
            q_BSHN,
            k_BSGN,
            v_BSGM,
            mask=same_BST[:, None],
            scale=scale,
            is_causal=True,
            local_window_size=local,
            implementation="cudnn",
        )
    else:
        distance_ST = jnp.arange(q_BSHN.shape[1])[:, None] - jnp.arange(k_BSGN.shape[1])
        in_reach_ST = (distance_ST >= 0) & (distance_ST < window) if window else distance_ST >= 0
        y_BSHM = _attend(q_BSHN, k_BSGN, v_BSGM, same_BST & in_reach_ST, sink_H, window, scale, softcap)
    return jnp.where((segment_ids_BS != 0)[:, :, None, None], y_BSHM, 0)


def _attend(q_BSHN, k_BSGN, v_BSGM, sees_BST, sink_H, window, scale, softcap):
    """Heads first, for whom the products are batches: R query heads to each key/value head."""
    (B, S, H, N), G = q_BSHN.shape, k_BSGN.shape[2]
    q_XRSN = jnp.swapaxes(q_BSHN, 1, 2).reshape(B * G, H // G, S, N)
    k_XTN, v_XTM = (jnp.swapaxes(x, 1, 2).reshape(B * G, S, x.shape[-1]) for x in (k_BSGN, v_BSGM))
    sink_XR11 = None
    if sink_H is not None:
        sink_H, _ = vary_alike(sink_H, q_BSHN)  # out here, where its gradient is summed over the devices that share it
        sink_XR11 = jnp.broadcast_to(sink_H.astype(jnp.float32), (B, H)).reshape(B * G, H // G, 1, 1)
    y_XRSM = attend_in_blocks(q_XRSN, k_XTN, v_XTM, sees_BST, sink_XR11, window, scale, softcap)
    return jnp.swapaxes(y_XRSM.reshape(B, H, S, -1), 1, 2)


def _platform():
    target = target_platform()
    return f"{target}, and none is here" if target == "gpu" != jax.default_backend() else target


def choose_implementation(
    implementation: str,
    dtype: jnp.dtype,
    head_dim: int,
    platform: str | None = None,
    *,
    v_head_dim: int | None = None,
    softcap: float = 0.0,
    sinks: bool = False,
) -> str:
    """ "xla" or "cudnn"; "auto" takes cuDNN's fused kernel on a GPU where it can do what is asked for, else XLA.

    Args:
      implementation: "xla", "cudnn" or "auto".
      dtype: of queries, keys and values.
      head_dim: width of queries and keys.
      platform: where it is to run; None means what the ambient mesh is made of. A program for a GPU that is not here, which can only
        be traced and compiled, gets XLA's: without a GPU there is no cuDNN, and JAX traces nothing for it.
      v_head_dim: width of values; None means `head_dim`.
      softcap: as in `attention`.
      sinks: whether there are sinks.

    Raises:
      ConfigError: "cudnn" was asked for where it cannot run, or the name is unknown.
    """
    platform = platform or _platform()
    dtype, v_head_dim = jnp.dtype(dtype).name, v_head_dim or head_dim
    obstacles = {
        f"the platform is {platform!r}": platform not in ("gpu", "cuda"),
        f"the dtype is {dtype}": dtype not in CUDNN_DTYPES,
        f"the head width is {head_dim}": head_dim > CUDNN_MAX_HEAD_DIM or head_dim % 8 != 0,
        f"the values' width is {v_head_dim}": v_head_dim != head_dim,
        f"model.attention.softcap is {softcap}": softcap != 0,
        "model.attention.sinks is True": sinks,
    }
    obstacle = next((text for text, present in obstacles.items() if present), None)
    if implementation == "auto":
        return "xla" if obstacle else "cudnn"
    if implementation not in ("xla", "cudnn"):
        raise ConfigError(f"model.attention.implementation = {implementation!r} is unknown; choose 'auto', 'xla' or 'cudnn'.")
    if implementation == "cudnn" and obstacle:
        raise ConfigError(
            f"model.attention.implementation = 'cudnn' needs a GPU, {' or '.join(CUDNN_DTYPES)}, a head width that is a multiple of 8"
            f" up to {CUDNN_MAX_HEAD_DIM}, values of that width, and neither softcap nor sinks, but {obstacle}; use 'auto' or 'xla'."
        )
    return implementation
