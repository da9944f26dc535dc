"""The communication ledger: every collective of a step, with its axes, how often it runs and the bytes it puts on the wire.

Two independent readings. `ledger` reads the compiled program: all that runs, the partitioner's collectives included (gradients'
sums, resharding), as the target's compiler left it. `jaxpr_ledger.ledger_of_jaxpr` reads the traced one: what was asked for by hand
inside `shard_map`, in the dtypes that were asked for. On XLA:CPU they differ for narrow floats: it widens bfloat16 collectives to
float32, so that its program shows exactly twice the bytes; believe the jaxpr there.

Bytes are those that one device sends in one execution, as if by a ring (n devices in the group; rounded up; where devices differ,
the busiest):

    all-gather          (n - 1) x its shard           all-to-all          (n - 1) / n x its operands
    reduce-scatter      (n - 1) / n x its operand     collective-permute  its operand
    all-reduce          2 (n - 1) / n x its operand   ragged-all-to-all   its operand: an upper bound, the sizes are data

A group of one costs nothing and is left out. What a custom call (a kernel with its own transfers) sends is not seen.
"""

import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.analysis import hlo

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Branch(NamedTuple):
    """One branch of one conditional; index as in `jax.lax.switch`, for `jax.lax.cond` 0 is False and 1 True."""

    conditional: str
    index: int


@dataclass(frozen=True)
class Entry:
    """One array that a collective of a program carries; where XLA has joined several into one message, each is an entry.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes that the group spans, in the mesh's order, without those of size 1.
      dtype: of the array.
      bytes: sent by one device in one execution.
      loops: trip counts of the loops around it, outermost first.
      name: the path of JAX names it came from.
      branch: the conditionals around it, outermost first.
      upper_bound: True when the bytes depend on data and these are the most they can be.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    loops: tuple[int, ...] = ()
    name: str = ""
    branch: tuple[Branch, ...] = ()
    upper_bound: bool = False

    @property
    def executions(self) -> int:
        """Times it runs in a step, its branch being taken."""
        return math.prod(self.loops)


Sizes = jax.sharding.Mesh | jax.sharding.AbstractMesh | Mapping[str, int]


def per_layer(entries: Sequence[Entry], num_layers: int) -> list[Entry]:
    """What one pass through one layer does: entries inside a scan over `num_layers` layers, counted per iteration.

    That scan is taken to be the outermost loop of so many trips; forward and backward passes are two such loops, and both are in.

    Raises:
      ValueError: no loop has so many trips: XLA removes loops of one, and unrolled ones (`model.scan_unroll`) are none.
    """
    inside = [replace(e, loops=e.loops[e.loops.index(num_layers) + 1 :]) for e in entries if num_layers in e.loops]
    if not inside:
        raise ValueError(
            f"num_layers = {num_layers}: no collective is in a loop of so many trips; give the scan's length, 2 or more, and set"
            " model.scan_unroll = 1."
        )
    return inside


def total_bytes(entries: Sequence[Entry], branch: int | None = None) -> int:
    """Bytes one device sends; of a conditional its dearest branch, or the one of index `branch`."""

    def total(entries, depth):
        conditionals, sum_ = defaultdict(lambda: defaultdict(list)), 0
        for entry in entries:
            if len(entry.branch) > depth:
                conditionals[entry.branch[depth].conditional][entry.branch[depth].index].append(entry)
            else:
                sum_ += entry.bytes * entry.executions
        for branches in conditionals.values():
            sums = {index: total(inside, depth + 1) for index, inside in branches.items()}
            sum_ += max(sums.values()) if branch is None else sums.get(branch, 0)
        return sum_

    return total(entries, 0)


def count(entries: Sequence[Entry]) -> Counter[tuple[str, tuple[str, ...]]]:
    """Arrays carried by (kind, axes), times their executions, in all branches."""
    counts = Counter()
    for entry in entries:
        counts[entry.kind, entry.axes] += entry.executions
    return counts


def wire_bytes(kind: str, operand_bytes: int, group: int) -> int:
    """Bytes one of `group` devices sends for operands of so many bytes on each; see the module's table."""
    share = {"all-reduce": 2 * (group - 1), "reduce-scatter": group - 1, "all-to-all": group - 1}
    if kind in share:
        return -(-share[kind] * operand_bytes // group)
    return operand_bytes * (group - 1 if kind == "all-gather" else 1)


def ledger(compiled: jax.stages.Compiled | str, mesh: Sizes) -> list[Entry]:
    """Every collective of a compiled program, in the order in which it is reached from the entry.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or its text.
      mesh: the mesh it was compiled on, or its axis sizes in order.

    Raises:
      ValueError: a collective of unknown kind, one whose groups are those of no mesh axes, one in a loop whose trip count cannot be
        read, or one that nothing seems to run; the instruction is named.
    """
    program = hlo.parse(compiled if isinstance(compiled, str) else compiled.as_text())
    return _ProgramReader(program, dict(getattr(mesh, "shape", mesh))).read()


class _ProgramReader:
    """Walks a program from its entry."""

    def __init__(self, program: hlo.Program, sizes: dict[str, int]):
        self.program, self.sizes = program, sizes
        self.at = program.computations
        self.serial = itertools.count()
        self.seen, self.channels, self.parts = set(), set(), {}

    def read(self) -> list[Entry]:
        entries = list(self.walk(self.program.entry, (), ()))
        for computation in self.at.values():
            for instruction in computation.instructions.values():
                key = (computation.name, instruction.name)
                if _kind(instruction) and key not in self.seen:
                    raise ValueError(f"{instruction.name} of {computation.name} is a collective that nothing seems to run.")
        for channel, name in self.parts.items():
            if channel not in self.channels:
                raise ValueError(f"{name} is a part of an asynchronous collective whose start is nowhere.")
        return entries

    @functools.cached_property
    def talking(self) -> set[str]:
        """Computations that have a collective in them or below them."""
        talking, grew = set(), True
        while grew:
            before = len(talking)
            for computation in self.at.values():
                for i in computation.instructions.values():
                    if _kind(i) or any(name in talking for _, name in i.called):
                        talking.add(computation.name)
            grew = len(talking) > before
        return talking

    def walk(self, name, loops, branch) -> Iterator[Entry]:
        computation = self.at[name]
        for instruction in computation.instructions.values():
            if kind := _kind(instruction):
                self.seen.add((name, instruction.name))
                yield from self.entry(kind, computation, instruction, loops, branch)
            elif instruction.opcode.endswith(("-done", "-update")):
                continue  # the -start is what runs
            elif any(called in self.talking for _, called in instruction.called):
                yield from self.enter(computation, instruction, loops, branch)

    def enter(self, computation, instruction, loops, branch) -> Iterator[Entry]:
        called = [name for _, name in instruction.called]
        if instruction.opcode == "conditional":
            conditional = f"{instruction.name}#{next(self.serial)}"
            for index, name in enumerate(called):
                yield from self.walk(name, loops, (*branch, Branch(conditional, index)))
        elif instruction.opcode == "while":
            trips = hlo.trip_count(self.program, computation, instruction)
            if trips is None:
                raise ValueError(f"{instruction.name} is a loop with collectives in it, and how often it runs cannot be read.")
            names = dict(instruction.called)
            yield from self.walk(names["body"], (*loops, trips), branch)
            yield from self.walk(names["condition"], (*loops, trips + 1), branch)
        else:
            for name in called:
                yield from self.walk(name, loops, branch)

    def entry(self, kind, computation, instruction, loops, branch) -> Iterator[Entry]:
        if self.is_repeated(computation, instruction):
            return
        bounded = kind == "ragged-all-to-all"
        operands = instruction.operands[:1] if bounded else instruction.operands
        arrays = [a for name in operands for a in hlo.arrays(computation.instructions[name].shape)]
        if kind == "all-to-all":  # several operands are the parts of one
            arrays = [(arrays[0][0], sum(size for _, size in arrays))]
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # XLA:TPU writes one as a fusion of an all-reduce and a slice
        axes = self.permuted(instruction) if kind == "collective-permute" else self.spanned(instruction)
        group = math.prod(self.sizes[axis] for axis in axes)
        for dtype, size in arrays if axes else ():
            yield Entry(kind, axes, dtype, wire_bytes(kind, size, group), loops, instruction.op_name, branch, bounded)

    def is_repeated(self, computation, instruction) -> bool:
        """True for the later parts of an asynchronous fusion of XLA:TPU, each of which shows the whole collective again."""
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if "async_collective_fusion_config" not in instruction.attributes:
            return False
        if any('"AsyncCollectiveStart"' in i.attributes for i in computation.instructions.values()):
            self.channels.add(channel[1])
            return False
        self.parts[channel[1]] = instruction.name
        return True

    def spanned(self, instruction) -> tuple[str, ...]:
        groups = hlo.device_groups(instruction, math.prod(self.sizes.values()))
        axes = _axes_by_groups(tuple(self.sizes.items())).get(frozenset(map(frozenset, groups)))
        if axes is None:
            raise ValueError(
                f"{instruction.name} is over groups {groups}, which are those of no axes of the mesh {self.sizes}."
            )
        return axes

    def permuted(self, instruction) -> tuple[str, ...]:
        text = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
        pairs = re.findall(r"\{(\d+),(\d+)\}", text[1]) if text else []
        places = [np.unravel_index([int(a), int(b)], tuple(self.sizes.values())) for a, b in pairs]
        return tuple(axis for i, axis in enumerate(self.sizes) if any(place[i][0] != place[i][1] for place in places))


def _kind(instruction) -> str | None:
    """The kind of a collective, at its -start where it has one; None for what is none. Raises ValueError for an unknown one."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in KINDS:
        return opcode
    collective = opcode.startswith("collective-") and not opcode.endswith(("-done", "-update"))
    if collective or (opcode == "send" and "is_host_transfer=true" not in instruction.attributes):
        raise ValueError(f"{instruction.name} is a {opcode}, which the ledger does not know how to count.")
    return None


@functools.cache
def _axes_by_groups(sizes):
    """Every set of axes larger than 1, by the groups of devices that differ in these axes only."""
    names = [name for name, size in sizes if size > 1]
    shape = [size for _, size in sizes if size > 1]
    places = np.arange(math.prod(shape)).reshape(shape)
    table = {}
    for length in range(len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), length):
            moved = np.moveaxis(places, chosen, range(len(names) - length, len(names)))
            groups = moved.reshape(-1, math.prod(shape[i] for i in chosen)).tolist()
            table[frozenset(map(frozenset, groups))] = tuple(names[i] for i in chosen)
    return table
