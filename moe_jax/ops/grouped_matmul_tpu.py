"""Grouped matrix product on TPUs: two Pallas kernels for Mosaic, and the visits to row tiles that they make.

After megablox (JAX's own grouped product, itself after MegaBlocks, 2211.15841), which cannot be used here: its `pallas_call` does not
say over which mesh axes the result varies, so it cannot be traced in a `shard_map` that checks them. Blocks of rows are aligned, so a
block that several groups share is visited once for each, one after another, while it stays in fast memory, and each visit writes its
own rows. The number of visits follows the true group sizes: it is computed on the device and bounds the kernel's grid.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Tiles(NamedTuple):
    """Block sizes along A, D and F: each is the axis' whole size or a multiple of 128, which need not divide it."""

    rows: int
    d_in: int
    d_out: int


def choose_tiles(rows: int, experts: int, d_in: int, d_out: int, dtype: jax.typing.DTypeLike) -> Tiles:
    """At most 512 rows, and at most 1024 (bfloat16) or 512 (float32) along D and F: under 13 of a core's 16 MiB of scoped fast memory.

    Fewer rows where groups are small on average, since every visit costs a whole block.
    """
    tile_rows = min(512, max(128, pl.next_power_of_2(pl.cdiv(rows, experts))))
    widest = 2048 // jnp.dtype(dtype).itemsize
    return Tiles(min(rows, tile_rows), _part(d_in, widest), _part(d_out, widest))


def _part(size, widest):
    """As few and as equal parts as blocks of at most `widest` allow, in multiples of 128."""
    parts = pl.cdiv(size, widest)
    return size if parts == 1 else pl.cdiv(pl.cdiv(size, parts), 128) * 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul_tpu(
    x_AD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, tiles: Tiles | None = None, interpret: bool = False
) -> jax.Array:
    """Rows of group e times `w_EDF[e]`, [A, F] in x's dtype, summed in float32; rows past the groups are zero.

    The arguments must vary over the same mesh axes (`moe_jax.ops.varying.vary_alike`). Use `moe_jax.ops.grouped_matmul`.

    Args:
      x_AD: float32 or bfloat16.
      w_EDF: of x's dtype.
      group_sizes_E: int32.
      tiles: None chooses from the shapes.
      interpret: runs the kernels as plain JAX operations on any platform, slowly.
    """
    return _rows_times_weights(x_AD, w_EDF, group_sizes_E, tiles, interpret, transposed=False)


def _forward(x_AD, w_EDF, group_sizes_E, tiles, interpret):
    return grouped_matmul_tpu(x_AD, w_EDF, group_sizes_E, tiles, interpret), (x_AD, w_EDF, group_sizes_E)


def _backward(tiles, interpret, residuals, g_AF):
    x_AD, w_EDF, group_sizes_E = residuals
    dx_AD = _rows_times_weights(g_AF, w_EDF, group_sizes_E, tiles, interpret, transposed=True)
    return dx_AD, _weight_gradient(x_AD, g_AF, group_sizes_E, tiles, interpret), None


grouped_matmul_tpu.defvjp(_forward, _backward)


def visits(group_sizes_E: jax.Array, num_rows: int, tile_rows: int, empty_groups: bool) -> tuple[jax.Array, ...]:
    """Which group works on which block of rows, in the order of both; the rows past the groups are one more group, number E.

    Args:
      group_sizes_E: int32.
      num_rows: of the arrays.
      tile_rows: of a block.
      empty_groups: whether an empty group makes one visit (it has a result to zero) or none.

    Returns:
      group and block of each visit, int32 [I] with I static; first row and end of each group, int32 [E + 1]; how many visits there
      are, an int32 scalar of at most I. Every block is visited.
    """
    sizes_G = jnp.append(group_sizes_E, num_rows - jnp.sum(group_sizes_E)).astype(jnp.int32)
    ends_G = jnp.cumsum(sizes_G)
    starts_G = ends_G - sizes_G
    num_blocks = pl.cdiv(num_rows, tile_rows)
    first_G = jnp.minimum(starts_G // tile_rows, num_blocks - 1)
    visits_G = jnp.where(sizes_G > 0, pl.cdiv(ends_G, tile_rows) - first_G, int(empty_groups))
    last_G = jnp.cumsum(visits_G)  # one past each group's last visit
    visit_I = jnp.arange(num_blocks + len(sizes_G))  # a group is empty, or shares at most its first block with those before it
    group_I = jnp.minimum(jnp.sum(visit_I[:, None] >= last_G, axis=1), len(group_sizes_E))
    block_I = jnp.minimum(first_G[group_I] + visit_I - (last_G - visits_G)[group_I], num_blocks - 1)
    return group_I.astype(jnp.int32), block_I.astype(jnp.int32), starts_G, ends_G, last_G[-1]


def _rows_times_weights(x_AD, w_EDF, group_sizes_E, tiles, interpret, transposed):
    """[A, D] by w[e], or by w[e]^T where `transposed` (then x is [A, F])."""
    num_rows, (num_experts, d_in, d_out) = x_AD.shape[0], w_EDF.shape
    tiles = tiles or choose_tiles(num_rows, num_experts, d_in, d_out, x_AD.dtype)
    num_terms, num_columns = (d_out, d_in) if transposed else (d_in, d_out)
    tile_terms, tile_columns = (tiles.d_out, tiles.d_in) if transposed else (tiles.d_in, tiles.d_out)
    *schedule, num_visits = visits(group_sizes_E, num_rows, tiles.rows, empty_groups=False)

    def x_block(c, i, k, group, block, starts, ends):
        return block[i], k

    def w_block(c, i, k, group, block, starts, ends):
        e = jnp.minimum(group[i], num_experts - 1)
        return (e, c, k) if transposed else (e, k, c)

    def y_block(c, i, k, group, block, starts, ends):
        return block[i], c

    return pl.pallas_call(
        functools.partial(_rows_kernel, num_experts=num_experts, num_terms=num_terms, transposed=transposed),
        out_shape=_varying_like(x_AD, (num_rows, num_columns)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(pl.cdiv(num_columns, tile_columns), num_visits, pl.cdiv(num_terms, tile_terms)),
            in_specs=[
                pl.BlockSpec((tiles.rows, tile_terms), x_block),
                pl.BlockSpec((None, tiles.d_in, tiles.d_out), w_block),
            ],
            out_specs=pl.BlockSpec((tiles.rows, tile_columns), y_block),
            scratch_shapes=[pltpu.VMEM((tiles.rows, tile_columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(*schedule, x_AD, w_EDF)


def _rows_kernel(group_ref, block_ref, start_ref, end_ref, x_ref, w_ref, y_ref, sum_ref, *, num_experts, num_terms, transposed):
    """One visit: the block's own rows of y, a sum over the grid's last axis."""
    i, k = pl.program_id(1), pl.program_id(2)
    group = group_ref[i]

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(group < num_experts)  # rows past the groups stay zero
    def _():
        x_axis, w_axis = 1, 1 if transposed else 0
        first = k * x_ref.shape[x_axis]
        x, w = _first_terms(x_ref, x_axis, first, num_terms), _first_terms(w_ref, w_axis, first, num_terms)
        sum_ref[...] += _dot(x, w, contract=(x_axis, w_axis))

    @pl.when(k == pl.num_programs(2) - 1)
    def _():  # the other rows of the block belong to visits before and after, while it stays in fast memory
        own_RF = _own_rows(y_ref.shape, block_ref[i], start_ref[group], end_ref[group])
        y_ref[...] = lax.select(own_RF, sum_ref[...], y_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def _weight_gradient(x_AD, g_AF, group_sizes_E, tiles, interpret):
    """dw[e] = x_e^T g_e, [E, D, F] in x's dtype, summed in float32; zero for an empty group."""
    (num_rows, d_in), d_out, num_experts = x_AD.shape, g_AF.shape[1], len(group_sizes_E)
    tiles = tiles or choose_tiles(num_rows, num_experts, d_in, d_out, x_AD.dtype)
    *schedule, _ = visits(group_sizes_E, num_rows, tiles.rows, empty_groups=True)
    num_visits = jnp.sum(schedule[0] < num_experts)  # the rows past the groups, at the end, have no gradient

    def x_block(d, f, i, group, block, starts, ends):
        return block[i], d

    def g_block(d, f, i, group, block, starts, ends):
        return block[i], f

    def dw_block(d, f, i, group, block, starts, ends):
        return group[i], d, f

    return pl.pallas_call(
        _weight_gradient_kernel,
        out_shape=_varying_like(x_AD, (num_experts, d_in, d_out)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(pl.cdiv(d_in, tiles.d_in), pl.cdiv(d_out, tiles.d_out), num_visits),
            in_specs=[pl.BlockSpec((tiles.rows, tiles.d_in), x_block), pl.BlockSpec((tiles.rows, tiles.d_out), g_block)],
            out_specs=pl.BlockSpec((None, tiles.d_in, tiles.d_out), dw_block),
            scratch_shapes=[pltpu.VMEM((tiles.d_in, tiles.d_out), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul_weight_gradient",
    )(*schedule, x_AD, g_AF)


def _weight_gradient_kernel(group_ref, block_ref, start_ref, end_ref, x_ref, g_ref, dw_ref, sum_ref):
    """One visit: adds the products of the block's own rows to the expert's sum, and writes it after the expert's last visit."""
    i, num_visits = pl.program_id(2), pl.num_programs(2)
    group = group_ref[i]

    @pl.when((i == 0) | (group_ref[jnp.maximum(i - 1, 0)] != group))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(start_ref[group] < end_ref[group])
    def _():  # both are masked: what other rows hold may be infinite
        own = functools.partial(_own_rows, block=block_ref[i], start=start_ref[group], end=end_ref[group])
        x_RD = jnp.where(own(x_ref.shape), x_ref[...], 0)
        g_RF = jnp.where(own(g_ref.shape), g_ref[...], 0)
        sum_ref[...] += _dot(x_RD, g_RF, contract=(0, 0))

    @pl.when((i == num_visits - 1) | (group_ref[jnp.minimum(i + 1, num_visits - 1)] != group))
    def _():
        dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def _first_terms(ref, axis, first, num_terms):
    """The block, which holds terms from `first` on along `axis`, with zeros for those past the array's end."""
    if num_terms % ref.shape[axis] == 0:
        return ref[...]
    return jnp.where(first + lax.broadcasted_iota(jnp.int32, ref.shape, axis) < num_terms, ref[...], 0)


def _own_rows(shape, block, start, end):
    row = block * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= start) & (row < end)


def _dot(a, b, contract):
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else the matrix unit rounds float32 to bfloat16
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _varying_like(x, shape):
    return jax.ShapeDtypeStruct(shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
