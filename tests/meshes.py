"""Meshes of emulated devices by the sizes of their axes."""

import math

import jax
from jax.sharding import AxisType

from moe_jax.mesh import AXES


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """The mesh with these axes, every other of size 1, over the first devices."""
    assert set(sizes) <= set(AXES), sizes
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)
