import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from topology import described_mesh

from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.grouped_matmul_gpu import BAND, Tiles, choose_tiles, row_tiles


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("sizes", [(5, 0, 64, 31), (0, 0, 100), (100, 0), (0,), (1, 1, 1, 1, 1, 16, 17)])
def test_row_tiles_cover_every_row_once_and_lie_within_one_group(sizes, tile_rows):
    num_rows = 100
    group, first, end = (np.asarray(a) for a in row_tiles(jnp.asarray(sizes, jnp.int32), num_rows, tile_rows))
    assert len(group) % BAND == 0
    group_of_row = np.repeat(np.arange(len(sizes) + 1), (*sizes, num_rows - sum(sizes)))
    covered = np.zeros(num_rows, int)
    for g, f, e in zip(group, first, end, strict=True):
        own = np.arange(f, max(f, min(f + tile_rows, e)))
        covered[own] += 1
        assert set(group_of_row[own]) <= {g}
    assert np.all(covered == 1)


def test_tiles_are_128_x_128_x_64_where_shapes_allow_and_always_powers_of_two():
    assert choose_tiles(4096, 14336, 4096, jnp.bfloat16) == Tiles(128, 128, 64, num_warps=8, num_stages=3)
    assert choose_tiles(3, 72, 20, jnp.bfloat16) == Tiles(16, 128, 32, num_warps=4, num_stages=3)
    assert choose_tiles(4096, 14336, 4096, jnp.float32) == Tiles(64, 64, 32, num_warps=4, num_stages=3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_cuda_inside_shard_map_as_three_triton_kernels_and_no_dense_product(dtype):
    """X varies over data, w over tensor, neither over what the other does; no GPU and no CUDA library is there."""
    mesh = described_mesh("NVIDIA H100 80GB HBM3", "cuda", data=2, tensor=2)
    specs = P("data", None), P(None, None, "tensor"), P("data"), P("data", "tensor")
    shapes = (512, 100), (4, 100, 384), (8,), (512, 384)

    def values_and_gradients(x, w, sizes, g):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, *pullback(g)

    with jax.sharding.use_abstract_mesh(mesh):
        island = jax.shard_map(values_and_gradients, in_specs=specs, out_specs=(specs[3], specs[0], specs[1]))
        arguments = [
            jax.ShapeDtypeStruct(shape, "int32" if len(shape) == 1 else dtype, sharding=NamedSharding(mesh, spec))
            for shape, spec in zip(shapes, specs, strict=True)
        ]
        text = jax.jit(island).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton\(", text)) == 3
    assert "stablehlo.dot" not in text
    assert not re.findall(r"stablehlo\.transpose.*tensor<4x", text), "a transposed copy of w"
