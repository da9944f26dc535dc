"""What a device's memory holds at the worst moment of a program, from its dataflow, by the rules that compilers follow.

- Operations run when they are asked for: depth first from the results, one result after the other, of a loop's body the carry first. So
  gradients of weights come last, after the gradient of the residual stream, and what they need waits for them.
- What is computed element by element (casts, sums, slices, broadcasts) is computed where it is read; it is stored only for a matrix
  product, a collective, a kernel, a sort, a loop, or as a result.
- An operation's results are there before its operands go. An elementwise one, or an update of an array, writes over an operand that
  nobody reads later.
- A loop holds the arrays that it reads, its carry, and all that it stacks, from its beginning to its end, and the worst moment of its
  body. What the body stacks is written into the stack at once.
- Arguments stay, and are not counted. Results of a whole program that are computed element by element take a donated argument's place.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_jax.plan.dataflow import IN_PLACE, REDUCTIONS, Dataflow, Node, Value


@dataclass(frozen=True)
class Moment:
    """What is stored beside the arguments at some moment of a program.

    Attributes:
      bytes: together, of one device.
      values: one by one.
      at: what is running: its scopes and its primitive.
    """

    bytes: int
    values: tuple[Value, ...]
    at: str


def worst(flow: Dataflow) -> Moment:
    """The moment of a whole program that takes the most."""
    return _Walk(flow, flow.outputs, donated=True).worst()


def stored_reads(flow: Dataflow) -> list[tuple[Node, list[Value]]]:
    """The operations of a whole program in the order in which they run, with the stored values that each reads."""
    walk = _Walk(flow, flow.outputs, donated=True)
    return list(zip(walk.nodes, walk.reads, strict=True))


def by_demand(flow: Dataflow) -> list[Node]:
    """The operations in the order in which the outputs ask for them."""
    maker = {id(value): node for node in flow.nodes for value in node.outputs if value is not None}
    order, placed = [], set()
    for output in flow.outputs:
        ahead = [(maker[id(output)], False)] if id(output) in maker else []
        while ahead:
            node, ready = ahead.pop()
            if id(node) in placed:
                continue
            if ready:
                placed.add(id(node))
                order.append(node)
            else:
                ahead.append((node, True))
                ahead += [(maker[id(value)], False) for value in reversed(node.inputs) if id(value) in maker]
    return order


class _Walk:
    """The walk over one body.

    Args:
      flow: the body.
      results: those of its outputs that are stored at its end.
      stacked: those that are written into a stack.
      carried: inputs that it may write over.
      donated: whether fused results take the place of arguments.
    """

    def __init__(self, flow: Dataflow, results, stacked=(), carried=(), donated=False):
        self.nodes, self.carried = by_demand(flow), carried
        self.results, self.stacked = _ids(results), _ids(stacked)
        self.free_of_charge = _ids(value for value in results if value is not None and value.fused) if donated else set()
        self.stored = self._stored()
        self.reads = [self._read(node) for node in self.nodes]
        self.last = {id(value): index for index, values in enumerate(self.reads) for value in values}

    def _stored(self):
        """Ids of what is stored: all that is not fused, and of the rest what is asked for by those who cannot compute it."""
        stored = _ids(self.carried) | self.results
        for node in self.nodes:
            if _is_fused(node):
                continue
            stored |= _ids(node.outputs)
            for value in () if node.primitive in REDUCTIONS else node.inputs:
                while value.transposed and node.primitive == "dot_general":
                    (value,) = value.sources
                if value.fused and value.sources:
                    stored.add(id(value))
        return stored

    def _read(self, node) -> list[Value]:
        """The stored values that an operation reads, itself or through what is fused into it."""
        if _is_fused(node) and not _ids(node.outputs) & (self.stored | self.stacked):
            return []
        found, seen, ahead = [], set(), list(node.inputs)
        while ahead:
            value = ahead.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if id(value) in self.stored or not value.fused:
                found.append(value)
            else:
                ahead.extend(value.sources)
        return found

    def worst(self) -> Moment:
        """The moment that takes the most, the carry included."""
        live = {id(value): value for value in self.carried if self._is_needed(value)}
        best = _moment(live.values(), "start")
        for index, node in enumerate(self.nodes):
            dying = [value for value in self.reads[index] if self._dies(value, index) and id(value) in live]
            stored = [value for value in node.outputs if id(value) in self.stored - self.free_of_charge]
            if node.bodies:
                held, inner = self._loop(node, dying, live)
                moment = _moment((*held, *inner.values), inner.at)
            else:
                self._write_over(node, stored, dying, live)
                moment = _moment((*live.values(), *stored), node.outputs[0].name)
            best = max(best, moment, key=lambda moment: moment.bytes)
            live |= {id(value): value for value in stored if self._is_needed(value)}
            for value in dying:
                live.pop(id(value), None)
        return best

    def _is_needed(self, value):
        return id(value) in self.last or id(value) in self.results

    def _dies(self, value, index):
        return self.last[id(value)] == index and id(value) not in self.results

    def _write_over(self, node, stored, dying, live):
        if _is_fused(node) or node.primitive in IN_PLACE:
            for value in stored:
                old = next((old for old in dying if id(old) in live and old.bytes == value.bytes), None)
                if old is not None:
                    del live[id(old)]

    def _loop(self, node, dying, live):
        """(what is stored outside while a loop or a branch runs, the worst moment of its body)."""
        if node.primitive != "scan":
            moments = [_Walk(body, body.outputs).worst() for body in node.bodies]
            return tuple(live.values()), max(moments, key=lambda moment: moment.bytes)
        (body,), first, count = node.bodies, node.params["num_consts"], node.params["num_carry"]
        starts = _ids(node.inputs[first : first + count]) & _ids(dying)
        held = [value for value in live.values() if id(value) not in starts]
        held += [value for value in node.outputs[count:] if value is not None]
        walk = _Walk(body, body.outputs[:count], body.outputs[count:], body.inputs[first : first + count])
        return tuple(held), walk.worst()


def _is_fused(node: Node) -> bool:
    return any(value is not None and value.fused for value in node.outputs)


def _ids(values: Iterable[Value | None]) -> set[int]:
    return {id(value) for value in values if value is not None}


def _moment(values, at) -> Moment:
    return Moment(sum(value.bytes for value in values), tuple(values), at)
