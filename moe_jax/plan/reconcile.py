"""A step's collectives as counted from its jaxpr, held against those of the compiled program: nothing may remain.

Sums of bytes are compared by kind, axes, dtype and branch, since a compiler joins arrays into one message, unrolls loops and takes
loops of one step away, none of which changes what is sent. Bytes are those of the operands: what goes on the wire is a fixed multiple
of them, rounded once an entry. What else a compiler may do has a name in `RULES`.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_jax.analysis.ledger import Entry, Sizes
from moe_jax.plan.plan_error import PlanError

SMALL = 1024  # bytes; scalars and arrays of one number an expert are below
Key = tuple[str, tuple[str, ...], str, tuple[int, ...]]


@dataclass(frozen=True)
class Line:
    """Arrays of one kind, axes and dtype.

    Attributes:
      kind, axes, dtype: as in `Entry`.
      branch: indices of the branches of conditionals they are in, outermost first.
      counted: bytes of operands a device and step by the jaxpr, every branch being taken.
      compiled: the same of the program.
      rule: why they differ, a key of `RULES`; empty where they do not, or nobody knows.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    branch: tuple[int, ...]
    counted: int
    compiled: int
    rule: str = ""


@dataclass(frozen=True)
class Reconciliation:
    """`matched` to the byte, differing by a named rule (`explained`), and the rest (`unexplained`)."""

    matched: list[Line]
    explained: list[Line]
    unexplained: list[Line]

    def check(self) -> None:
        """Raises ValueError when anything is unexplained."""
        if self.unexplained:
            lines = "; ".join(
                f"{line.kind} over {line.axes} of {line.dtype}: {line.counted} bytes counted, {line.compiled} compiled"
                for line in self.unexplained
            )
            raise ValueError(f"the compiled program sends what the jaxpr does not explain: {lines}.")


def operand_bytes(entry: Entry, sizes: dict[str, int]) -> int:
    """Bytes of one array on one device, from those it puts on the wire (the inverse of `ledger.wire_bytes`)."""
    n = math.prod(sizes[axis] for axis in entry.axes)
    if entry.kind == "all-reduce":
        return entry.bytes * n // (2 * (n - 1))
    if entry.kind in ("reduce-scatter", "all-to-all"):
        return entry.bytes * n // (n - 1)
    return entry.bytes // (n - 1) if entry.kind == "all-gather" else entry.bytes


def reconcile(entries: Sequence[Entry], compiled: Sequence[Entry], mesh: Sizes) -> Reconciliation:
    """Holds `traffic.collectives` against `analysis.ledger.ledger` of the program compiled from the same step.

    Args:
      entries: of the jaxpr.
      compiled: of the program.
      mesh: both are of, or its axis sizes in order.
    """
    sizes = dict(getattr(mesh, "shape", mesh))
    books = _Books(_totals(entries, sizes), _totals(compiled, sizes), entries, sizes)
    rules = {key: name for name, rule in RULES.items() for key in rule(books)}
    lines = [Line(*key, books.first[0][key], books.first[1][key], rules.get(key, "")) for key in books.keys]
    differ = [line for line in lines if line.counted != line.compiled]
    open_ = {key for key in books.keys if books.counted[key] != books.compiled[key]}
    is_open = lambda line: (line.kind, line.axes, line.dtype, line.branch) in open_  # noqa: E731
    return Reconciliation(
        matched=[line for line in lines if line.counted == line.compiled],
        explained=[line for line in differ if not is_open(line)],
        unexplained=[line for line in differ if is_open(line)],
    )
