"""The device mesh: four explicit axes, and who is sharded over what.

data    replicas of the parameters; tokens are split
fsdp    tokens are split, and so is every large parameter (gathered just before its use)
expert  tokens are split, and experts live on different devices; to the rest of the model this is one more data axis
tensor  heads and hidden widths are split; tokens are the same on every device of the axis
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import validation
from moe_jax.config import Config, ConfigError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the axes that split tokens


def emulate_devices(count: int) -> None:
    """Makes JAX's CPU backend offer `count` devices; 0 changes nothing. Call before anything asks JAX for its devices.

    Raises:
      ConfigError: JAX has already started with another number of devices.
    """
    if count == 0:
        return
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # already started: what counts is how many there are
    if jax.device_count() != count:
        raise ConfigError(
            f"mesh.emulate = {count} came too late: JAX already runs with {jax.device_count()} device(s);"
            " start a new process, and unset XLA_FLAGS and JAX_NUM_CPU_DEVICES if they set another number."
        )


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of `config` over `devices` (default: all). Raises ConfigError when they do not fit."""
    devices = jax.devices() if devices is None else list(devices)
    shape = validation.check_devices(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def abstract_mesh(config: Config, num_devices: int) -> jax.sharding.AbstractMesh:
    """The same mesh without devices, to trace for hardware that is not there."""
    shape = validation.check_devices(config, num_devices)
    return jax.sharding.AbstractMesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def axis_size(axis: str) -> int:
    """Size of `axis` in the ambient mesh (`jax.set_mesh`), inside or outside `shard_map`."""
    return jax.sharding.get_abstract_mesh().shape[axis]


def data_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of parts the tokens are split in."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_spec(ndim: int) -> P:
    """Spec of an array whose first axis is the batch (or the tokens) and whose others are whole."""
    return P(BATCH_AXES, *(None,) * (ndim - 1))


def shard_batch(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a host's part of the global batch on the mesh, split by rows. Each array is [rows of this process, ...]."""
    return {
        name: jax.make_array_from_process_local_data(NamedSharding(mesh, batch_spec(array.ndim)), array)
        for name, array in batch.items()
    }
