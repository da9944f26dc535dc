"""The device mesh: five explicit axes, slowest links first, and who is sharded over what.

data          replicas of the parameters; tokens are split
expert_outer  like expert, over slower links (between hosts); 1 on most meshes
fsdp          tokens are split, and so is every large parameter (gathered just before its use)
expert        tokens are split, and experts live on different devices; to the rest of the model this is one more data axis
tensor        heads and hidden widths are split; tokens are the same on every device of the axis
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax import processes, validation
from moe_jax.config import Config, ConfigError

AXES = ("data", "expert_outer", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "expert_outer", "fsdp", "expert")  # the axes that split tokens
EXPERT_AXES = ("expert_outer", "expert")  # the axes that split experts, the first of them over the coarser parts


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a mesh play which part for an MoE layer, by name.

    A name that the ambient mesh does not have counts as an axis of size 1. Along axes that play no part everything is the same.

    Attributes:
      batch: split the tokens.
      expert: split the experts, the slowest first; some of `batch`, as tokens travel between the devices that hold the experts.
      fsdp: splits the width D of the weights, gathered just before use; one of `batch` and not of `expert`, None for none.
      tensor: splits the hidden width F; not one of `batch`, None for none.
    """

    batch: tuple[str, ...]
    expert: tuple[str, ...] = ()
    fsdp: str | None = None
    tensor: str | None = None

    def __post_init__(self):
        for name in ("batch", "expert"):
            if not isinstance(value := getattr(self, name), tuple):
                raise ConfigError(f"Axes.{name} = {value!r} is a {type(value).__name__}; give a tuple of axis names.")
        if extra := [axis for axis in self.expert if axis not in self.batch]:
            raise ConfigError(
                f"Axes.expert = {self.expert} has {extra[0]!r}, which Axes.batch = {self.batch} lacks; add it there, as tokens are"
                " split over the devices that hold different experts."
            )
        if self.fsdp is not None and (self.fsdp not in self.batch or self.fsdp in self.expert):
            raise ConfigError(
                f"Axes.fsdp = {self.fsdp!r} must be one of Axes.batch = {self.batch} and none of Axes.expert = {self.expert};"
                " name another axis, or None."
            )
        if self.tensor is not None and self.tensor in self.batch:
            raise ConfigError(
                f"Axes.tensor = {self.tensor!r} is one of Axes.batch = {self.batch}; tokens are the same along it: name another"
                " axis, or None."
            )

    def present(self) -> "Axes":
        """Those that split something on the ambient mesh. Raises ConfigError when it has several devices and none of the names."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size > 1 and not {*self.batch, self.tensor} & set(mesh.axis_names):
            raise ConfigError(
                f"{self} names no axis of the mesh, which has {mesh.axis_names}; say which of them split the tokens."
            )
        several = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
        batch, expert = (tuple(axis for axis in axes if axis in several) for axes in (self.batch, self.expert))
        fsdp, tensor = (axis if axis in several else None for axis in (self.fsdp, self.tensor))
        return Axes(batch, expert, fsdp, tensor)

    def batch_spec(self, ndim: int) -> P:
        """As the function of this name."""
        return P(self.batch, *(None,) * (ndim - 1))

    def weight_spec(self, letters: str) -> P:
        """Spec of a weight whose axes are `letters`, of E, D and F."""
        return P(*({"E": self.expert, "D": self.fsdp, "F": self.tensor}[letter] for letter in letters))


OUR_AXES = Axes(BATCH_AXES, EXPERT_AXES, "fsdp", "tensor")


def emulate_devices(count: int) -> None:
    """Makes JAX's CPU backend offer `count` devices, shared out over the processes of the run; 0 changes nothing.

    Call before anything asks JAX for its devices.

    It also asks for two threads a device (`NPROC`, where that is not set). XLA's CPU client has one a device by default, and a
    device that may start two collectives at once can then hold the thread that the other one's last device waits for.

    Raises:
      ConfigError: JAX has already started with another number of devices, or the processes do not divide it.
    """
    if count == 0:
        return
    if count % processes.count():
        raise ConfigError(
            f"mesh.emulate = {count} devices do not divide over {processes.count()} processes; choose a multiple of"
            f" {processes.count()}."
        )
    own = count // processes.count()
    os.environ.setdefault("NPROC", str(2 * own))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", own)
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


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": what the ambient mesh is made of, be its devices here or only described; else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def present(spec: P) -> P:
    """`spec` without the axes that the ambient mesh does not have."""
    return _only(spec, jax.sharding.get_abstract_mesh().axis_names)


def explicit(spec: P) -> P | None:
    """The part of `spec` that an `out_sharding` takes on the ambient mesh: its explicit axes; None where there are none."""
    mesh = jax.sharding.get_abstract_mesh()
    return _only(spec, mesh.explicit_axes) if mesh.explicit_axes else None


def lay_out(array: jax.Array, spec: P) -> jax.Array:
    """`array` laid out as `spec` on the ambient mesh, whatever the types of its axes; as it is where no mesh is set.

    Raises:
      ValueError: a length that the devices do not divide, or an array of a mesh that is not set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        if jax.typeof(array).sharding.mesh.explicit_axes:
            raise ValueError(
                f"an array is laid out over a mesh that is not set: {jax.typeof(array)}; call under `jax.set_mesh(mesh)`."
            )
        return array
    spec = present(P(*spec, *(None,) * (array.ndim - len(spec))))
    for length, axes in zip(array.shape, spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if length % parts:
            raise ValueError(
                f"an array of shape {array.shape} cannot be split in {parts} over the mesh axes {axes}: {length} is not a multiple of"
                f" {parts}; change one of the two, or which axes play this part (`Axes`)."
            )
    if mesh.explicit_axes and jax.typeof(array).sharding.spec != (wanted := _only(spec, mesh.explicit_axes)):
        array = jax.sharding.reshard(array, wanted)
    if mesh.auto_axes:
        constrain = jax.jit(
            jax.lax.with_sharding_constraint, static_argnums=1
        )  # jit: else, outside one, explicit axes are undone
        array = constrain(array, _only(spec, mesh.auto_axes))
    return array


def _only(spec, names):
    every = ((axes,) if isinstance(axes, str) else axes or () for axes in spec)
    return P(*(tuple(axis for axis in axes if axis in names) for axes in every))


def data_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of parts the tokens are split in."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def process_part(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(which, of how many): the part of every batch's rows that this process reads. Processes along the tensor axis read the same rows.

    Raises:
      ConfigError: devices in such an order that the processes' rows overlap in part.
    """
    rows = NamedSharding(mesh, batch_spec(1)).devices_indices_map((data_shards(mesh),))
    shards: dict[int, set[int]] = {}
    for device, (row,) in rows.items():
        shards.setdefault(device.process_index, set()).add(row.indices(data_shards(mesh))[0])
    return _part_of(shards, jax.process_index())


def _part_of(shards, process):
    """`process_part` of the shards of the batch that each process's devices hold."""
    parts = sorted({tuple(sorted(held)) for held in shards.values()})
    if sum(map(len, parts)) != len(set().union(*parts)) or len(set(map(len, parts))) > 1:
        raise ConfigError(
            f"mesh: the rows of a batch do not divide over the {len(shards)} processes, whose devices hold the parts {parts}; make each of"
            " mesh.data, expert_outer, fsdp, expert and tensor divide the devices of a process, or be a multiple of them."
        )
    return parts.index(tuple(sorted(shards[process]))), len(parts)


def batch_spec(ndim: int) -> P:
    """Spec of an array whose first axis is the batch (or the tokens) and whose others are whole."""
    return P(BATCH_AXES, *(None,) * (ndim - 1))


def shard_batch(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a host's part of the global batch on the mesh, split by rows. Each array is [rows of this process, ...]."""
    return {
        name: jax.make_array_from_process_local_data(NamedSharding(mesh, batch_spec(array.ndim)), array)
        for name, array in batch.items()
    }
