"""Experts whose weights are arrays of their own, run one at a time: a branch reads the weights of its expert and of no other.

Out of a stack [E, D, F] XLA:CPU copies the slice that a dot reads, so that a step of decoding moves each chosen expert's weights twice or
thrice; arrays of their own are read in place (docs/performance.md has the figures).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.varying import vary_over, varying_axes

SMALLEST_BLOCK = 16  # rows
Network = Callable[[jax.Array], jax.Array]


def touched_sum(x_TD: jax.Array, weight_TE: jax.Array, networks: Sequence[Network], axes: frozenset[str]) -> jax.Array:
    """The sum over experts of `weight_TE[:, e]` times network e's answer, float32 [T, D].

    A loop over the experts that any token has a weight for: each runs all T rows. What it reads grows with the number of distinct experts,
    on average E (1 - (1 - K/E)^T) for T tokens with K of E experts each, and never exceeds what all experts take.

    Args:
      x_TD: rows of which some may have no weight at all.
      weight_TE: float32, 0 for what is not chosen.
      networks: one an expert, from [R, D] to float32 [R, D].
      axes: mesh axes over which the networks' answers vary, inside `shard_map`.
    """
    hit_E = jnp.any(weight_TE != 0, axis=0)
    order_E = jnp.argsort(~hit_E, stable=True)
    axes = axes | varying_axes(x_TD, weight_TE)
    x_TD, order_E = vary_over(x_TD, axes), vary_over(order_E, axes)

    def add(i, y_TD):
        e = order_E[i]
        weight_T1 = lax.dynamic_index_in_dim(weight_TE, e, axis=1)
        return y_TD + jnp.where(weight_T1 != 0, weight_T1 * lax.switch(e, networks, x_TD), 0)

    zeros_TD = vary_over(jnp.zeros(x_TD.shape, jnp.float32), axes)
    return lax.fori_loop(0, jnp.sum(hit_E, dtype=jnp.int32), add, zeros_TD)


def grouped_rows(x_AD: jax.Array, group_sizes_E: jax.Array, networks: Sequence[Network], axes: frozenset[str]) -> jax.Array:
    """Network e's answers to the rows of group e, [A, D] in x's dtype; rows past the groups are zero.

    A loop over blocks of `block_rows` rows, each of one expert, whose last block reaches past its rows and is masked. One block size, as
    every one is E branches to compile. The arguments are as in `touched_sum`.
    """
    (num_rows, _), E = x_AD.shape, len(networks)
    rows = block_rows(num_rows, E)
    axes = axes | varying_axes(x_AD, group_sizes_E)
    x_AD, sizes_E = vary_over(x_AD, axes), vary_over(group_sizes_E, axes)
    ends_E, last_E = (
        jnp.cumsum(sizes_E),
        jnp.cumsum((sizes_E + rows - 1) // rows),
    )  # the end of an expert's rows, and of its blocks

    def block(b, y_AD):
        e = jnp.sum(last_E <= b, dtype=jnp.int32)
        first = ends_E[e] - sizes_E[e] + rows * (b - last_E[e] + (sizes_E[e] + rows - 1) // rows)
        at = jnp.minimum(first, num_rows - rows)
        row_R1 = at + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        y_RD = lax.switch(e, networks, lax.dynamic_slice_in_dim(x_AD, at, rows))
        y_RD = jnp.where((row_R1 >= first) & (row_R1 < ends_E[e]), y_RD, lax.dynamic_slice_in_dim(y_AD, at, rows))
        return lax.dynamic_update_slice_in_dim(y_AD, y_RD, at, axis=0)

    zeros_AD = vary_over(jnp.zeros(x_AD.shape, jnp.float32), axes)
    return lax.fori_loop(0, last_E[-1], block, zeros_AD).astype(x_AD.dtype)


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a block: half the mean group, so that a quarter of the rows are masked ones on average, of `SMALLEST_BLOCK` to 256."""
    return min(num_rows, max(SMALLEST_BLOCK, min(256, 1 << max(num_rows // num_experts // 2, 1).bit_length() - 1)))
