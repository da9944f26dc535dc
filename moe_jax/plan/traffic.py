"""Every collective of a step, from its jaxpr: those written in the exchange, and those that the shardings of arrays imply.

Counted is what runs once XLA has been over it: dead code sends nothing, and two sums over the same devices that are then added are
added first and sent once (XLA's all-reduce reassociation: the gradients of what queries, keys and values were all made of). XLA also
runs small equal sums once and joins arrays into one message; `moe_jax.plan.reconcile` holds the count against a compiled program.

What is not seen: transfers within a kernel; bytes of a ragged exchange are those of its buffers, a bound.
"""

import itertools
import math
from collections import Counter

from jax.extend.core import Jaxpr, Literal, jaxprs_in_params

from moe_jax.analysis.jaxpr_ledger import entries_of, is_collective
from moe_jax.analysis.ledger import Branch, Entry, wire_bytes
from moe_jax.config import ConfigError
from moe_jax.plan.program import Step
from moe_jax.plan.shardings import CALLS, Layouts
from moe_jax.plan.what_runs import what_runs


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

    def walk(self, jaxpr, layouts, loops, path, branch) -> None:
        """Adds the entries of a body; `layouts` is None within `shard_map`."""
        sums = _Sums(jaxpr)
        for equation in jaxpr.eqns:
            name = "/".join(filter(None, [path, str(equation.source_info.name_stack), equation.primitive.name]))
            if equation.primitive.name in CALLS or (layouts is None and not is_collective(equation, self.sizes)):
                self.enter(equation, layouts, loops, name, branch)
                self.join(sums.added(equation))
                continue
            found = self.found(equation, layouts, loops, name, branch)
            sums.note(equation, found, len(self.entries))
            self.entries += found
            self.join(sums.added(equation))

    def found(self, equation, layouts, loops, name, branch) -> list[Entry]:
        if layouts is None:
            return list(entries_of(equation, self.sizes, loops, name, branch))
        groups = [(need, math.prod(self.sizes[axis] for axis in need.axes)) for need in layouts.needs(equation)]
        return [
            Entry(need.kind, need.axes, need.dtype, wire_bytes(need.kind, need.operand_bytes, group), loops, name, branch)
            for need, group in groups
        ]

    def enter(self, equation, layouts, loops, name, branch) -> None:
        bodies, primitive = list(jaxprs_in_params(equation.params)), equation.primitive.name
        before, conditional = len(self.entries), f"{name}#{next(self.serial)}" if primitive == "cond" else None
        inner_loops = (*loops, equation.params["length"]) if primitive == "scan" else loops
        for index, body in enumerate(bodies):
            within = None if layouts is None else layouts.into(equation, body)
            taken = branch if conditional is None else (*branch, Branch(conditional, index))
            self.walk(body, within, inner_loops, name, taken)
            if layouts is not None:
                layouts.out_of(equation, body, within)
        if primitive == "while" and len(self.entries) > before:
            raise ConfigError(f"{name} has collectives in it, and a jaxpr does not say how often it runs; use a scan.")

    def join(self, place) -> None:
        if place is not None:
            self.entries[place] = None


class _Sums:
    """All-reduced arrays of one body that are used once: where two of them are added, one all-reduce is saved."""

    def __init__(self, jaxpr):
        used = (v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal))
        self.uses = Counter([*used, *(v for v in jaxpr.outvars if not isinstance(v, Literal))])
        self.waiting = {}

    def note(self, equation, found, start) -> None:
        if len(found) == len(equation.outvars):
            for place, (entry, result) in enumerate(zip(found, equation.outvars, strict=True)):
                if entry.kind == "all-reduce" and self.uses[result] == 1:
                    self.waiting[result] = start + place, entry.axes

    def added(self, equation) -> int | None:
        """The place of an entry that falls away with this equation."""
        if equation.primitive.name not in ("add", "add_any"):
            return None
        found = [None if isinstance(v, Literal) else self.waiting.get(v) for v in equation.invars]
        if None in found or found[0][1] != found[1][1]:
            return None
        (result,) = equation.outvars
        if self.uses[result] == 1:
            self.waiting[result] = found[0]
        return found[1][0]
