"""What a device can do, by kind: matrix units, memory, links. One table; every figure with its source.

Rates are peaks of data sheets, without sparsity, a device as JAX counts them; what is reached of them is `Chip.matrix_efficiency`, 1
where nobody's measurement is known to us. Where a page gives both directions of all links together, a link's rate is that divided by
links and by two. The scaling book (jax-ml.github.io/scaling-book, "How to think about TPUs") plans with 10 % less a link: 90 GB/s for
v5p and v6e, 45 GB/s for v4 and v5e.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

TB, GB = 10**12, 10**9


@dataclass(frozen=True)
class Link:
    """How a device reaches others.

    Attributes:
      bandwidth: bytes/s of one link (TPU: to one neighbour; GPU: all of a GPU's NVLink together) in one direction.
      count: links of a chip: two for each side of a TPU's torus, 1 for GPUs, which reach every GPU of the host through a switch.
      cube: the sides of a TPU slice close to rings where all of them are multiples of this (v4, v5p, tpu7x); 0 where `pod_side` says it.
      pod_side: a side of a TPU slice closes to a ring where it has just this length, that of a whole pod (v5e, v6e).
      host_bandwidth: bytes/s from one device over the network of the hosts in one direction: data-centre network or InfiniBand; 0
        where that is not known.
      latency: seconds a message takes for each hop.
      host_latency: seconds for each hop between hosts.
    """

    bandwidth: float
    count: int
    cube: int = 0
    pod_side: int = 0
    host_bandwidth: float = 0.0
    latency: float = 1e-6
    host_latency: float = 1e-5


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
      devices_per_chip: JAX devices of one chip, which share its links.
      flops: matrix FLOP/s of a device by dtype; a dtype that is not there runs at the rate of the next in `RATES`.
      bandwidth: bytes/s of a device's memory.
      link: None for a CPU, whose figures are measured (`analysis.plan_calibration`).
      matrix_efficiency: share of `flops` that large products reach, where it is known.
      sources: where each figure is from.
    """

    name: str
    platform: str
    device_kind: str
    sides: int
    example: str
    memory: int
    devices_per_chip: int = 1
    flops: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    link: Link | None = None
    matrix_efficiency: float = 1.0
    sources: tuple[str, ...] = ()

    def matrix_rate(self, dtype: str) -> float:
        """Peak FLOP/s of one device for operands of `dtype`; 0 where nothing is known."""
        names = RATES.get(dtype, (dtype, "bfloat16"))
        return next((self.flops[name] for name in names if name in self.flops), 0.0)


# Which figures of a chip stand for a dtype, the first there is. The step asks for full float32 precision of its few float32 products
# (routers): on a TPU each is six bfloat16 passes (jax.lax.Precision.HIGHEST).
RATES = {
    "bfloat16": ("bfloat16",),
    "float16": ("bfloat16",),
    "float32": ("float32", "bfloat16"),
    "float8_e4m3fn": ("float8", "bfloat16"),
    "float8_e5m2": ("float8", "bfloat16"),
    "int8": ("int8", "float8", "bfloat16"),
}

_TPU = "docs.cloud.google.com/tpu/docs/"
_LATENCY = "latency of a hop: about 1 us, jax-ml.github.io/scaling-book, 'Sharded matrices'"
_TABLE = f"{_TPU}tpu7x (table of v5p, v6e and TPU7x)"
_NVIDIA = "resources.nvidia.com, H100 and H200 Tensor Core GPU data sheets: halves of the figures with sparsity"
_HOSTS = "host network: 400 Gb/s InfiniBand a GPU, as DGX H100 has it (NVIDIA DGX H100 data sheet); an assumption about other systems"
_GPU_LATENCY = "latency of a hop: 1 us NVLink, 10 us between hosts; assumptions"
_MEASURED = (
    "share of peak: 705 of 989 TFLOP/s, a grouped product in bfloat16 on an H200, github.com/pytorch/pytorch pull 156203"
)


def _gib(number):
    return round(number * 2**30)


def _tpu_rates(bfloat16, int8, float8=0.0):
    rates = {"bfloat16": bfloat16 * TB, "int8": int8 * TB, "float32": bfloat16 * TB / 6}
    return rates | ({"float8": float8 * TB} if float8 else {})


def _hopper(name, device_kind, example, memory, bandwidth):
    rates = {"bfloat16": 989.4 * TB, "float8": 1978.9 * TB, "int8": 1978.9 * TB, "float32": 66.9 * TB}
    link = Link(450 * GB, 1, host_bandwidth=50 * GB)
    sources = (_NVIDIA, _HOSTS, _GPU_LATENCY, _MEASURED)
    return Chip(name, "gpu", device_kind, 2, example, memory, 1, rates, bandwidth, link, 705 / 989, sources)


CHIPS = {
    chip.name: chip
    for chip in (
        # JAX shows one device for the two cores of a real v4 chip; libtpu's description of v4 has two, of 15.25 GiB.
        Chip(
            *("v4", "tpu", "TPU v4", 3, "4x4x4", _gib(30.5), 1, _tpu_rates(275, 275), 1200 * GB),
            Link(50 * GB, 6, cube=4),
            sources=(f"{_TPU}v4", "links: 2400 Gb/s a chip, arxiv.org/abs/2304.01433, table 4", _LATENCY),
        ),
        Chip(
            *("v5e", "tpu", "TPU v5 lite", 2, "4x4", _gib(15.75), 1, _tpu_rates(197, 393), 819 * GB),
            Link(50 * GB, 4, pod_side=16, host_bandwidth=3.125 * GB),
            sources=(f"{_TPU}v5e", "host network: 2 x 100 Gb/s for 8 chips, same page", _LATENCY),
        ),
        Chip(
            *("v5p", "tpu", "TPU v5", 3, "4x4x4", _gib(95.74), 1, _tpu_rates(459, 918), 2765 * GB),
            Link(100 * GB, 6, cube=4, host_bandwidth=6.25 * GB),
            sources=(f"{_TPU}v5p", "int8: jax-ml.github.io/scaling-book", _LATENCY),
        ),
        Chip(
            *("v6e", "tpu", "TPU v6 lite", 2, "16x16", _gib(31.25), 1, _tpu_rates(918, 1836), 1638 * GB),
            Link(100 * GB, 4, pod_side=16, host_bandwidth=12.5 * GB),
            sources=(f"{_TPU}v6e", f"host network: {_TABLE}", _LATENCY),
        ),
        Chip(
            *("tpu7x", "tpu", "TPU7x", 3, "2x2x4", _gib(94.75), 2, _tpu_rates(1153.5, 1153.5, 2307), 3690 * GB),
            Link(100 * GB, 6, cube=4, host_bandwidth=6.25 * GB),
            sources=(f"{_TABLE}: halves, as a chip is two devices; int8 is not told, bfloat16's is taken", _LATENCY),
        ),
        _hopper("h100", "NVIDIA H100 80GB HBM3", "8x8", 80 * GB, 3350 * GB),
        _hopper("h200", "NVIDIA H200", "1x8", 141 * GB, 4800 * GB),
        Chip("cpu", "cpu", "cpu", 1, "64", 0, sources=("measured on the machine itself, docs/plans/cpu.md",)),
    )
}
