"""Causal attention over packed documents."""

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError
from moe_jax.ops.attention_blocks import attend_in_blocks

CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_MAX_HEAD_DIM = 128


def attention(
    q_BSHN: jax.Array,
    k_BSGN: jax.Array,
    v_BSGN: jax.Array,
    segment_ids_BS: jax.Array,
    *,
    window: int = 0,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention (1706.03762, equation 1) with scale N^-1/2; softmax in float32.

    A token sees the tokens of its own segment up to itself. Query head h reads key/value head `h // (H / G)` (grouped-query
    attention, 2305.13245).

    Args:
      q_BSHN: queries. Arrays are one device's own: call it inside `shard_map`, or on one device.
      k_BSGN: keys; H is a multiple of G.
      v_BSGN: values.
      segment_ids_BS: int32, the document of each token; 0 is padding, which is seen by nobody and whose own rows are zero.
      window: a token sees itself and the `window - 1` tokens before it; 0 means all.
      implementation: "xla", "cudnn" or "auto" (see `choose_implementation`).

    Returns: [B, S, H, N] in q's dtype.

    Raises:
      ConfigError: an implementation that is unknown or cannot do this.
      ValueError: H is not a multiple of G.
    """
    if q_BSHN.shape[2] % k_BSGN.shape[2]:
        raise ValueError(
            f"attention was given {q_BSHN.shape[2]} query heads over {k_BSGN.shape[2]} key/value heads; the first must be a multiple."
        )
    implementation = choose_implementation(implementation, q_BSHN.dtype, q_BSHN.shape[-1])
    same_BST = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]  # padding sees padding: no softmax is over nothing
    if implementation == "cudnn":
        local = (window - 1, 0) if window else None
        y_BSHN = jax.nn.dot_product_attention(
            q_BSHN, k_BSGN, v_BSGN, mask=same_BST[:, None], is_causal=True, local_window_size=local, implementation="cudnn"
        )
    else:
        distance_ST = jnp.arange(q_BSHN.shape[1])[:, None] - jnp.arange(k_BSGN.shape[1])
        in_reach_ST = (distance_ST >= 0) & (distance_ST < window) if window else distance_ST >= 0
        y_BSHN = _attend(q_BSHN, k_BSGN, v_BSGN, same_BST & in_reach_ST, window)
    return jnp.where((segment_ids_BS != 0)[:, :, None, None], y_BSHN, 0)


def _attend(q_BSHN, k_BSGN, v_BSGN, sees_BST, window):
    """Heads first, for whom the products are batches: R query heads to each key/value head."""
    (B, S, H, N), G = q_BSHN.shape, k_BSGN.shape[2]
    q_XRSN = jnp.swapaxes(q_BSHN, 1, 2).reshape(B * G, H // G, S, N)
    k_XTN, v_XTN = (jnp.swapaxes(x, 1, 2).reshape(B * G, S, N) for x in (k_BSGN, v_BSGN))
    return jnp.swapaxes(attend_in_blocks(q_XRSN, k_XTN, v_XTN, sees_BST, window).reshape(B, H, S, N), 1, 2)


def choose_implementation(implementation: str, dtype: jnp.dtype, head_dim: int, platform: str | None = None) -> str:
    """ "xla" or "cudnn"; "auto" takes cuDNN's fused kernel on a GPU where it supports dtype and width, else XLA.

    Raises:
      ConfigError: "cudnn" was asked for where it cannot run, or the name is unknown.
    """
    platform = platform or jax.default_backend()
    dtype = jnp.dtype(dtype).name
    obstacles = {
        f"the platform is {platform!r}": platform not in ("gpu", "cuda"),
        f"the dtype is {dtype}": dtype not in CUDNN_DTYPES,
        f"the head width is {head_dim}": head_dim > CUDNN_MAX_HEAD_DIM or head_dim % 8 != 0,
    }
    obstacle = next((text for text, present in obstacles.items() if present), None)
    if implementation == "auto":
        return "xla" if obstacle else "cudnn"
    if implementation not in ("xla", "cudnn"):
        raise ConfigError(f"model.attention.implementation = {implementation!r} is unknown; choose 'auto', 'xla' or 'cudnn'.")
    if implementation == "cudnn" and obstacle:
        raise ConfigError(
            f"model.attention.implementation = 'cudnn' needs a GPU, {' or '.join(CUDNN_DTYPES)}, and a head width that is a"
            f" multiple of 8 up to {CUDNN_MAX_HEAD_DIM}, but {obstacle}; use 'auto' or 'xla'."
        )
    return implementation
