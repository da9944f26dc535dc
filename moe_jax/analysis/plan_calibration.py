"""The roofline of this machine's emulated devices, measured: products at the sizes of a step, passes over memory, collectives.

Every figure is of all devices at work together, each on arrays of its own, as in a step: emulated devices share the machine's cores, so a
device's rate is what is left of them. Nothing is fitted to a step's time: a product is measured at the sizes that the steps have
(rounded to powers of two), a pass at several sizes, a collective of each kind and group at two sizes. The cost of a call without
work is taken off.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.analysis.ledger import Entry, wire_bytes
from moe_jax.ops.grouped_matmul_cpu import grouped_matmul_cpu
from moe_jax.ops.varying import vary_alike
from moe_jax.plan.roofline import Machine
from moe_jax.plan.work import Product

COVERED = 0.95  # of each part's FLOPs: sizes beyond are taken to run at the rate of the nearest that is measured
PASS_BYTES = (2**12, 2**16, 2**19, 2**22, 2**25)  # read and written by one pass of one device
WIRE_BYTES = (2**12, 2**20)  # a device's operand
LEAST_FLOPS, MOST_REPEATS = 5e7, 16  # of one device in one measured call; independent operations in it
CALLS = 3  # of the same, one after another
MOST_BYTES = 2**24  # of the arrays of one probe, all devices together, but for one of too large a size


@dataclass(frozen=True)
class Size:
    """A product's sizes, each a power of two; `grouped` by the loop over experts."""

    grouped: bool
    batch: int
    rows: int
    terms: int
    columns: int

    @property
    def flops(self) -> float:
        """Of one execution."""
        return 2.0 * self.batch * self.rows * self.terms * self.columns


def size_of(product: Product) -> Size:
    """The size that a product is measured at."""
    dims = (product.batch, product.rows, product.terms, product.columns)
    return Size(product.part == "experts", *(2 ** round(math.log2(max(dim, 1))) for dim in dims))


def sizes_that_matter(products: Iterable[Product]) -> list[Size]:
    """The sizes of the largest shares of a step's FLOPs that are together `COVERED` of it, the largest first."""
    shares: dict[Size, float] = {}
    for product in products:
        shares[size_of(product)] = shares.get(size_of(product), 0.0) + product.times * product.flops
    ordered, total, seen = sorted(shares, key=shares.get, reverse=True), sum(shares.values()), 0.0
    kept = []
    for size in ordered:
        if seen < COVERED * total:
            kept.append(size)
        seen += shares[size]
    return kept


@dataclass(frozen=True)
class Probe:
    """A measured operation.

    Attributes:
      call: runs it `repeats` times on every device.
      repeats: executions of one call.
    """

    call: Callable[[], object]
    repeats: int


def probes(sizes: Sequence[Size], sent: Iterable[tuple[str, int]], devices: Sequence[jax.Device]) -> dict[tuple, Probe]:
    """What is to be timed, by name: ("call",), ("product", size), ("pass", bytes), ("collective", kind, group, operand bytes).

    Args:
      sizes: of products.
      sent: kind and group size of collectives.
      devices: all that the steps run on.
    """
    mesh = jax.make_mesh((len(devices),), ("all",), devices=devices)
    made = {("call",): _probe(mesh, lambda x: x, [(8,)], 1)}
    for size in sizes:
        made["product", size] = _product(mesh, size, min(max(round(LEAST_FLOPS / size.flops), 1), MOST_REPEATS))
    for size in PASS_BYTES:
        made["pass", size] = _probe(mesh, lambda x: 0.5 * x + 0.5, [(size // 8,)], MOST_REPEATS, in_place=True)
    for kind, group in sorted(set(sent)):
        grouped = jax.make_mesh((len(devices) // group, group), ("rest", "group"), devices=devices)
        for size in WIRE_BYTES:
            made["collective", kind, group, size] = _probe(grouped, COLLECTIVES[kind], [(group, size // 4 // group)], 4)
    return made


COLLECTIVES = {
    "all-gather": lambda x: jax.lax.all_gather(x, "group", axis=1, tiled=True),
    "all-reduce": lambda x: jax.lax.psum(x, "group"),
    "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "group", scatter_dimension=0, tiled=True),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "group", 0, 1, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, "group", [(0, 1), (1, 0)]),
}


def measured_kind(entry: Entry) -> str:
    """The kind that a collective is measured as: a ragged exchange, which XLA:CPU lacks, as one of fixed buffers."""
    return entry.kind.removeprefix("ragged-")


@dataclass(frozen=True)
class Rates:
    """Medians of what was measured, seconds of one execution on all devices at once."""

    product: dict[Size, float]
    passes: dict[int, float]
    collective: dict[tuple[str, int, int], float]

    def machine(self, sizes: dict[str, int]) -> Machine:
        """The machine for a mesh of these axis sizes."""
        text = (
            f"products {self.gflops[0]:.1f} to {self.gflops[1]:.1f} GFLOP/s of all devices together",
            f"passes {self.gigabytes[0]:.1f} to {self.gigabytes[1]:.1f} GB/s, {1e6 * self.passes[min(self.passes)]:.0f} us the least",
        )
        return Machine(self.matrix, self.memory, lambda entry: self.network(entry, sizes), text)

    @property
    def gflops(self) -> tuple[float, float]:
        """(least, most) over the sizes, all devices together."""
        rates = [jax.device_count() * size.flops / seconds / 1e9 for size, seconds in self.product.items()]
        return min(rates), max(rates)

    @property
    def gigabytes(self) -> tuple[float, float]:
        """(least, most) over the sizes, all devices together."""
        rates = [jax.device_count() * size / seconds / 1e9 for size, seconds in self.passes.items()]
        return min(rates), max(rates)

    def matrix(self, product: Product) -> float:
        """Seconds of one execution, at the rate of its own size or the nearest one measured."""
        size = size_of(product)
        if size not in self.product:
            alike = [other for other in self.product if other.grouped == size.grouped] or list(self.product)
            size = min(alike, key=lambda other: _apart(other, size))
        return self.product[size] * product.flops / size.flops

    def memory(self, moved: float, times: float) -> float:
        """Seconds of `times` passes over `moved` bytes together; between measured sizes, and beyond the largest, a straight line."""
        if not times or not moved:
            return 0.0
        measured = sorted(self.passes)
        size = moved / times
        if size >= measured[-1]:
            return times * self.passes[measured[-1]] * size / measured[-1]
        return times * float(np.interp(size, measured, [self.passes[s] for s in measured]))

    def network(self, entry: Entry, sizes: dict[str, int]) -> float:
        """Seconds of one execution: a straight line through two sizes."""
        group = math.prod(sizes[axis] for axis in entry.axes)
        kind = measured_kind(entry)
        small, large = WIRE_BYTES
        low, high = (self.collective[kind, group, size] for size in (small, large))
        sent_low, sent_high = (wire_bytes(kind, size, group) for size in (small, large))
        slope = max(high - low, 0.0) / (sent_high - sent_low)
        return max(low, low + slope * (entry.bytes - sent_low))


def rates(seconds: dict[tuple, list[float]], made: dict[tuple, Probe]) -> Rates:
    """Medians of the timed calls of `probes`, less that of the call without work."""
    call = statistics.median(seconds["call",])

    def one(name):
        return max(statistics.median(seconds[name]) - call, 1e-7) / made[name].repeats

    return Rates(
        {name[1]: one(name) for name in made if name[0] == "product"},
        {name[1]: one(name) for name in made if name[0] == "pass"},
        {name[1:]: one(name) for name in made if name[0] == "collective"},
    )


def _apart(a, b):
    """How unlike two sizes are: in the factor of each dimension, the smallest of which decides a product's rate."""
    return sum(abs(math.log2(x / y)) for x, y in ((a.rows, b.rows), (a.terms, b.terms), (a.columns, b.columns)))


def _product(mesh, size, repeats):
    if not size.grouped:
        shapes = [(size.batch, size.rows, size.terms), (size.batch, size.terms, size.columns)]
        return _probe(mesh, jnp.matmul, shapes, repeats)

    def grouped(x_AD, w_EDF):
        """The three products of a forward and a backward pass, as a step has them."""
        sizes_E = jnp.full((size.batch,), size.rows, jnp.int32)
        x_AD, w_EDF, sizes_E = vary_alike(x_AD, w_EDF, sizes_E)
        y_AF, pullback = jax.vjp(lambda x, w: grouped_matmul_cpu(x, w, sizes_E), x_AD, w_EDF)
        return pullback(y_AF)

    shapes = [(size.batch * size.rows, size.terms), (size.batch, size.terms, size.columns)]
    return _probe(mesh, grouped, shapes, repeats, each=3)


def _probe(mesh, function, shapes, repeats, each=1, in_place=False):
    """At most `repeats` independent calls of `function` on every device, each on float32 arrays of its own of these shapes; what is timed
    is run `each` times by one. With `in_place` results take the place of the arrays: a step's memory is used again and again, and touching
    new pages is no part of a pass."""
    axes = tuple(mesh.axis_names)
    once = 4 * mesh.size * sum(math.prod(shape) for shape in shapes)
    repeats = min(repeats, max(MOST_BYTES // once, 1))

    def body(*arrays):
        results = [function(*(array[0] for array in own)) for own in arrays]
        return jax.tree.map(lambda result: result[None], results)

    spec = NamedSharding(mesh, P(axes))
    run = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=P(axes), out_specs=P(axes)), donate_argnums=range(repeats) if in_place else ()
    )
    held = [[jax.device_put(jnp.ones((mesh.size, *shape)), spec) for shape in shapes] for _ in range(repeats)]

    def call():
        for _ in range(CALLS):
            results = jax.block_until_ready(run(*held))
            if in_place:
                held[:] = [[result] for result in results]
        return results

    return Probe(call, CALLS * each * repeats)
