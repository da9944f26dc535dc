"""Numbers that are not finite: a step that has them is not taken, and a state that has them is not saved."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.train.paths import leaf_names
from moe_jax.train.state import TrainState


def take_or_skip(old: TrainState, new: TrainState, metrics: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    """`new` where the step's loss and gradient norm are finite, else `old` with the step of `new`. Within jit.

    A skipped step is a step of the run: the data and the key of the noise go on. It is no update: parameters, routers and the
    optimizer are as before to the bit, the count that the learning rate and Adam's bias correction go by included.

    Args:
      old, new: the states before and after the step.
      metrics: of the step, with `train/loss` and `train/gradient_norm`.

    Returns: the state, and the metrics with `train/skipped`, int32, 1 where the step was skipped. The other figures of a skipped
      step are those that it would have had.
    """
    finite = jnp.isfinite(metrics["train/loss"]) & jnp.isfinite(metrics["train/gradient_norm"])
    state = jax.tree.map(lambda a, b: jax.lax.select(finite, a, b), new, old)
    return state.replace(step=new.step), metrics | {"train/skipped": 1 - finite.astype(jnp.int32)}


def not_finite(state: Any) -> list[str]:
    """Names of the floating-point arrays in a tree that hold a number that is not finite; every process gets the same answer."""
    leaves = {
        name: leaf
        for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    if not leaves:
        return []
    return [name for name, finite in zip(leaves, np.asarray(_finite(list(leaves.values()))), strict=True) if not finite]


@jax.jit
def _finite(leaves):
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
