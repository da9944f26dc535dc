"""Sorting assignments by expert."""

import jax
import jax.numpy as jnp

from moe_jax.ops.varying import vary_alike


def sort_by_expert(expert_A: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts assignments by expert, those of one expert in their order in the list (stable).

    Args:
      expert_A: int32 in [0, E]; E means nowhere: such assignments come last and are not in the sizes.
      num_experts: E.

    Returns:
      order_A: row i of the sorted list is assignment `order_A[i]`.
      inverse_A: assignment a is row `inverse_A[a]` of the sorted list.
      sizes_E: int32, rows of each expert.
    """
    num_rows = expert_A.shape[0]
    row_A = jnp.arange(num_rows, dtype=jnp.int32)
    if (num_experts + 1) * num_rows <= 2**31:  # one integer holds expert and place: 3x faster than a stable argsort on CPU
        order_A = jax.lax.sort(expert_A.astype(jnp.int32) * num_rows + row_A, is_stable=False) % num_rows
    else:
        order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    (zero_A,) = vary_alike(jnp.zeros_like(order_A))
    inverse_A = zero_A.at[order_A].set(row_A, unique_indices=True, mode="promise_in_bounds")
    sizes_E = jnp.bincount(expert_A, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return order_A, inverse_A, sizes_E
