"""Bytes that a compiled program reads and writes in memory, counted from its text: what a step of decoding takes its time for.

Every instruction reads its operands and writes its results, once; what only renames memory (tuples, bitcasts) does neither, and inside a
fusion nothing leaves the registers. Of an array that is only looked up in (a slice at a computed place, a gather, the rows that a scatter
replaces) the part counts that is looked up. Caches of the processor are taken to hold nothing.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.analysis import hlo
from moe_jax.ops.stored_vectors import ONE_TURN

SILENT = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
LOOKUPS = {"dynamic-slice", "slice", "gather"}  # of their first operand
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # of their first operand, in place: which operand is new


class Traffic(NamedTuple):
    """What one instruction does to memory.

    Attributes:
      computation, instruction: where.
      executions: a step, on average.
      read, written: bytes of one execution.
    """

    computation: str
    instruction: hlo.Instruction
    executions: float
    read: float
    written: float

    @property
    def bytes(self) -> float:
        """Of all executions."""
        return self.executions * (self.read + self.written)


def program_bytes(text: str, **settings) -> float:
    """Bytes read and written by a step; arguments as in `traffic`."""
    return sum(item.bytes for item in traffic(text, **settings))


def traffic(text: str, *, loop_trips: float | None = None, stack_share: tuple[int, float] = (0, 1.0)) -> Iterator[Traffic]:
    """Every instruction that moves data, of a loop with its trips; each branch of a conditional is taken equally often.

    Args:
      text: `compiled.as_text()`.
      loop_trips: of loops whose number of trips is data (the loop over experts), as measured.
      stack_share: (E, share): a kernel's operand of three axes, E first, is a stack of experts' weights, and this share of it is read.

    Raises:
      ValueError: a loop whose trips are data, and `loop_trips` is not given.
    """
    program = hlo.parse(text)
    return _walk(program, program.entry, 1.0, loop_trips, stack_share)


def _walk(program, name, executions, loop_trips, stack_share) -> Iterator[Traffic]:
    computation = program.computations[name]
    for instruction in computation.instructions.values():
        called = instruction.called
        inside = lambda name, times: _walk(program, name, executions * times, loop_trips, stack_share)  # noqa: E731
        if instruction.opcode in SILENT or instruction.opcode.endswith("-done"):
            continue
        if instruction.opcode == "while":
            trips = 1 if ONE_TURN in instruction.op_name else hlo.trip_count(program, computation, instruction)
            if trips is None and (trips := loop_trips) is None:
                raise ValueError(f"how often {instruction.name} runs cannot be read; give loop_trips.")
            for role, name in called:
                yield from inside(name, trips + (role == "condition"))
        elif instruction.opcode == "conditional":
            for _, name in called:
                yield from inside(name, 1 / len(called))
        elif instruction.opcode == "call":
            yield from inside(called[0][1], 1)
        else:
            yield Traffic(computation.name, instruction, executions, *_moved(program, computation, instruction, stack_share))


def _moved(program, computation, instruction, stack_share) -> tuple[float, float]:
    """Bytes (read, written)."""
    at = computation.instructions
    if instruction.opcode == "fusion":
        inner = program.computations[dict(instruction.called)["calls"]]
        parameters = {i.name: int(i.operands[0]) for i in inner.instructions.values() if i.opcode == "parameter"}
        read = sum(_read(inner, parameter, _size(at[instruction.operands[k]])) for parameter, k in parameters.items())
        return read, _written(inner, inner.instructions[inner.root])
    if instruction.opcode in LOOKUPS or instruction.opcode in UPDATES:
        read = sum(_size(at[name]) for name in instruction.operands[1:])
        written = _written(computation, instruction)
        return read + (written if instruction.opcode in LOOKUPS else 0), written
    if instruction.opcode == "custom-call":
        experts, share = stack_share
        stack = f"[{experts},"
        sizes = [
            _size(at[name]) * (share if stack in at[name].shape and at[name].shape.split("]")[0].count(",") == 2 else 1)
            for name in instruction.operands
        ]
        results = [size for _, size in hlo.arrays(instruction.shape)]
        return sum(sizes), sum(
            results[:1] if '"__cublas' in instruction.attributes else results
        )  # the second is room to work in
    return sum(_size(at[name]) for name in instruction.operands), _size(instruction)


def _read(inner, name, size) -> float:
    """Bytes of a fusion's operand that are read: all, or what is looked up in it."""
    total = 0
    for user in inner.instructions.values():
        if name not in user.operands or user.opcode == "parameter":
            continue
        first = user.operands[0] == name and name not in user.operands[1:]
        if user.opcode == "bitcast":
            total += _read(inner, user.name, size)
        elif user.opcode in LOOKUPS and first:
            total += _size(user)
        elif not (user.opcode in UPDATES and first):
            return size
    return min(total, size)


def _written(inner, root) -> float:
    """Bytes that a root's value costs: all of it, or what is new in an array that is updated in place."""
    at = inner.instructions
    if root.opcode == "tuple":
        return sum(_written(inner, at[name]) for name in root.operands)
    if root.opcode == "bitcast":
        return _written(inner, at[root.operands[0]])
    return _size(at[root.operands[UPDATES[root.opcode]]]) if root.opcode in UPDATES else _size(root)


def _size(instruction):
    return sum(size for _, size in hlo.arrays(instruction.shape))
