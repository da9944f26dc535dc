"""Balancing without a loss: after each optimizer step the bias of every expert moves against its load error (2408.15664)."""

import jax
import jax.numpy as jnp

RULES = ("sign", "proportional", "none")


def update_bias(bias_LE: jax.Array, load_LE: jax.Array, rule: str, speed: float) -> jax.Array:
    """The bias of the next step.

    "sign": b += speed * sign(mean - load), Algorithm 1 of 2408.15664 and DeepSeek-V3 (speed 0.001).
    "proportional": b += speed * (mean - load) / mean. The error is relative; the paper's own proportional variant multiplies
    the raw error in tokens, so that its speed depends on the size of the batch and does not carry over.
    "none": b stays.

    The comparison is exact for every int32 load: mean = whole + part / E in integers, never a rounded float.

    Args:
      bias_LE: float32 [..., E].
      load_LE: int [..., E], assignments of the whole optimizer step, summed over devices and microbatches. Rows of all zeros
        leave their bias as it is.
      rule: one of `RULES`.
      speed: step of the bias, in units of affinity.

    Raises:
      ValueError: loads that are not integers (counts in a float lose the sign of small errors), a bias that is not float32
        (bfloat16 swallows steps of 0.001), or an unknown rule.
    """
    if not jnp.issubdtype(load_LE.dtype, jnp.integer):
        raise ValueError(f"load_LE has dtype {load_LE.dtype}; give the int32 counts, a rounded count flips signs.")
    if bias_LE.dtype != jnp.float32:
        raise ValueError(f"bias_LE has dtype {bias_LE.dtype}; keep it in float32, steps of {speed} get lost otherwise.")
    if rule not in RULES:
        raise ValueError(f"rule = {rule!r} is unknown; choose one of {', '.join(RULES)}.")
    if rule == "none":
        return bias_LE
    whole, part, num_experts = _mean(load_LE)
    below = whole - load_LE  # mean - load without the part / E in [0, 1)
    if rule == "sign":
        step_LE = jnp.where(below == 0, jnp.sign(part), jnp.sign(below)).astype(jnp.float32)
    else:
        fraction = part.astype(jnp.float32) / num_experts
        mean = whole.astype(jnp.float32) + fraction
        step_LE = (below.astype(jnp.float32) + fraction) / jnp.where(mean > 0, mean, 1.0)
    return bias_LE + speed * step_LE


def _mean(load_LE):
    """Mean load as (whole, part, E) with mean = whole + part / E; no sum here is larger than the largest load or E * E."""
    num_experts = load_LE.shape[-1]
    part = jnp.sum(load_LE % num_experts, -1, keepdims=True)
    whole = jnp.sum(load_LE // num_experts, -1, keepdims=True) + part // num_experts
    return whole, part % num_experts, num_experts
