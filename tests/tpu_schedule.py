"""Reads the schedule of a program compiled for a TPU: which collectives are asynchronous, and what is computed meanwhile.

The text of a compiled TPU program (`compiled.as_text()`) lists each computation's instructions in the order in which they are
issued, so what stands between a collective's start and its done runs while it is on the wire.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

COLLECTIVES = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")

_HEADER = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = .*?\s([a-z][a-z0-9\-]*)\((.*)$")
_KERNEL = 'custom_call_target="tpu_custom_call"'  # what Pallas makes


@dataclass(frozen=True)
class Pair:
    """A collective that is under way from its start to its done.

    Attributes:
      collective: one of COLLECTIVES.
      source: JAX's name of the operation, such as "jit(f)/shard_map/all_to_all".
      computation: where it is scheduled.
      compute: JAX's names of the matrix products between start and done, in their order.
    """

    collective: str
    source: str
    computation: str
    compute: tuple[str, ...]


@dataclass
class _Instruction:
    name: str
    opcode: str
    rest: str

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else self.name

    @property
    def called(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest)


@dataclass
class Schedule:
    """The computations of a compiled program by name, each the list of its instructions in order."""

    computations: dict[str, list[_Instruction]] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> "Schedule":
        """Parses `compiled.as_text()`. Raises ValueError when the program is not scheduled."""
        if "is_scheduled=true" not in text.partition("\n")[0]:
            raise ValueError("the program has no schedule: give the text of a compiled program, not of a lowered one.")
        schedule, current = cls(), None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = schedule.computations.setdefault(header.group(1), [])
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(_Instruction(*found.groups()))
        return schedule

    def pairs(self) -> list[Pair]:
        """Every asynchronous collective."""
        found = []
        for name, instructions in self.computations.items():
            for start, instruction in enumerate(instructions):
                kind = self._started(instruction)
                if kind is None:
                    continue
                done = next(i for i in range(start + 1, len(instructions)) if self._ends(instructions[i], instruction))
                between = [source for i in instructions[start + 1 : done] for source in self._products(i)]
                found.append(Pair(kind, instruction.source, name, tuple(between)))
        return found

    def synchronous(self) -> Counter:
        """How often each collective stands in the program as one instruction: nothing is computed meanwhile."""
        everything = (i for instructions in self.computations.values() for i in instructions)
        return Counter(i.opcode for i in everything if i.opcode in COLLECTIVES)

    def _started(self, instruction: _Instruction) -> str | None:
        if instruction.opcode.removesuffix("-start") in COLLECTIVES and instruction.opcode.endswith("-start"):
            return instruction.opcode.removesuffix("-start")
        if instruction.name.startswith("async-collective-start"):  # a fusion, on v5e
            return next(
                (i.opcode for called in instruction.called for i in self._within(called) if i.opcode in COLLECTIVES), None
            )
        return None

    @staticmethod
    def _ends(instruction: _Instruction, start: _Instruction) -> bool:
        if start.opcode == "fusion":
            return instruction.name == start.name.replace("-start", "-done")
        return instruction.opcode == start.opcode.replace("-start", "-done") and start.name in instruction.called

    def _within(self, computation: str) -> list[_Instruction]:
        """The instructions of a computation and of all that it calls."""
        instructions = self.computations.get(computation, [])
        return [*instructions, *(inner for i in instructions for name in i.called for inner in self._within(name))]

    def _products(self, instruction: _Instruction) -> list[str]:
        """The matrix products an instruction runs: its own, or of a fusion, a loop, a branch."""
        if instruction.opcode in ("convolution", "dot") or _KERNEL in instruction.rest:
            return [instruction.source]
        return [
            source
            for called in instruction.called
            for inner in self.computations.get(called, [])
            for source in self._products(inner)
        ]
