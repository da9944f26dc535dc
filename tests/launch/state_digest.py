"""A program for several processes: restores the newest checkpoint of a run folder and prints the digest of every array, whole.

python -m tests.launch.state_digest WORKDIR HOST:PORT PROCESSES PROCESS
"""

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax import processes
from moe_jax.mesh import emulate_devices, make_mesh
from moe_jax.train import run
from moe_jax.train.paths import leaf_names


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """{name: digest} of the restored state on the run's own mesh, over all devices of all processes."""
    config = run.read_config(workdir)
    emulate_devices(config.mesh.emulate)
    mesh = make_mesh(config)
    with run.checkpoints(config) as checkpoints, jax.set_mesh(mesh):
        state, extra = checkpoints.restore(checkpoints.latest(), run.abstract_state(config, mesh))
        whole = [multihost_utils.process_allgather(leaf, tiled=True) for leaf in jax.tree.leaves(state)]
    found = {name: digest(leaf) for name, leaf in zip(leaf_names(state), whole, strict=True)}
    return found | {"data": json.dumps(extra["data"], sort_keys=True)}


def digest(array: np.ndarray) -> str:
    """Of dtype, shape and bytes."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


if __name__ == "__main__":
    place = processes.find("auto", sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    processes.start(place)
    with processes.ending():
        processes.say(json.dumps(digests(pathlib.Path(sys.argv[1]))))
