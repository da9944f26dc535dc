"""A whole train state from one device to eight and back; `tests/faults/test_every_mesh_pair.py` has every pair and the losses."""

import itertools

import jax
import mesh_pairs
import numpy as np
import pytest

from moe_jax.train import run


def random_state(name):
    """Nothing is compiled for it."""
    config, mesh = mesh_pairs.layout(name)
    with jax.set_mesh(mesh):
        wanted = run.abstract_state(config, mesh)
    rng = np.random.default_rng(0)

    def draw(like):
        bits = rng.integers(0, 2**31 - 1, like.shape, np.int32)
        return jax.device_put(bits if like.dtype == np.int32 else rng.normal(size=like.shape).astype(like.dtype), like.sharding)

    return jax.tree.map(draw, wanted)


@pytest.mark.parametrize("pair", itertools.permutations(("1 device", "outer 2 expert 2 tensor 2")), ids=" to ".join)
def test_a_train_state_travels_between_the_corners(tmp_path, pair):
    before = random_state(pair[0])
    mesh_pairs.save(tmp_path, 3, before)
    after = mesh_pairs.restore(tmp_path, pair[1])
    assert len(jax.tree.leaves(after)[0].sharding.device_set) != len(jax.tree.leaves(before)[0].sharding.device_set)
    assert mesh_pairs.bits(after) == mesh_pairs.bits(before)
    assert any("bias_E" in name for name in mesh_pairs.bits(after))
    assert any("/mu/" in name for name in mesh_pairs.bits(after))


def test_the_layouts_differ_in_all_that_a_layout_is():
    meshes, accumulations, moes = zip(*mesh_pairs.LAYOUTS.values(), strict=True)
    assert {int(np.prod(mesh.shape)) for mesh in meshes} == {1, 2, 4, 8}
    assert all(max(sizes) > 1 for sizes in zip(*(mesh.shape for mesh in meshes), strict=True))
    assert set(accumulations) == {1, 2}
    assert {moe.get("exchange") for moe in moes} >= {"all_to_all", "ragged", "all_gather"}
