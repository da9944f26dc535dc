import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topology as topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from topology import described_mesh

from moe_jax.ops.grouped_matmul import grouped_matmul
from moe_jax.ops.grouped_matmul_tpu import Tiles, choose_tiles, visits


@pytest.mark.parametrize("empty_groups", [False, True])
@pytest.mark.parametrize("tile_rows", [16, 100])
@pytest.mark.parametrize("sizes", [(5, 0, 64, 31), (0, 0, 100), (100, 0), (0,), (1, 1, 1, 1, 1, 16, 17), (16, 0, 32)])
def test_every_group_visits_its_blocks_once_and_in_order(sizes, tile_rows, empty_groups):
    num_rows = 100
    group, block, start, end, count = (
        np.asarray(a) for a in visits(jnp.asarray(sizes, jnp.int32), num_rows, tile_rows, empty_groups)
    )
    assert count <= len(group)
    actual = list(zip(group[:count].tolist(), block[:count].tolist(), strict=True))
    expected = []
    first = 0
    for g, size in enumerate((*sizes, num_rows - sum(sizes))):
        assert (start[g], end[g]) == (first, first + size)
        own = sorted({row // tile_rows for row in range(first, first + size)})
        expected += [(g, b) for b in own]
        if not own and empty_groups:
            expected.append((g, min(first // tile_rows, (num_rows - 1) // tile_rows)))
        first += size
    assert actual == expected
    assert {b for _, b in actual} == set(range(-(-num_rows // tile_rows)))
    assert np.all((block >= 0) & (block <= (num_rows - 1) // tile_rows))  # past the count too: a block to fetch must exist


def test_tiles_are_parts_of_nearly_equal_size():
    assert choose_tiles(65536, 8, 4096, 14336, jnp.bfloat16) == Tiles(512, 1024, 1024)
    assert choose_tiles(4096, 64, 2880, 1408, jnp.bfloat16) == Tiles(128, 1024, 768)
    assert choose_tiles(4096, 8, 4096, 1408, jnp.float32) == Tiles(512, 512, 512)
    assert choose_tiles(50, 8, 40, 72, jnp.float32) == Tiles(50, 40, 72)


def _lower(mesh, dtype):
    """Values and gradients inside `shard_map`: x varies over data, w over tensor, neither over what the other does."""
    specs = P("data", None), P(None, None, "tensor"), P("data"), P("data", "tensor")
    shapes = (520, 1288), (4, 1288, 400), (8,), (520, 400)  # partial blocks of rows, and a partial last sum over D

    def values_and_gradients(x, w, sizes, g):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, *pullback(g)

    island = jax.shard_map(values_and_gradients, in_specs=specs, out_specs=(specs[3], specs[0], specs[1]))
    arguments = [
        jax.ShapeDtypeStruct(shape, "int32" if len(shape) == 1 else dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(island).trace(*arguments).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lowers_for_tpu_inside_shard_map_as_three_kernels_and_no_dense_product(dtype):
    mesh = described_mesh("TPU v5", "tpu", data=2, tensor=2)
    with jax.sharding.use_abstract_mesh(mesh):
        text = _lower(mesh, dtype).as_text()
    assert text.count("custom_call @tpu_custom_call(") == 3
    assert "stablehlo.dot" not in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_a_real_tpu(topology, dtype):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=topologies.devices(topology))
    with jax.set_mesh(mesh):
        compiled = _lower(mesh, dtype).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not re.findall(r" (?:dot|convolution)\(", text)
