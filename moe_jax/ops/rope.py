"""Rotary position embedding."""

import jax
import jax.numpy as jnp


def apply_rope(x_BSHN: jax.Array, positions_BS: jax.Array, theta: float) -> jax.Array:
    """Rotates each head's vector by angles in proportion to the token's position (RoFormer, 2104.09864, equation 34).

    The pairs that rotate together are (i, i + N/2), the half-split layout of Llama and Hugging Face checkpoints, not RoFormer's
    (2i, 2i + 1). Pair i turns by position * theta^(-2i/N) radians. Dot products of two rotated vectors depend on the difference of
    their positions only.

    Args:
      x_BSHN: queries or keys; N even.
      positions_BS: int32, from 0 in each document.
      theta: base of the wavelengths.

    Returns: the same shape and dtype as x; the arithmetic is float32.
    """
    x1_BSHM, x2_BSHM = jnp.split(x_BSHN.astype(jnp.float32), 2, axis=-1)
    half = x1_BSHM.shape[-1]
    frequency_M = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BS1M = positions_BS.astype(jnp.float32)[:, :, None, None] * frequency_M
    cos, sin = jnp.cos(angle_BS1M), jnp.sin(angle_BS1M)
    y_BSHN = jnp.concatenate([x1_BSHM * cos - x2_BSHM * sin, x2_BSHM * cos + x1_BSHM * sin], axis=-1)
    return y_BSHN.astype(x_BSHN.dtype)
