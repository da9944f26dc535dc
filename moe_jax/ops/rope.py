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
    return _rotate(x_BSHN, jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))


@jax.custom_vjp
def _rotate(x_BSHN, cos_BS1N, sin_BS1N):
    # The partner by a roll: halves cut out of x and joined again take XLA:CPU four times as long.
    x32_BSHN = x_BSHN.astype(jnp.float32)
    partner_BSHN = jnp.roll(x32_BSHN, x_BSHN.shape[-1] // 2, axis=-1)
    return (x32_BSHN * cos_BS1N + partner_BSHN * sin_BS1N).astype(x_BSHN.dtype)


def _rotate_forward(x_BSHN, cos_BS1N, sin_BS1N):
    return _rotate(x_BSHN, cos_BS1N, sin_BS1N), (cos_BS1N, sin_BS1N)


def _rotate_back(angles, g_BSHN):
    """The gradient of a rotation is the rotation back; the angles come from integers and take none."""
    cos_BS1N, sin_BS1N = angles
    return _rotate(g_BSHN, cos_BS1N, -sin_BS1N), None, None


_rotate.defvjp(_rotate_forward, _rotate_back)
