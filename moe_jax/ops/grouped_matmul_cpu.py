"""Grouped matrix product as dense products of row blocks: plain JAX, right on every platform, fast on CPU.

A loop over experts holds a loop over the expert's blocks of rows, with a trip count that the group's size decides, so the work follows
the true sizes. Each expert takes as many of the largest blocks as fit whole, and before them one that is hardly larger than what they
leave: it may reach past those rows, and is masked. The result is a carried buffer that XLA updates in place.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.varying import vary_over, varying_axes

STEPS, LARGEST = (16, 64), 512  # rows: bounds of the steps between block sizes, and of the sizes; analysis/bench_moe.py


def block_sizes(rows: int, experts: int) -> tuple[int, ...]:
    """Block sizes for `rows` rows over `experts` experts, largest first.

    They go up to twice the mean group, to half of all rows and to `LARGEST`, in steps of an eighth of the mean group at first, so
    that the masked rows of a block cost little, and of two eighths after eight of them. Each size is code to compile: 12 at most.
    """
    step = min(max(rows // experts // 8 // STEPS[0] * STEPS[0], STEPS[0]), STEPS[1])
    largest = min(LARGEST, 16 * step, max(rows // 2, step))
    sizes = (*range(step, 8 * step + 1, step), *range(10 * step, 16 * step + 1, 2 * step))
    return tuple(sorted({min(size, rows) for size in sizes if size <= largest}, reverse=True))


@jax.custom_vjp
def grouped_matmul_cpu(x_AD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Rows of group e times `w_EDF[e]`, [A, F] in x's dtype, summed in float32; rows past the groups are zero.

    The arguments must vary over the same mesh axes (`moe_jax.ops.varying.vary_alike`). Use `moe_jax.ops.grouped_matmul`.
    """
    return _rows_times_weights(x_AD, w_EDF, group_sizes_E, contract=1)


def _forward(x_AD, w_EDF, group_sizes_E):
    return grouped_matmul_cpu(x_AD, w_EDF, group_sizes_E), (x_AD, w_EDF, group_sizes_E)


def _backward(residuals, g_AF):
    x_AD, w_EDF, group_sizes_E = residuals
    dx_AD = _rows_times_weights(g_AF, w_EDF, group_sizes_E, contract=2).astype(x_AD.dtype)
    return dx_AD, _weight_gradient(x_AD, g_AF, group_sizes_E).astype(w_EDF.dtype), None


grouped_matmul_cpu.defvjp(_forward, _backward)


def _rows_times_weights(x_AD, w_EDF, group_sizes_E, contract):
    """[A, D] by w[e] over its axis `contract` (of E, D, F): x w[e] for 1; g w[e]^T, without a transposed copy, for 2."""
    ends_E = jnp.cumsum(group_sizes_E)
    dims = (((1,), (contract - 1,)), ((), ()))

    def expert(e, y_AF):
        w_DF = lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)

        def block(y_AF, rows, at, own_R1):
            y_RF = lax.dot_general(lax.dynamic_slice_in_dim(x_AD, at, rows), w_DF, dims, preferred_element_type=jnp.float32)
            if own_R1 is not None:  # other rows in this block keep what they have
                y_RF = jnp.where(own_R1, y_RF, lax.dynamic_slice_in_dim(y_AF, at, rows))
            return lax.dynamic_update_slice_in_dim(y_AF, y_RF, at, axis=0)

        return for_each_block(block, y_AF, ends_E[e] - group_sizes_E[e], ends_E[e], x_AD.shape[0], len(w_EDF))

    # The carry is float32 whatever the dtype: XLA:CPU converts a whole bfloat16 buffer back and forth at every update.
    y_AF = jnp.zeros((x_AD.shape[0], w_EDF.shape[3 - contract]), jnp.float32)
    y_AF = lax.fori_loop(0, len(w_EDF), expert, vary_over(y_AF, varying_axes(x_AD, w_EDF, group_sizes_E)))
    return y_AF.astype(x_AD.dtype)


def _weight_gradient(x_AD, g_AF, group_sizes_E):
    """dw[e] = x_e^T g_e in float32, [E, D, F]; zero for an empty group."""
    ends_E = jnp.cumsum(group_sizes_E)
    axes = varying_axes(x_AD, g_AF, group_sizes_E)
    shape_DF = (x_AD.shape[1], g_AF.shape[1])

    def expert(e, dw_EDF):
        def block(dw_DF, rows, at, own_R1):
            x_RD, g_RF = (lax.dynamic_slice_in_dim(a, at, rows) for a in (x_AD, g_AF))
            if own_R1 is not None:
                x_RD, g_RF = jnp.where(own_R1, x_RD, 0), jnp.where(own_R1, g_RF, 0)
            dims = (((0,), (0,)), ((), ()))
            return dw_DF + lax.dot_general(x_RD, g_RF, dims, preferred_element_type=jnp.float32)

        dw_DF = vary_over(jnp.zeros(shape_DF, jnp.float32), axes)
        start, end = ends_E[e] - group_sizes_E[e], ends_E[e]
        dw_DF = for_each_block(block, dw_DF, start, end, x_AD.shape[0], len(group_sizes_E))
        return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, e, axis=0)

    dw_EDF = vary_over(jnp.zeros((len(group_sizes_E), *shape_DF), jnp.float32), axes)
    return lax.fori_loop(0, len(group_sizes_E), expert, dw_EDF)


def for_each_block(block, carry, start, end, num_rows, num_experts):
    """Covers rows [start, end) once with `carry = block(carry, rows, at, own_R1)`: the block is the static number `rows` from `at`.

    `own_R1` (bool) says which of its rows are to be covered; None: all of them. First comes the one block that has it, with the rows
    that fill no largest block, and only if the group is empty there is none; then as many of the largest as there are.
    """
    sizes = block_sizes(num_rows, num_experts)
    rest = jnp.where(end > start, (end - start - 1) % sizes[0] + 1, 0)

    def masked(rows, j, carry):
        # `first` must depend on j, though it is always 0: what does not, XLA moves out of the loop and runs every time.
        first = start + j * rows
        at = jnp.minimum(first, num_rows - rows)
        row_R1 = at + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        return block(carry, rows, at, (row_R1 >= first) & (row_R1 < start + rest))

    for rows, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
        carry = lax.fori_loop(0, jnp.where((rest > smaller) & (rest <= rows), 1, 0), partial(masked, rows), carry)
    whole = (end - start - rest) // sizes[0]
    return lax.fori_loop(0, whole, lambda j, carry: block(carry, sizes[0], start + rest + j * sizes[0], None), carry)
