"""The oracle: dispatch and combine as one-hot tensors [T, E, C] (GShard, 2006.16668, algorithm 1; Switch, 2101.03961, app. F).

Simple, obviously right, and quadratic in the tokens: what the sorted strategies are tested against. Who claims a row first is
found by comparing every pair of assignments, so that not even the sort is shared with `dispatch/capacity.py`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.dispatch.contract import ExpertFn, Stats, make_stats
from moe_jax.routing.contract import Routing


@dataclass(frozen=True)
class EinsumDispatch:
    """One-hot dispatch.

    Attributes:
      capacity: C, rows an expert's buffer holds; None for a row for every token, which drops nothing.
      out_dtype: dtype of y; None for x's.
    """

    capacity: int | None = None
    out_dtype: DTypeLike | None = None

    def __call__(
        self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn, keys: tuple[jax.Array, ...] = ()
    ) -> tuple[jax.Array, Stats]:
        num_tokens, num_experts = x_TD.shape[0], routing.num_experts
        place_A = _places(routing.expert_A, keys)
        capacity = self.capacity or num_tokens
        index = (routing.token_A, routing.expert_A, place_A)  # out of range, hence dropped: expert E, place C and more
        shape = (num_tokens, num_experts, capacity)
        dispatch_TEC = jnp.zeros(shape, x_TD.dtype).at[index].set(1, mode="drop")
        combine_TEC = jnp.zeros(shape, jnp.float32).at[index].add(routing.weight_A, mode="drop")
        highest = jax.lax.Precision.HIGHEST
        with jax.named_scope("dispatch"):
            x_ECD = jnp.einsum("TEC,TD->ECD", dispatch_TEC, x_TD, precision=highest)
        y_ECD = expert_fn(x_ECD)
        with jax.named_scope("combine"):
            y_TD = jnp.einsum("TEC,ECD->TD", combine_TEC, y_ECD.astype(jnp.float32), precision=highest)
        dropped = jnp.sum((routing.expert_A < num_experts) & (place_A >= capacity), dtype=jnp.int32)
        return y_TD.astype(self.out_dtype or x_TD.dtype), make_stats(routing, dropped_capacity=dropped)


def _places(expert_A: jax.Array, keys: tuple[jax.Array, ...]) -> jax.Array:
    """For each assignment, how many of the same expert come before it by `keys`, ties by place in the list."""
    order = (*keys, jnp.arange(expert_A.shape[0]))
    before_AA = jnp.zeros(expert_A.shape * 2, bool)
    for key_A in reversed(order):
        before_AA = (key_A[None, :] < key_A[:, None]) | ((key_A[None, :] == key_A[:, None]) & before_AA)
    return jnp.sum(before_AA & (expert_A[None, :] == expert_A[:, None]), axis=1, dtype=jnp.int32)
