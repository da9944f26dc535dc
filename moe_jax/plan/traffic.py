"""Every collective of a step, from its jaxpr: those written in the exchange, and those that the shardings of arrays imply.

Counted is what runs once XLA has been over it. Dead code sends nothing. Two sums over the same devices that are then added are added
first and sent once (its all-reduce reassociation: the gradients of what queries, keys and values were all made of), and what a loop over
microbatches only adds up is sent once, after it (its while-loop all-reduce code motion). It also sends small equal sums once, and joins
arrays into one message; `moe_jax.plan.reconcile` holds the count against a compiled program.

Not seen are transfers within a kernel; bytes of a ragged exchange are those of its buffers, a bound.
"""

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from jax.extend.core import Jaxpr, Literal, jaxprs_in_params

from moe_jax.analysis.jaxpr_ledger import entries_of, is_collective
from moe_jax.analysis.ledger import Branch, Entry, wire_bytes
from moe_jax.config import ConfigError
from moe_jax.plan.loops import scan_counts
from moe_jax.plan.program import Step
from moe_jax.plan.sharding_rules import Spec
from moe_jax.plan.shardings import CALLS, Layouts
from moe_jax.plan.what_runs import what_runs

_CALLED_ONCE = ("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call", "shard_map")
_UNARY = ("reshard", "convert_element_type", "reshape", "copy", "squeeze", "broadcast_in_dim", "reduce_sum", "transpose")


def collectives(step: Step) -> list[Entry]:
    """Every collective of a step on its mesh, in the order of the jaxpr; bytes are those that one device sends.

    Raises:
      ConfigError: an equation on sharded arrays for which it is not known what it sends; it is named.
      ValueError: as `analysis.jaxpr_ledger.ledger_of_jaxpr`.
    """
    return collectives_of_jaxpr(what_runs(step.traced.jaxpr), dict(step.mesh.shape))


def collectives_of_jaxpr(jaxpr: Jaxpr, sizes: dict[str, int]) -> list[Entry]:
    """As `collectives`, of a jaxpr without dead code; `sizes` of the mesh's axes, in order."""
    reader = _Reader(sizes)
    reader.walk(jaxpr, Layouts(sizes), (), "", ())
    return [entry for entry in reader.entries if entry is not None]


class _Reader:
    def __init__(self, sizes):
        self.sizes, self.serial, self.entries = sizes, itertools.count(), []

    def walk(self, jaxpr, layouts, loops, path, branch) -> "_Sums":
        """Adds the entries of a body; `layouts` is None within `shard_map`. Returns what is known of its sums."""
        sums = _Sums(jaxpr)
        for equation in jaxpr.eqns:
            name = "/".join(filter(None, [path, str(equation.source_info.name_stack), equation.primitive.name]))
            if equation.primitive.name in CALLS or (layouts is None and not is_collective(equation, self.sizes)):
                inside = self.enter(equation, layouts, loops, name, branch)
                sums.carry_over(equation, inside)
            else:
                found = self.found(equation, layouts, loops, name, branch)
                if found:
                    sums.note(equation, found, len(self.entries))
                elif equation.primitive.name in _UNARY and layouts is not None:
                    sums.reshaped(equation, layouts)
                self.entries += found
            if (joined := sums.added(equation)) is not None:
                self.entries[joined] = None
        return sums

    def found(self, equation, layouts, loops, name, branch) -> list[Entry]:
        if layouts is None:
            return list(entries_of(equation, self.sizes, loops, name, branch))
        groups = [(need, math.prod(self.sizes[axis] for axis in need.axes)) for need in layouts.needs(equation)]
        return [
            Entry(need.kind, need.axes, need.dtype, wire_bytes(need.kind, need.operand_bytes, group), loops, name, branch)
            for need, group in groups
        ]

    def enter(self, equation, layouts, loops, name, branch) -> "_Sums | None":
        bodies, primitive = list(jaxprs_in_params(equation.params)), equation.primitive.name
        before, conditional = len(self.entries), f"{name}#{next(self.serial)}" if primitive == "cond" else None
        inner_loops = (*loops, equation.params["length"]) if primitive == "scan" else loops
        sums = None
        for index, body in enumerate(bodies):
            within = None if layouts is None else layouts.into(equation, body)
            taken = branch if conditional is None else (*branch, Branch(conditional, index))
            sums = self.walk(body, within, inner_loops, name, taken)
            if layouts is not None:
                layouts.out_of(equation, body, within)
        if primitive == "while" and len(self.entries) > before:
            raise ConfigError(f"{name} has collectives in it, and a jaxpr does not say how often it runs; use a scan.")

        if primitive == "scan" and equation.params["length"] > 1:
            for place in sums.accumulated(equation.params):
                entry = self.entries[place]
                self.entries[place] = replace(entry, loops=(*loops, *entry.loops[len(loops) + 1 :]))
        return sums


class _Sum(NamedTuple):
    """An all-reduced array: the place of its entry, its axes, how a device's part was cut out of it since, and whether it was turned."""

    place: int
    axes: tuple[str, ...]
    cut: Spec | None = None
    turned: bool = False


class _Sums:
    """All-reduced arrays of one body that are used once, for what XLA makes of them.

    Where two of them are added, one all-reduce is saved; one that a loop only adds to what it carries is done once, after the loop.
    """

    def __init__(self, jaxpr):
        used = (v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal))
        self.jaxpr = jaxpr
        self.uses = Counter([*used, *(v for v in jaxpr.outvars if not isinstance(v, Literal))])
        self.waiting, self.carried = {}, {}

    def note(self, equation, found, start) -> None:
        """Of an equation's own collectives, which start at a place in the list of entries."""
        if len(found) == len(equation.outvars):
            for place, (entry, result) in enumerate(zip(found, equation.outvars, strict=True)):
                if entry.kind == "all-reduce":
                    self.wait(result, _Sum(start + place, entry.axes))

    def reshaped(self, equation, layouts) -> None:
        """The same elements in another shape or dtype, or a device's part of them."""
        (operand,), (result,) = equation.invars, equation.outvars
        known, before, after = self.get(operand), *(layouts.spec(variable) for variable in (operand, result))
        if known is None or operand.aval.size != result.aval.size:
            return
        if sorted(filter(None, before)) == sorted(filter(None, after)):
            self.wait(result, known._replace(turned=known.turned or equation.primitive.name == "transpose"))
        elif equation.primitive.name == "reshard" and known.cut is None:
            self.wait(result, known._replace(cut=after))

    def wait(self, result, known) -> None:
        if known is not None and self.uses[result] == 1:
            self.waiting[result] = known

    def get(self, variable):
        return None if isinstance(variable, Literal) else self.waiting.get(variable)

    def carry_over(self, equation, inside) -> None:
        """Results of a call or of a loop of one step are those of its body."""
        if equation.primitive.name in _CALLED_ONCE or equation.params.get("length") == 1:
            for result, inner in zip(equation.outvars, inside.jaxpr.outvars, strict=True):
                self.wait(result, inside.get(inner))

    def added(self, equation) -> int | None:
        """The place of an entry that falls away with this equation."""
        if equation.primitive.name not in ("add", "add_any"):
            return None
        left, right, (result,) = *equation.invars, equation.outvars
        one, other = self.get(left), self.get(right)
        if one is not None and other is not None and not one.turned and one[1:] == other[1:]:
            self.wait(result, one)
            return other.place
        for known, beside in ((one, right), (other, left)):
            if known is not None and known.cut is None and not isinstance(beside, Literal) and self.uses[beside] == 1:
                self.carried[result] = beside, known.place
        return None

    def accumulated(self, params) -> list[int]:
        """Places of the entries that the body of a scan only adds to what it carries."""
        first, count = scan_counts(params)
        pairs = zip(self.jaxpr.invars[first : first + count], self.jaxpr.outvars[:count], strict=True)
        found = ((*self.carried.get(end, (None, None)), start) for start, end in pairs if not isinstance(end, Literal))
        return [place for beside, place, start in found if beside is start]
