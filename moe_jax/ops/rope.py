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
    half = x_BSHN.shape[-1] // 2
    frequency_M = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BS1M = positions_BS.astype(jnp.float32)[:, :, None, None] * frequency_M
    cos, sin = jnp.cos(angle_BS1M), jnp.sin(angle_BS1M)
    cos_BS1N, sin_BS1N = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    # The partner by a roll: halves cut out of x and joined again take XLA:CPU four times as long.
    x32_BSHN = x_BSHN.astype(jnp.float32)
    return (x32_BSHN * cos_BS1N + jnp.roll(x32_BSHN, half, axis=-1) * sin_BS1N).astype(x_BSHN.dtype)
