"""What a device can do, by kind: matrix units, memory, links. One table; every figure with its source."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      name: as a topology names it.
      platform: "tpu", "gpu" or "cpu".
      device_kind: as JAX names it.
      sides: numbers of a topology's shape.
      example: such a shape.
      memory: bytes of a device, as the compiler (TPU) or the driver has it.
      devices_per_chip: JAX devices of one chip.
    """

    name: str
    platform: str
    device_kind: str
    sides: int
    example: str
    memory: int
    devices_per_chip: int = 1


def _gib(number):
    return round(number * 2**30)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", "TPU v4", 3, "2x2x4", _gib(15.25), 2),
        Chip("v5e", "tpu", "TPU v5 lite", 2, "4x4", _gib(15.75)),
        Chip("v5p", "tpu", "TPU v5", 3, "4x4x4", _gib(95.74)),
        Chip("v6e", "tpu", "TPU v6 lite", 2, "16x16", _gib(31.25)),
        Chip("tpu7x", "tpu", "TPU7x", 3, "2x2x4", _gib(94.75), 2),
        Chip("h100", "gpu", "NVIDIA H100 80GB HBM3", 2, "8x8", 80 * 10**9),
        Chip("h200", "gpu", "NVIDIA H200", 2, "1x8", 141 * 10**9),
        Chip("cpu", "cpu", "cpu", 1, "64", 0),
    )
}
