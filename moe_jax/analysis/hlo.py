"""The text of an optimised XLA program as data: computations, instructions, what calls what how often, and who talks to whom.

Only what counting needs is read. The text is `compiled.as_text()` of CPU, GPU and TPU; syntax and the compilers' habits are those of
the programs of jax 0.10 and 0.12 (OpenXLA, `xla/hlo/ir/hlo_instruction.cc`, `collective_device_list.cc`, `mesh_and_axis.cc`).
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)


class Instruction(NamedTuple):
    """`name = shape opcode(operands), attributes`; operands by name, for a parameter or a constant what stands in its brackets."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """Where JAX made it: the path of names that `jax.named_scope` and transformations leave."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of every computation it names, branches in the order of their index (False before True)."""
        pairs = [
            (role, name.strip().lstrip("%"))
            for role, one, many in _CALLED.findall(self.attributes)
            for name in ([one] if one else many.split(","))
        ]
        return sorted(pairs, key=lambda pair: pair[0] == "true_computation")


class Computation(NamedTuple):
    """Instructions by name, in order, and the name of the one whose value it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: str


class Program(NamedTuple):
    """Computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Reads a program's text. Raises ValueError when it has no entry computation."""
    computations, entry, current, root, instructions = {}, None, None, "", {}
    for line in _logical_lines(text):
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current, root, instructions = header[2], "", {}
                entry = current if header[1] else entry
        elif line.startswith("}"):
            computations[current] = Computation(current, instructions, root)
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[2], line[match.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if match[1] else root
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give the optimised HLO of compiled.as_text().")
    return Program(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, joined where a string or the braces of an instruction (metadata of a Pallas kernel) run over several."""
    held = ""
    for line in text.splitlines():
        held = f"{held} {line}" if held else line
        if not _is_open(held):
            yield held
            held = ""


def _is_open(line):
    if (line.count('"') - line.count('\\"')) % 2:
        return True
    if line.count("{") <= line.count("}") or not _INSTRUCTION.match(line):
        return False
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
    return bare.count("{") > bare.count("}")


def _instruction(name, rest):
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    inside = re.sub(r"/\*.*?\*/", "", rest[start + 1 : end - 1])
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    return Instruction(name, shape, rest[:start], operands, rest[end:])


def _closing(text, start):
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"a bracket is not closed in {text[start : start + 80]!r}.")


def _split(text):
    """Parts between the commas that no bracket holds."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[()\[\]{},]", text):
        if match[0] == "," and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
        elif match[0] != ",":
            depth += 1 if match[0] in "([{" else -1
    return [*parts, text[start:]]


def arrays(shape: str) -> list[tuple[str, int]]:
    """(dtype as JAX names it, bytes) of each array in the text of a shape, a tuple's in order; tokens are none."""
    found = []
    for element, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        bits = 8 if element == "pred" else int((re.search(r"\d+", element) or ["0"])[0])
        if bits:
            count = math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d)
            found.append((_dtype(element), math.ceil(count * bits / 8)))
    return found


def _dtype(element):
    if element == "pred":
        return "bool"
    if small := re.fullmatch(r"f(\d+)(e\w+)", element):
        return f"float{small[1]}_{small[2]}"
    letters, bits = re.fullmatch(r"([a-z]+)(\d+)", element).groups()
    return {"s": "int", "u": "uint", "f": "float", "bf": "bfloat", "c": "complex"}[letters] + bits


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None when that cannot be read.

    XLA:CPU and XLA:GPU write it down (`known_trip_count`). XLA:TPU does not: there it is N of the condition `i < N`, less the first
    i where that is a constant in sight (JAX's loops count up from 0 by 1).
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[dict(loop.called)["condition"]]
    at, values = condition.instructions, {}
    root = at[condition.root]
    if root.opcode == "fusion":
        inner = program.computations[dict(root.called)["calls"]]
        values = {i.name: root.operands[int(i.operands[0])] for i in inner.instructions.values() if i.opcode == "parameter"}
        root, at = inner.instructions[inner.root], inner.instructions | at
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, limit = (at[values.get(name, name)] for name in root.operands)
    index = re.search(r"index=(\d+)", counter.attributes)
    if counter.opcode != "get-tuple-element" or not index or limit.opcode != "constant":
        return None
    return int(limit.operands[0]) - _first(computation, loop, int(index[1]))


def _first(computation, loop, index):
    """The value a loop's state starts with at `index` if it is a constant here, else 0."""
    at = computation.instructions
    state = at[loop.operands[0]]
    value = at.get(state.operands[index]) if state.opcode == "tuple" else None
    while value is not None and value.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        value = at.get(value.operands[0])
    return int(value.operands[0]) if value is not None and value.opcode == "constant" else 0


def device_groups(instruction: Instruction, num_devices: int) -> list[tuple[int, ...]]:
    """Who talks to whom: groups of places in the program's device assignment, which is `mesh.devices` in row-major order.

    Reads lists `{{0,1},{2,3}}`, iotas `[2,4]<=[4,2]T(1,0)` and mesh axes `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(2)2}`
    (the part of size 2 of b, after one of size 2); an empty list is everybody.
    """
    text = instruction.attributes
    everybody = [tuple(range(num_devices))]
    reducing = instruction.opcode.startswith(("all-reduce", "all-gather", "reduce-scatter"))
    if reducing and "channel_id=" in text and "use_global_device_ids=true" not in text:
        return everybody  # the ids are then of replicas, each of which is all partitions
    if iota := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _tuples(_iota(iota[2]).reshape(_integers(iota[1])))
    order = r"\[[\d,]+\](?:T\([\d,]+\))?|[\d,]+"
    if axes := re.search(rf"replica_groups=@?mesh\[([^\]]*)\](?:,? ?device_ids=\(({order})\))?,? ?\{{([^}}]*)\}}", text):
        return _mesh_groups(axes[1], axes[2], axes[3])
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = [tuple(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []
    return groups or everybody


def _mesh_groups(mesh, order, chosen):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    count = math.prod(sizes.values())
    ids = np.arange(count) if order is None else _iota(order) if order.startswith("[") else np.array(_integers(order))
    parts = {name: (1, size, 1) for name, size in sizes.items()}
    picked = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen)
    for name, before, size in picked:
        if size:
            parts[name] = (int(before), int(size), sizes[name] // (int(before) * int(size)))
    ids = ids.reshape([size for part in parts.values() for size in part])
    last = [3 * list(parts).index(name) + 1 for name, _, _ in picked]
    ids = np.moveaxis(ids, last, range(ids.ndim - len(last), ids.ndim))
    return _tuples(ids.reshape(-1, math.prod(ids.shape[ids.ndim - len(last) :])))


@functools.cache
def _iota(text):
    """`[4,2]T(1,0)`: 0, 1, ... in that shape, transposed, flat."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return (ids.transpose(_integers(order)) if order else ids).reshape(-1)


def _integers(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _tuples(groups):
    return [tuple(group) for group in groups.tolist()]
