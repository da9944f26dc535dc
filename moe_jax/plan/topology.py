"""A topology written as text, `v5p:4x4x4`, and the devices it stands for: so many, of what kind, arranged how."""

import math
import re
from dataclasses import dataclass

import jax
from jax.sharding import AxisType

from moe_jax import validation
from moe_jax.config import Config, ConfigError
from moe_jax.mesh import AXES
from moe_jax.plan.chips import CHIPS, Chip


@dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
      text: as it was written.
      chip: what each device is.
      shape: of a TPU slice its torus or mesh in chips; of GPUs (hosts, GPUs a host); of a CPU (devices,).
    """

    text: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """As JAX counts them: two a chip where a chip is two devices."""
        return math.prod(self.shape) * self.chip.devices_per_chip


def parse(text: str) -> Topology:
    """Reads `v5p:4x4x4`, `v6e:16x16` (chips along each side), `h100:8x8` (hosts x GPUs), `h100:8` (one host) or `cpu:64`.

    Raises:
      ConfigError: an unknown chip, or sides that chip cannot have.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text.strip())
    if not match or match[1] not in CHIPS:
        names = ", ".join(CHIPS)
        raise ConfigError(
            f"topology = {text!r} is not CHIP:SHAPE with a chip of {names}; write e.g. v5p:4x4x4, h100:8x8 or cpu:8."
        )
    chip, shape = CHIPS[match[1]], tuple(int(side) for side in match[2].split("x"))
    if chip.platform == "gpu" and len(shape) == 1:
        shape = (1, *shape)
    if len(shape) != chip.sides or 0 in shape:
        raise ConfigError(
            f"topology = {text!r} has {len(shape)} sides, and {chip.name} has {chip.sides}; write e.g. {chip.name}:{chip.example}."
        )
    return Topology(text.strip(), chip, shape)


def abstract_mesh(config: Config, topology: Topology) -> jax.sharding.AbstractMesh:
    """The mesh of `config` on these devices, described only: what is traced under it takes this platform's code.

    Raises:
      ConfigError: `config.mesh` and the number of devices do not fit.
    """
    shape = validation.check_devices(config, topology.num_devices)
    platform = "cuda" if topology.chip.platform == "gpu" else topology.chip.platform
    return described_mesh(topology.chip.device_kind, platform, **dict(zip(AXES, shape, strict=True)))


def described_mesh(device_kind: str, platform: str, **sizes: int) -> jax.sharding.AbstractMesh:
    """A mesh with these Explicit axes of, say, ("NVIDIA H200", "cuda") or ("TPU v5", "tpu"); needs nothing installed.

    Under `jax.sharding.use_abstract_mesh` a function can be traced, and `.lower(lowering_platforms=(platform,))`.
    """
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=1, platform=platform)
    axis_types = (AxisType.Explicit,) * len(sizes)
    return jax.sharding.AbstractMesh((*sizes.values(),), (*sizes,), axis_types=axis_types, abstract_device=device)
