"""Eight meshes of one, two, four and eight devices, and a checkpoint's way from one to another."""

import dataclasses
import pathlib

import jax
import numpy as np
import tiny

from moe_jax.config import Config, MeshConfig
from moe_jax.mesh import make_mesh
from moe_jax.train import run
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.paths import leaf_names
from moe_jax.train.state import TrainState

# the mesh, accumulation, and how tokens travel: none of it is in a checkpoint
LAYOUTS = {
    "1 device": (MeshConfig(data=1), 1, {}),
    "expert 2": (MeshConfig(data=1, expert=2), 2, dict(exchange="all_to_all")),
    "fsdp 2 tensor 2": (MeshConfig(data=1, fsdp=2, tensor=2), 1, dict(dispatch="einsum", capacity_factor=100.0)),
    "expert 4": (MeshConfig(data=1, expert=4), 1, dict(exchange="ragged")),
    "data 2 expert 4": (MeshConfig(data=2, expert=4), 2, dict(exchange="all_to_all", send_once=False)),
    "fsdp 4 expert 2": (MeshConfig(data=1, fsdp=4, expert=2), 1, dict(exchange="all_gather")),
    "fsdp 2 expert 2 tensor 2": (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), 1, dict(exchange="ragged", exchange_chunks=2)),
    "outer 2 expert 2 tensor 2": (MeshConfig(data=1, expert_outer=2, expert=2, tensor=2), 1, dict(exchange="all_to_all")),
}


def layout(name: str) -> tuple[Config, jax.sharding.Mesh]:
    """The tiny config of `LAYOUTS[name]`, whose bias moves, and its mesh over the first devices."""
    mesh, accumulation, moe = LAYOUTS[name]
    config = dataclasses.replace(tiny.config("deepseek", accumulation=accumulation, **moe), mesh=mesh)
    return config, make_mesh(config, jax.devices()[: np.prod(mesh.shape)])


def save(folder: pathlib.Path, step: int, state: TrainState) -> None:
    """Saves the state and waits for it."""
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, state, {})


def restore(folder: pathlib.Path, name: str) -> TrainState:
    """The newest checkpoint on the mesh of `LAYOUTS[name]`, every array laid out as that mesh asks."""
    config, mesh = layout(name)
    with jax.set_mesh(mesh), Checkpoints(folder) as checkpoints:
        wanted = run.abstract_state(config, mesh)
        state, _ = checkpoints.restore(checkpoints.latest(), wanted)
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == like.sharding
    return state


def bits(state: TrainState) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every array by name."""
    arrays = zip(leaf_names(state), jax.tree.leaves(state), strict=True)
    return {name: (str(array.dtype), np.asarray(array).tobytes()) for name, array in arrays}
