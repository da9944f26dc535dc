"""Rotary position embedding, and how it is stretched for longer contexts."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import RopeConfig


def apply_rope(x_BSHN: jax.Array, positions_BS: jax.Array, rope: RopeConfig, first: int = 0) -> jax.Array:
    """Rotates each head's vector by angles in proportion to the token's position (RoFormer, 2104.09864, equation 34).

    Of the R widths that rotate, those that do so together are (i, i + R/2), the half-split layout of Llama and most Hugging Face
    checkpoints, or with `rope.interleaved` (2i, 2i + 1), RoFormer's and DeepSeek's. Pair i turns by position * `frequencies`[i]
    radians and is multiplied by `amplitude`. Dot products of two rotated vectors depend on the difference of their positions only.

    Args:
      x_BSHN: queries or keys.
      positions_BS: int32, from 0 in each document.
      rope: theta, pairs and stretch; R is `rope.dim`, or all from `first` on.
      first: widths before this one pass as they are, and so do those after the R that rotate.

    Returns: the same shape and dtype as x; the arithmetic is float32.
    """
    width = rope.dim or x_BSHN.shape[-1] - first
    angle_BS1M = positions_BS.astype(jnp.float32)[:, :, None, None] * frequencies(rope, width)
    cos, sin = amplitude(rope) * jnp.cos(angle_BS1M), amplitude(rope) * jnp.sin(angle_BS1M)
    if rope.interleaved:
        cos_BS1R, sin_BS1R = (jnp.stack(pair, axis=-1).reshape(*cos.shape[:-1], width) for pair in ((cos, cos), (-sin, sin)))
    else:
        cos_BS1R, sin_BS1R = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    passing = ((0, 0),) * 3 + ((first, x_BSHN.shape[-1] - first - width),)
    cos_BS1N, sin_BS1N = jnp.pad(cos_BS1R, passing, constant_values=1), jnp.pad(sin_BS1R, passing)
    return _rotate(x_BSHN, cos_BS1N, sin_BS1N, first, 1 if rope.interleaved else width // 2)


def frequencies(rope: RopeConfig, width: int) -> np.ndarray:
    """Radians a token of each of the `width` / 2 pairs, [M] float32: theta^(-2i / width), divided by the factor where stretched.

    linear: every pair (2306.15595). wavelength: the long waves, and those of middling length in part (Llama 3.1; "llama3" in
    transformers). yarn: the pairs that turn seldom, and those in between in part (2309.00071, section 3.2), in part by the pair's
    number, as in the authors' code and in transformers.
    """
    frequency_M = rope.theta ** (-np.arange(0, width, 2) / width)
    match rope.scaling:
        case "linear":
            stretched_M = np.ones_like(frequency_M)
        case "wavelength":
            waves_M = rope.original_length * frequency_M / (2 * math.pi)  # in the original context
            low, high = rope.low_frequency_factor, rope.high_frequency_factor
            stretched_M = np.clip((high - waves_M) / (high - low), 0, 1)
        case "yarn":
            low, high = _yarn_borders(rope, width)
            stretched_M = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
        case _:
            stretched_M = np.zeros_like(frequency_M)
    return (frequency_M * (1 - stretched_M + stretched_M / rope.factor)).astype(np.float32)


def amplitude(rope: RopeConfig) -> float:
    """What sine and cosine are multiplied by: 1 without yarn; with it `rope.amplitude`, or 0.1 ln(factor) + 1 (2309.00071, section 3.4).

    Scores grow by its square, as queries and keys are both multiplied.
    """
    if rope.scaling != "yarn":
        return 1.0
    return rope.amplitude or 0.1 * math.log(max(rope.factor, 1.0)) + 1.0


def _yarn_borders(rope, width):
    """The pairs between which the stretch sets in: those that turn beta_fast and beta_slow times in the original context."""

    def pair(turns):
        return width * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return low, high if high != low else low + 0.001  # a step where the ramp has no length


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _rotate(x_BSHN, cos_BS1N, sin_BS1N, first, apart):
    """x cos + partner sin; from width `first` on, partners are `apart`, and sin is 0 for those that have none."""
    # The partner by rolls: halves cut out of x and joined again take XLA:CPU four times as long.
    N = x_BSHN.shape[-1]
    x32_BSHN = x_BSHN.astype(jnp.float32)
    partner_BSHN = jnp.roll(x32_BSHN, apart, axis=-1)
    if 2 * apart != N:
        leads_N = (np.arange(N) - first) // apart % 2 == 0
        partner_BSHN = jnp.where(leads_N, jnp.roll(x32_BSHN, -apart, axis=-1), partner_BSHN)
    return (x32_BSHN * cos_BS1N + partner_BSHN * sin_BS1N).astype(x_BSHN.dtype)


def _rotate_forward(x_BSHN, cos_BS1N, sin_BS1N, first, apart):
    return _rotate(x_BSHN, cos_BS1N, sin_BS1N, first, apart), (cos_BS1N, sin_BS1N)


def _rotate_back(first, apart, angles, g_BSHN):
    """The gradient of a rotation is the rotation back; the angles come from integers and take none."""
    cos_BS1N, sin_BS1N = angles
    return _rotate(g_BSHN, cos_BS1N, -sin_BS1N, first, apart), None, None


_rotate.defvjp(_rotate_forward, _rotate_back)
