"""Grouped matrix product on NVIDIA GPUs: two Pallas kernels for the Triton backend, and the row tiles that they walk.

As in MegaBlocks (2211.15841), the work follows the true group sizes: every tile of rows belongs to one group, so one program multiplies
it by one matrix, and neither rows nor matrices are copied, padded or transposed in memory. Group sizes are known only on the device,
so the number of programs is the most that any sizes can need, and the programs left over store nothing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BAND = 8  # row tiles that run side by side for each tile of columns, so that both operands are met again in the L2 cache


class Tiles(NamedTuple):
    """Block shapes of one product, powers of two of at least 16, and how Triton is to compile it.

    Of `x w`: rows of x, columns of w, and terms of the sum taken at once. Of the gradient of w: its rows, its columns, and rows of x.
    """

    rows: int
    columns: int
    terms: int
    num_warps: int
    num_stages: int


def choose_tiles(rows: int, columns: int, terms: int, dtype: jax.typing.DTypeLike) -> Tiles:
    """Tiles for a product whose result is [rows, columns] (of a group's mean size, say), each a sum of `terms`.

    128 x 128 x 64 for bfloat16 on tensor cores: 96 KiB of shared memory in three stages, within an A100's 163 and an H100's 227 KiB.
    Compiled for an H100 the three products use the tensor cores' wgmma, under 100 registers a thread and no spills; the tiles were
    chosen for these limits, not timed. float32 is multiplied as float32, not TF32, on the ordinary cores, with smaller tiles.
    """
    most = (128, 128, 64) if dtype == jnp.bfloat16 else (64, 64, 32)
    fitted = (min(limit, max(16, pl.next_power_of_2(size))) for limit, size in zip(most, (rows, columns, terms), strict=True))
    tile_rows, tile_columns, tile_terms = fitted
    return Tiles(tile_rows, tile_columns, tile_terms, num_warps=8 if tile_rows * tile_columns >= 128 * 128 else 4, num_stages=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul_gpu(
    x_AD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, tiles: Tiles | None = None, interpret: bool = False
) -> jax.Array:
    """Rows of group e times `w_EDF[e]`, [A, F] in x's dtype, summed in float32; rows past the groups are zero.

    The arguments must vary over the same mesh axes (`moe_jax.ops.varying.vary_alike`). Use `moe_jax.ops.grouped_matmul`.

    Args:
      x_AD: float32 or bfloat16.
      w_EDF: of x's dtype.
      group_sizes_E: int32.
      tiles: for all three products; None chooses for each from its shape.
      interpret: runs the kernels as plain JAX operations on any platform, slowly.
    """
    return _rows_times_weights(x_AD, w_EDF, group_sizes_E, tiles, interpret, transposed=False)


def _forward(x_AD, w_EDF, group_sizes_E, tiles, interpret):
    return grouped_matmul_gpu(x_AD, w_EDF, group_sizes_E, tiles, interpret), (x_AD, w_EDF, group_sizes_E)


def _backward(tiles, interpret, residuals, g_AF):
    x_AD, w_EDF, group_sizes_E = residuals
    dx_AD = _rows_times_weights(g_AF, w_EDF, group_sizes_E, tiles, interpret, transposed=True)
    return dx_AD, _weight_gradient(x_AD, g_AF, group_sizes_E, tiles, interpret), None


grouped_matmul_gpu.defvjp(_forward, _backward)


def row_tiles(group_sizes_E: jax.Array, num_rows: int, tile_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts the rows into tiles that each lie within one group; the rows past the groups are one more group, number E.

    Returns:
      group, first row and end of the group of each tile, int32 [I]. A tile has rows [first, min(first + tile_rows, end)). I is static:
      the most tiles that any sizes need, in whole bands; those not needed are of group E and begin past its end.
    """
    sizes_G = jnp.append(group_sizes_E, num_rows - jnp.sum(group_sizes_E))
    ends_G = jnp.cumsum(sizes_G)
    tiles_G = pl.cdiv(sizes_G, tile_rows)
    last_G = jnp.cumsum(tiles_G)  # one past each group's last tile
    most_tiles = (num_rows + len(sizes_G) * (tile_rows - 1)) // tile_rows
    tile_I = jnp.arange(pl.cdiv(most_tiles, BAND) * BAND)
    group_I = jnp.minimum(jnp.sum(tile_I[:, None] >= last_G, axis=1), len(group_sizes_E))
    first_I = (ends_G - sizes_G)[group_I] + (tile_I - (last_G - tiles_G)[group_I]) * tile_rows
    return group_I.astype(jnp.int32), first_I.astype(jnp.int32), ends_G[group_I].astype(jnp.int32)


def _rows_times_weights(x_AD, w_EDF, group_sizes_E, tiles, interpret, transposed):
    """[A, D] by w[e], or by w[e]^T where `transposed` (then D is w's last axis)."""
    num_rows, num_terms = x_AD.shape
    num_columns = w_EDF.shape[1 if transposed else 2]
    tiles = tiles or choose_tiles(pl.cdiv(num_rows, len(w_EDF)), num_columns, num_terms, x_AD.dtype)
    schedule = row_tiles(group_sizes_E, num_rows, tiles.rows)
    kernel = functools.partial(_rows_kernel, tiles=tiles, transposed=transposed)
    return pl.pallas_call(
        kernel,
        out_shape=_varying_like(x_AD, (num_rows, num_columns)),
        grid=(BAND, pl.cdiv(num_columns, tiles.columns), len(schedule[0]) // BAND),  # the first axis runs fastest
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(*schedule, x_AD, w_EDF)


def _rows_kernel(group_ref, first_ref, end_ref, x_ref, w_ref, y_ref, *, tiles, transposed):
    """One tile of rows times one tile of columns of its group's matrix."""
    tile = pl.program_id(2) * BAND + pl.program_id(0)
    column = pl.program_id(1) * tiles.columns
    num_experts, num_terms, num_columns = len(w_ref), x_ref.shape[1], y_ref.shape[1]
    group, first, end = group_ref[tile], first_ref[tile], end_ref[tile]
    own_R = first + lax.iota(jnp.int32, tiles.rows) < end
    in_C = _inside(column, tiles.columns, num_columns)
    expert = jnp.minimum(group, num_experts - 1)

    def step(k, y_RC):
        term = k * tiles.terms
        in_K = _inside(term, tiles.terms, num_terms)
        x_RK = _load(x_ref.at[pl.ds(first, tiles.rows), pl.ds(term, tiles.terms)], own_R, in_K)
        if transposed:
            w_CK = _load(w_ref.at[expert, pl.ds(column, tiles.columns), pl.ds(term, tiles.terms)], in_C, in_K)
            return y_RC + _dot(x_RK, w_CK, contract=(1, 1))
        w_KC = _load(w_ref.at[expert, pl.ds(term, tiles.terms), pl.ds(column, tiles.columns)], in_K, in_C)
        return y_RC + _dot(x_RK, w_KC, contract=(1, 0))

    steps = pl.cdiv(num_terms, tiles.terms) * (group < num_experts).astype(jnp.int32)  # none for rows past the groups
    y_RC = lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
    _store(y_ref.at[pl.ds(first, tiles.rows), pl.ds(column, tiles.columns)], y_RC, own_R, in_C)


def _weight_gradient(x_AD, g_AF, group_sizes_E, tiles, interpret):
    """dw[e] = x_e^T g_e, [E, D, F] in x's dtype, summed in float32; zero for an empty group."""
    num_rows, d_in = x_AD.shape
    d_out = g_AF.shape[1]
    tiles = tiles or choose_tiles(d_in, d_out, pl.cdiv(num_rows, len(group_sizes_E)), x_AD.dtype)
    ends_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    return pl.pallas_call(
        functools.partial(_weight_gradient_kernel, tiles=tiles),
        out_shape=_varying_like(x_AD, (len(group_sizes_E), d_in, d_out)),
        grid=(pl.cdiv(d_in, tiles.rows), pl.cdiv(d_out, tiles.columns), len(group_sizes_E)),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="grouped_matmul_weight_gradient",
    )(ends_E - group_sizes_E, ends_E, x_AD, g_AF)


def _weight_gradient_kernel(start_ref, end_ref, x_ref, g_ref, dw_ref, *, tiles):
    """One tile of one expert's gradient: a sum over the expert's rows."""
    row, column, expert = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.columns, pl.program_id(2)
    start, end = start_ref[expert], end_ref[expert]
    in_R = _inside(row, tiles.rows, x_ref.shape[1])
    in_C = _inside(column, tiles.columns, g_ref.shape[1])

    def step(k, dw_RC):
        first = start + k * tiles.terms
        own_K = first + lax.iota(jnp.int32, tiles.terms) < end
        x_KR = _load(x_ref.at[pl.ds(first, tiles.terms), pl.ds(row, tiles.rows)], own_K, in_R)
        g_KC = _load(g_ref.at[pl.ds(first, tiles.terms), pl.ds(column, tiles.columns)], own_K, in_C)
        return dw_RC + _dot(x_KR, g_KC, contract=(0, 0))

    dw_RC = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    dw_RC = lax.fori_loop(0, pl.cdiv(end - start, tiles.terms), step, dw_RC)
    _store(dw_ref.at[expert, pl.ds(row, tiles.rows), pl.ds(column, tiles.columns)], dw_RC, in_R, in_C)


def _inside(start, block, size):
    """Which of `block` places from `start` on lie within an axis of this size; None where all blocks do."""
    return None if size % block == 0 else start + lax.iota(jnp.int32, block) < size


def _mask(in_rows, in_columns):
    parts = [in_rows[:, None]] if in_rows is not None else []
    parts += [in_columns[None, :]] if in_columns is not None else []
    return functools.reduce(lax.bitwise_and, jnp.broadcast_arrays(*parts)) if parts else None


def _load(ref, in_rows, in_columns):
    """The block, with zeros (whatever memory holds there) outside of the masked rows and columns."""
    mask = _mask(in_rows, in_columns)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0.0)


def _store(ref, block, in_rows, in_columns):
    plgpu.store(ref, block.astype(ref.dtype), mask=_mask(in_rows, in_columns))


def _dot(a, b, contract):
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _varying_like(x, shape):
    return jax.ShapeDtypeStruct(shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
