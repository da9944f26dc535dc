"""What a device's memory holds at the worst moment of a program, from its dataflow, by the rules that compilers follow.

- Operations run when they are asked for: depth first from the results, one result after the other, of a loop's body the carry first. So
  gradients of weights come last, after the gradient of the residual stream, and what they need waits for them.
- What is computed element by element (casts, sums, slices, broadcasts) is computed where it is read; it is stored only for a matrix
  product, a collective, a kernel, a sort, a loop, or as a result.
- An operation's results are there before its operands go. An elementwise one, or an update of an array, writes over an operand that
  nobody reads later.
- A loop holds the arrays that it reads, its carry, and all that it stacks, from its beginning to its end, and the worst moment of its
  body. What the body stacks is written into the stack at once.
- Of a stack of weights that loops cut a layer from, a second copy is made, once: a GPU's compiler wants the axis along which a layer is
  gathered in front, a TPU's casts the whole stack where all that is read of a layer is its cast.
- Arguments stay, and are not counted. Results of a whole program that are computed element by element take a donated argument's place.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moe_jax.plan.dataflow import IN_PLACE, REDUCTIONS, Dataflow, Node, Value
from moe_jax.plan.loops import scan_counts

GATHERS = ("reshard", "all_gather", "all_gather_invariant", "all_gather_reduced")


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


def worst(flow: Dataflow, platform: str) -> Moment:
    """The moment of a whole program that takes the most, compiled for "tpu", "gpu" or "cpu"."""
    return _Walk(flow, flow.outputs, platform, donated=True).worst()


def stored_reads(flow: Dataflow) -> list[tuple[Node, list[Value]]]:
    """The operations of a whole program in the order in which they run, with the stored values that each reads."""
    walk = _Walk(flow, flow.outputs, "", donated=True)
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
      platform: whose compiler's habits to follow; empty for what all of them do.
      stacked: those that are written into a stack.
      carried: inputs that it may write over.
      donated: whether fused results take the place of arguments.
    """

    def __init__(self, flow: Dataflow, results, platform, stacked=(), carried=(), donated=False):
        self.nodes, self.carried, self.platform = by_demand(flow), carried, platform
        self.results, self.stacked = _ids(results), _ids(stacked)
        self.free_of_charge = _ids(value for value in results if value is not None and value.fused) if donated else set()
        self.stored = self._stored()
        self.reads = [self._read(node) for node in self.nodes]
        self.last = {id(value): index for index, values in enumerate(self.reads) for value in values}
        self.copies = self._copies()

    def _copies(self):
        """(first and last node that read it, the second copy) of stacks that have one."""
        found = {}
        for index, node in enumerate(self.nodes):
            if node.primitive == "scan":
                first = sum(scan_counts(node.params))
                for stack, layer in zip(node.inputs[first:], node.bodies[0].inputs[first:], strict=True):
                    if size := second_copy(stack, layer, node.bodies[0], self.platform):
                        start = found[id(stack)][0] if id(stack) in found else index
                        found[id(stack)] = start, index, Value(size, stack.shape, "", f"{stack.name}/second copy")
        return list(found.values())

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
            copies = [copy for first, last, copy in self.copies if first <= index <= last]
            if node.bodies:
                held, inner = self._loop(node, dying, live)
                moment = _moment((*held, *copies, *inner.values), inner.at)
            else:
                self._write_over(node, stored, dying, live)
                moment = _moment((*live.values(), *copies, *stored), node.outputs[0].name)
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
            moments = [_Walk(body, body.outputs, self.platform).worst() for body in node.bodies]
            return tuple(live.values()), max(moments, key=lambda moment: moment.bytes)
        (body,), (first, count) = node.bodies, scan_counts(node.params)
        starts = _ids(node.inputs[first : first + count]) & _ids(dying)
        held = [value for value in live.values() if id(value) not in starts]
        held += [value for value in node.outputs[count:] if value is not None]
        walk = _Walk(body, body.outputs[:count], self.platform, body.outputs[count:], body.inputs[first : first + count])
        return tuple(held), walk.worst()


def second_copy(stack: Value, layer: Value, body: Dataflow, platform: str) -> int:
    """Bytes of the copy that a compiler makes of a stack before a loop whose body reads `layer` of it; 0 for none."""
    readers = [node for node in body.nodes if any(value is layer for value in node.inputs)]
    if platform == "tpu":
        casts = {node.outputs[0].bytes for node in readers if node.primitive == "convert_element_type"}
        smaller = (
            len(casts) == 1 and all(node.primitive == "convert_element_type" for node in readers) and min(casts) < layer.bytes
        )
        return stack.bytes * min(casts) // layer.bytes if smaller else 0
    if platform == "gpu":
        casts = [layer, *(node.outputs[0] for node in readers if node.primitive == "convert_element_type")]
        gathers = [node for node in body.nodes if node.primitive in GATHERS and any(node.inputs[0] is cast for cast in casts)]
        return stack.bytes if any(_length_before_gathered(node) > 1 for node in gathers) else 0
    return 0


def _length_before_gathered(node):
    """Product of the axes before the one that grows."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    grown = next((axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if new > old), 0)
    return math.prod(before[:grown])


def _is_fused(node: Node) -> bool:
    return any(value is not None and value.fused for value in node.outputs)


def _ids(values: Iterable[Value | None]) -> set[int]:
    return {id(value) for value in values if value is not None}


def _moment(values, at) -> Moment:
    return Moment(sum(value.bytes for value in values), tuple(values), at)
