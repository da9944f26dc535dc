"""What a step moves through a device's memory besides its matrix products: a stated model, read off the jaxpr.

Chains of elementwise operations, broadcasts, reshapes, transposes and the sums at their ends are one pass, as compilers fuse them: a pass
reads every array it starts from once and writes what a product, a kernel, a collective, a sort, a gather, a loop's end or several
such passes of the same inputs need. Then

    product, kernel        in `work.Product.bytes`
    gather, slice          what is taken, read and written
    scatter                the updates three times: read, and what they change read and written
    sort, running sum      read and written once
    collective             its operand read and its result written

The optimizer is such chains. Bytes are of one device, at the most its buffers hold: passes over an exchange's buffers do not shrink
with the load. Not in it: layouts, spills, what a compiler keeps in registers or cache between passes.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from moe_jax.plan.bodies import Body, Equation, Value, bodies
from moe_jax.plan.program import Step
from moe_jax.plan.work import is_score_product

_ELSEWHERE = ("dot_general", "pallas_call")  # products count their own
_INTO_BODIES = ("scan", "cond", "while", "shard_map")
_TAKEN = ("gather", "dynamic_slice")
_PLACED = ("scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "dynamic_update_slice")
_PASSES = ("sort", "cumsum", "cumlogsumexp", "cummax", "cumprod", "top_k", "reshard")
# The same bytes by another name.
_SAME = (
    "reshape",
    "squeeze",
    "expand_dims",
    "pvary",
    "copy",
    "optimization_barrier",
    "sharding_constraint",
    "mesh_cast",
    "name",
)
_SUMS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin")
_SCOPES = ("attention", "route", "dispatch", "exchange", "experts", "combine")


@dataclass(frozen=True)
class Move:
    """Bytes of one device through its memory in a step.

    Attributes:
      part: a named scope of the layers, "scores" for the body of attention with its scores, "optimizer", or "model" for norms, residuals,
        embedding, loss.
      bytes: of all `times`.
      times: passes in a step, on average where a branch decides.
    """

    part: str
    bytes: float
    times: float


def moves(step: Step) -> list[Move]:
    """Everything that moves, by part."""
    totals = defaultdict(lambda: [0.0, 0.0])
    for body in bodies(step):
        scores = any(is_score_product(equation, body) for equation in body.equations)
        for path, size in _of_body(body):
            part = _part(path)
            entry = totals["scores" if scores and part == "attention" else part]
            entry[0] += body.times * body.share * size
            entry[1] += body.times * body.share
    return [Move(part, *sums) for part, sums in totals.items()]


def _part(path):
    scope = next((scope for scope in reversed(path.split("/")) if scope in _SCOPES), None)
    return scope or ("model" if "jvp" in path else "optimizer")


def _of_body(body: Body):
    """(path, bytes) of every pass of a body."""
    made_by, same = {}, {}
    for equation in body.equations:
        if _is_same(equation):
            same |= {out.key: same.get(value.key, value) for value, out in zip(equation.ins, equation.outs, strict=True)}
        elif _fuses(equation):
            made_by |= {value.key: equation for value in equation.outs}
    needed: dict[int | None, Value] = {}

    def need(values):
        needed.update((value.key, value) for value in (same.get(value.key, value) for value in values))

    need(body.outs)
    for equation in body.equations:
        if equation.primitive in _SUMS:
            need(equation.outs)
        elif not _is_same(equation) and not _fuses(equation):
            need(equation.ins)
            if size := _bytes(equation):
                yield equation.path, size
    written = [(value, made_by[key]) for key, value in needed.items() if key in made_by]
    yield from _passes([(value, by.path, _start(by, made_by, same, needed)) for value, by in written])


def _passes(written):
    """Arrays of one shape are made in one pass where they are made of an array of that shape in common, or one of another one without a
    sum between."""
    groups = []
    for value, path, start in written:
        starts = {key for key, (shape, _) in start.items() if shape == value.shape}
        group = {"shape": value.shape, "starts": starts, "path": path, "read": dict(start), "made": {value.key: value.bytes}}
        for other in [g for g in groups if g["shape"] == value.shape and _in_one(g, group)]:
            groups.remove(other)
            for part in ("starts", "read", "made"):
                group[part] |= other[part]
        groups.append(group)
    for group in groups:
        read = sum(size for key, (_, size) in group["read"].items() if key not in group["made"])
        yield group["path"], read + sum(group["made"].values())


def _in_one(a, b):
    if a["starts"] & b["starts"]:
        return True
    later = next((x for x, y in ((a, b), (b, a)) if x["starts"] & y["made"].keys()), None)
    return later is not None and all(shape in ((), later["shape"]) for shape, _ in later["read"].values())


def _start(equation, made_by, same, stored):
    """What the pass that ends in `equation` reads: {key: (shape, bytes)}."""
    found, todo, seen = {}, [equation], set()
    while todo:
        for value in todo.pop().ins:
            value = same.get(value.key, value)
            if value.key is None or value.key in seen:
                continue
            seen.add(value.key)
            if value.key in made_by and value.key not in stored:
                todo.append(made_by[value.key])
            else:
                found[value.key] = (value.shape, value.bytes)
    return found


def _is_same(equation: Equation) -> bool:
    name, ins, outs = equation.primitive, equation.ins, equation.outs
    return name in _SAME or (name == "broadcast_in_dim" and math.prod(ins[0].whole) == math.prod(outs[0].whole) > 1)


def _fuses(equation: Equation) -> bool:
    name = equation.primitive
    alone = (*_ELSEWHERE, *_INTO_BODIES, *_TAKEN, *_PLACED, *_PASSES)
    return name not in alone and not _sends(equation)


def _sends(equation: Equation) -> bool:
    """Whether it names a mesh axis, as collectives do."""
    axes = equation.params.get("axis_name", equation.params.get("axes", ()))
    return any(isinstance(axis, str) for axis in (axes if isinstance(axes, tuple | list) else (axes,)))


def _bytes(equation: Equation) -> int:
    """Of what does not fuse."""
    name, ins, outs = equation.primitive, equation.ins, equation.outs
    if name in _ELSEWHERE or name in _INTO_BODIES:
        return 0
    if name == "reshard" and ins[0].axes == outs[0].axes:
        return 0
    if name in _TAKEN:
        return 2 * sum(value.bytes for value in outs)
    if name in _PLACED:
        return 3 * ins[1 if name == "dynamic_update_slice" else 2].bytes
    return sum(value.bytes for value in (*ins, *outs))
