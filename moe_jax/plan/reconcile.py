"""A step's collectives as counted from its jaxpr, held against those of the program compiled from it: nothing may remain.

Bytes are summed by kind, axes, dtype and branch, since a compiler joins arrays into one message, unrolls loops and takes loops of one
step away, none of which changes what is sent. They are those of the operands: what goes on the wire is a fixed multiple of them, rounded
once an entry. What else a compiler may do has a name among the rules below; the last two are habits of XLA:TPU alone.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_jax.analysis.ledger import Entry, Sizes

SMALL = 1024  # bytes; scalars and arrays of one number an expert are below
EQUAL = "small sums that are equal are sent once"
REPEATED = "what passes through a loop of one step repeat is sent once"
SCATTER = "a reduce-scatter as an all-reduce"
GATHER = "an all-gather as an all-reduce"


@dataclass(frozen=True)
class Line:
    """Arrays of one kind, axes and dtype.

    Attributes:
      kind, axes, dtype: as in `Entry`.
      branch: indices of the branches of conditionals they are in, outermost first.
      counted: bytes of operands a device and step by the jaxpr, these branches being taken.
      compiled: the same of the program.
      rule: why they differ; empty where they do not, or nobody knows.
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
    """Lines that agree to the byte, that differ by a named rule, and the rest."""

    matched: list[Line]
    explained: list[Line]
    unexplained: list[Line]

    def check(self) -> None:
        """Raises ValueError when anything is unexplained; it is named."""
        if self.unexplained:
            lines = "; ".join(
                f"{line.kind} over {'+'.join(line.axes)} of {line.dtype}: {line.counted} bytes counted, {line.compiled} compiled"
                for line in self.unexplained
            )
            raise ValueError(f"jaxpr and compiled program send different things and no rule says why: {lines}.")


def reconcile(entries: Sequence[Entry], compiled: Sequence[Entry], mesh: Sizes, platform: str = "gpu") -> Reconciliation:
    """Holds `traffic.collectives` against `analysis.ledger.ledger` of the program compiled from the same step.

    Args:
      entries: of the jaxpr.
      compiled: of the program.
      mesh: that both are of, or its axis sizes in order.
      platform: "gpu" or "tpu", whose compiler's habits count as explanations.
    """
    sizes = dict(getattr(mesh, "shape", mesh))
    counted, found = _totals(entries, sizes), _totals(compiled, sizes)
    missing = {key: counted[key] - found[key] for key in {**counted, **found}}
    rules = {
        key: EQUAL
        for key, left in missing.items()
        if left and key[0] == "all-reduce" and _is_sum(left, _small(entries, key, sizes))
    }
    rules |= {
        key: REPEATED
        for key, left in missing.items()
        if left and key not in rules and _is_sum(left, _unlooped(entries, key, sizes))
    }
    if platform == "tpu":
        rules = _as_sums(missing, entries, sizes) | rules
    lines = [Line(*key, counted[key], found[key], rules.get(key, "")) for key in missing]
    return Reconciliation(
        matched=[line for line in lines if line.counted == line.compiled],
        explained=[line for line in lines if line.rule],
        unexplained=[line for line in lines if line.counted != line.compiled and not line.rule],
    )


def operand_bytes(entry: Entry, sizes: dict[str, int]) -> int:
    """Bytes of one array on one device, from those it puts on the wire: the inverse of `ledger.wire_bytes`."""
    n = math.prod(sizes[axis] for axis in entry.axes)
    if entry.kind == "all-reduce":
        return entry.bytes * n // (2 * (n - 1))
    if entry.kind in ("reduce-scatter", "all-to-all"):
        return entry.bytes * n // (n - 1)
    return entry.bytes // (n - 1) if entry.kind == "all-gather" else entry.bytes


def _key(entry):
    return entry.kind, entry.axes, entry.dtype, tuple(branch.index for branch in entry.branch)


def _totals(entries, sizes) -> Counter:
    totals = Counter()
    for entry in entries:
        totals[_key(entry)] += operand_bytes(entry, sizes) * entry.executions
    return totals


def _small(entries, key, sizes) -> list[int]:
    """Bytes a step of each small array of a key."""
    mine = [(operand_bytes(entry, sizes), entry.executions) for entry in entries if _key(entry) == key]
    return [size * times for size, times in mine if size < SMALL]


def _unlooped(entries, key, sizes) -> list[int]:
    """Bytes a step of each array of a key that stands in a loop of one step, which a compiler takes away."""
    return [operand_bytes(e, sizes) * e.executions for e in entries if _key(e) == key and 1 in e.loops]


def _is_sum(total: int, parts: Iterable[int]) -> bool:
    """Whether some of the parts add up to the total."""
    if total < 0:
        return False
    reached = {0}
    for part in parts:
        reached |= {r + part for r in reached if r + part <= total}
    return total in reached


def _as_sums(missing, entries, sizes) -> dict:
    """Rules of the keys whose gathers and scatters XLA:TPU has written as all-reduces of the whole array."""
    rules = {}
    for key, left in missing.items():
        kind, axes, dtype, branch = key
        if kind != "all-reduce" or left >= 0:
            continue
        scatter, gather = ((other, axes, dtype, branch) for other in ("reduce-scatter", "all-gather"))
        scattered, gathered = missing.get(scatter, 0), missing.get(gather, 0)
        group = math.prod(sizes[axis] for axis in axes)
        whole = all(_is_sum(missing.get(k, 0), _parts(entries, k, sizes)) for k in (scatter, gather))
        if whole and -left == scattered + group * gathered:
            rules |= {scatter: SCATTER} if scattered else {}
            rules |= {gather: GATHER} if gathered else {}
            rules[key] = GATHER if gathered and not scattered else SCATTER
    return rules


def _parts(entries, key, sizes):
    return [operand_bytes(entry, sizes) * entry.executions for entry in entries if _key(entry) == key]
