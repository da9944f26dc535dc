"""Numbers that say how well the experts share the work."""

import math

import jax
import jax.numpy as jnp


def max_violation(load_E: jax.Array) -> jax.Array:
    """MaxVio = max load / mean load - 1 over the last axis (2408.15664), float32; 0 is balance, E - 1 collapse.

    0 where nothing was routed. Compare with `noise_floor`: a perfectly fair random router does not reach 0.
    """
    load_E = load_E.astype(jnp.float32)
    mean = jnp.mean(load_E, -1)
    return jnp.where(mean > 0, jnp.max(load_E, -1) / jnp.where(mean > 0, mean, 1.0) - 1.0, 0.0)


def noise_floor(num_experts: int, assignments_per_expert):
    """About the MaxVio of uniform random routing: sqrt(2 ln E / n), the expected maximum of E normal deviations of 1 / sqrt(n).

    A measured MaxVio below it says nothing more about the router; 0.04 at 64 experts needs n >= 5200. n is a number or an array.
    """
    return (2.0 * math.log(num_experts) / assignments_per_expert) ** 0.5


def dead_experts(load_E: jax.Array) -> jax.Array:
    """Number of experts that got nothing, int32, over the last axis."""
    return jnp.sum(load_E == 0, -1, dtype=jnp.int32)


def mean_entropy(entropy_sum: jax.Array, num_tokens: jax.Array, num_experts: int) -> jax.Array:
    """Mean entropy of the router's probabilities over ln E: 1 is undecided, 0 is certain. One expert counts as 1.

    Args:
      entropy_sum: nats, summed over valid tokens (`RoutingSums.entropy_sum`).
      num_tokens: valid tokens.
    """
    if num_experts == 1:
        return jnp.ones_like(entropy_sum)
    return entropy_sum / jnp.maximum(num_tokens, 1) / math.log(num_experts)
