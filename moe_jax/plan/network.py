"""The network under a mesh: which links the mesh axes lie on, what one device can send over them, and how long a collective takes.

TPU slices: the mesh is laid over the torus as `jax.experimental.mesh_utils.create_device_mesh` does it, which JAX's own meshes and the
compiler's use. A group of devices that differ in some axes is then a box of the torus; along each side of it n devices lie `stride`
apart, and `stride` such groups share the links between. A side closes to a ring where the slice's side does and the group goes all
round. Times, of W bytes/s a link and direction (jax-ml.github.io/scaling-book, "Sharded matrices and how to multiply them"):

    all-gather, reduce-scatter, all-reduce   sent bytes / sum over sides of (2 W in a ring, W in a line) / stride
    all-to-all                               half of what half of the group has goes over the links that cut a side in two; the
                                             slowest side counts. In one ring: an eighth of n times the operand / W
    permute                                  sent bytes / (W / stride) of the slowest side

GPUs: the mesh is in the order of the devices. Within a host NVLink; over hosts each GPU has its own share of the host network. A group
of g GPUs on each of h hosts sends to other hosts through all its g shares at once, and the slower of the two networks counts.

Latency: each hop of the longest way, twice for an all-reduce. Contention between collectives of different axes is not modelled.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from jax.experimental import mesh_utils

from moe_jax.analysis.ledger import Entry
from moe_jax.config import ConfigError
from moe_jax.plan.topology import Topology

DIE_TO_DIE = 6  # of a link's bandwidth, between the two devices of a TPU7x chip: docs.cloud.google.com/tpu/docs/tpu7x


@dataclass(frozen=True)
class Side:
    """The devices of a group along one dimension of a torus: `count` of them `stride` apart, closing to a ring or not."""

    count: int
    stride: int
    ring: bool

    @property
    def links(self) -> float:
        """Links out of each device, in one direction, that the group has for itself."""
        return (2 if self.ring else 1) / self.stride

    @property
    def hops(self) -> int:
        """Of the longest way."""
        return self.stride * (self.count // 2 if self.ring else self.count - 1)


@dataclass(frozen=True)
class Route:
    """What some mesh axes have of the network together.

    Attributes:
      text: where they lie, in words.
      devices: n of a group.
      bandwidth: bytes/s that one device sends in an all-gather, reduce-scatter or all-reduce.
      per_operand_byte: seconds that an all-to-all takes for each byte of a device's operand (all n parts, its own too).
      neighbour: bytes/s to the next device.
      latency: seconds of the longest way.
    """

    text: str
    devices: int
    bandwidth: float
    per_operand_byte: float
    neighbour: float
    latency: float

    def seconds(self, kind: str, sent: float) -> float:
        """Time of one collective in which each device sends `sent` bytes, counted as `analysis.ledger` does."""
        if kind in ("all-to-all", "ragged-all-to-all"):
            return self.latency + sent * self.devices / (self.devices - 1) * self.per_operand_byte
        if kind == "collective-permute":
            return self.latency + sent / self.neighbour
        return self.latency * (2 if kind == "all-reduce" else 1) + sent / self.bandwidth


class Network:
    """The links of `topology` under a mesh of these axis sizes.

    Args:
      sizes: of the mesh axes by name, in order.
      topology: of TPUs or GPUs.
      host_bandwidth: bytes/s a GPU in one direction between hosts, instead of the table's assumption.
    """

    def __init__(self, sizes: Mapping[str, int], topology: Topology, host_bandwidth: float | None = None):
        """Raises ConfigError: a CPU, whose emulated devices have no links, or sizes that are not the number of devices."""
        if topology.chip.link is None:
            raise ConfigError(f"topology = {topology.text!r} has no links to plan with; use one of TPUs or GPUs.")
        if math.prod(sizes.values()) != topology.num_devices:
            raise ConfigError(
                f"mesh = {dict(sizes)} has {math.prod(sizes.values())} devices, and topology = {topology.text!r} {topology.num_devices};"
                " make them agree."
            )
        self.sizes, self.topology, self.link = dict(sizes), topology, topology.chip.link
        self.host_bandwidth = host_bandwidth or self.link.host_bandwidth
        self.place = places(tuple(self.sizes.values()), topology)
        self.route = functools.cache(self._route)

    def axis_bandwidth(self, axes: Sequence[str]) -> float:
        """Bytes/s that one device can send in an all-gather over these mesh axes together."""
        return self.route(tuple(axes)).bandwidth

    def seconds(self, entry: Entry) -> float:
        """Time of one execution of a collective."""
        return self.route(entry.axes).seconds(entry.kind, entry.bytes)

    def _route(self, axes):
        """Of the worst-placed group; `axes` have more than one device."""
        names = list(self.sizes)
        which = [names.index(axis) for axis in axes]
        moved = np.moveaxis(self.place, which, range(-len(which) - 1, -1))
        groups = moved.reshape(-1, math.prod(self.sizes[axis] for axis in axes), self.place.shape[-1])
        shapes = {np.ascontiguousarray(group - group.min(axis=0)).tobytes(): group for group in groups}
        one = self._within_slice if self.topology.chip.platform == "tpu" else self._between_hosts
        return min((one(group) for group in shapes.values()), key=lambda route: route.bandwidth)

    def _within_slice(self, group):
        chips, cores = group[:, :-1], len(set(group[:, -1]))
        sides = box(chips, self.topology) or path(chips, self.topology)
        shared = self.topology.chip.devices_per_chip / cores  # groups that share the links of a chip
        if not sides:
            bandwidth = DIE_TO_DIE * self.link.bandwidth
            return Route("the two halves of a chip", cores, bandwidth, 0.5 / bandwidth, bandwidth, self.link.latency)
        per_link, num_chips = self.link.bandwidth / shared, math.prod(side.count for side in sides)
        cuts = [num_chips // side.count * side.links * per_link for side in sides]  # bytes/s over each side's middle
        return Route(
            " x ".join(f"{'ring' if s.ring else 'line'} of {s.count}" + f", {s.stride} apart" * (s.stride > 1) for s in sides),
            len(group),
            sum(side.links for side in sides) * per_link,
            len(group) / 4 / min(cuts),
            min(1 / side.stride for side in sides) * per_link,
            sum(side.hops for side in sides) * self.link.latency,
        )

    def _between_hosts(self, group):
        n, h = len(group), len(set(group[:, 0]))
        g, fast, slow = n // h, self.link.bandwidth, self.host_bandwidth
        latency = (g - 1) * self.link.latency + (h - 1) * self.link.host_latency
        if h == 1:
            return Route(f"NVLink, {g} GPUs of a host", n, fast, (n - 1) / n / fast, fast, latency)
        whole = max((h - 1) / h / g / slow, (g - 1) / g / fast)  # seconds to gather a byte spread over the group
        crossing = max((h - 1) / h / slow, (g - 1) / n / fast)
        text = f"host network, {h} hosts" + f" x {g} GPUs" * (g > 1)
        return Route(text, n, (n - 1) / n / whole, crossing, slow, latency)


def places(shape: Sequence[int], topology: Topology) -> np.ndarray:
    """Where each device of a mesh is: [*shape, dims], of a TPU (x, y, z, half of the chip), of a GPU (host, number in it)."""
    if topology.chip.platform == "gpu":
        return np.stack(np.unravel_index(np.arange(math.prod(shape)), topology.shape), axis=-1).reshape(*shape, 2)
    cells = [(x, y, z, core) for z, y, x, core in np.ndindex(*_sides(topology)[::-1], topology.chip.devices_per_chip)]
    devices = [
        SimpleNamespace(
            id=i, platform="tpu", device_kind=topology.chip.device_kind, coords=cell[:3], core_on_chip=cell[3], process_index=0
        )
        for i, cell in enumerate(cells)
    ]
    laid = mesh_utils.create_device_mesh(tuple(shape), devices, allow_split_physical_axes=True)
    return np.array([(*device.coords, device.core_on_chip) for device in laid.flat]).reshape(*shape, 4)


def rings(topology: Topology) -> tuple[bool, ...]:
    """Which of the three sides of a TPU slice close to a ring."""
    link, sides = topology.chip.link, topology.shape
    whole = link.cube and all(side % link.cube == 0 for side in sides)
    return tuple(bool(whole) or side == link.pod_side for side in _sides(topology))


def box(chips: np.ndarray, topology: Topology) -> list[Side]:
    """The sides longer than 1 of a group of chips [n, 3] that fills a regular box; none where it fills none."""
    sides, extents, count = [], _sides(topology), 1
    for dim, wraps in enumerate(rings(topology)):
        values = np.unique(chips[:, dim])
        if len(values) == 1:
            continue
        strides = np.unique(np.diff(values))
        if len(strides) > 1:
            return []
        stride, count = int(strides[0]), count * len(values)
        sides.append(Side(len(values), stride, wraps and stride * len(values) == extents[dim]))
    return sides if count == len(np.unique(chips, axis=0)) else []


def path(chips: np.ndarray, topology: Topology) -> list[Side]:
    """The one line or ring through a group of chips in the order of the mesh: small slices are laid out so (`mesh_utils`)."""
    order = np.array(list(dict.fromkeys(map(tuple, chips))))
    if len(order) == 1:
        return []
    apart = np.abs(order - np.roll(order, -1, axis=0))
    around = np.array(_sides(topology)) - apart
    hops = np.where(rings(topology), np.minimum(apart, around), apart).sum(axis=1)
    stride = int(hops[:-1].max())
    return [Side(len(order), stride, len(order) > 2 and hops[-1] <= stride)]


def _sides(topology):
    return (*topology.shape, 1, 1)[:3]
