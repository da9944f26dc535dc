"""The communication ledger of a traced function: the collectives written inside `shard_map`, as they were asked for.

What the partitioner adds for arrays with Explicit shardings is not in a jaxpr; `ledger.ledger` reads that from the program,
`moe_jax.plan.traffic` infers it.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

from moe_jax.analysis.ledger import Branch, Entry, Sizes, wire_bytes

_KINDS = {
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "unreduced_psum": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "ppermute": "collective-permute",
}
_SILENT = ("axis_index", "pvary", "preduced", "vary_unreduced_cast", "vary_unreduced_cast_p")  # know an axis, send nothing


def ledger_of_jaxpr(jaxpr: ClosedJaxpr | Jaxpr, mesh: Sizes) -> list[Entry]:
    """Every collective of a jaxpr, in order, one entry for each operand.

    Scans multiply; branches of `cond` are kept apart; jit, shard_map, checkpoint and custom gradients are gone through. A collective
    whose result nobody uses is counted too, though a compiler drops it.

    Args:
      jaxpr: `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`.
      mesh: the mesh, or its axis sizes in order.

    Raises:
      ValueError: a collective in a `while` loop, whose trip count a jaxpr does not say, over parts of an axis, or of unknown kind.
    """
    sizes, serial = dict(getattr(mesh, "shape", mesh)), itertools.count()
    return list(_walk(getattr(jaxpr, "jaxpr", jaxpr), sizes, serial, (), "", ()))


def _walk(jaxpr, sizes, serial, loops, path, branch) -> Iterator[Entry]:
    for equation in jaxpr.eqns:
        primitive = equation.primitive.name
        stack = str(equation.source_info.name_stack)
        name = "/".join(filter(None, [path, stack, primitive]))
        inside = list(jaxprs_in_params(equation.params))
        enter = functools.partial(_walk, sizes=sizes, serial=serial, path=name)
        if is_collective(equation, sizes):
            yield from entries_of(equation, sizes, loops, name, branch)
        elif primitive == "scan":
            yield from enter(inside[0], loops=(*loops, equation.params["length"]), branch=branch)
        elif primitive == "while":
            if any(next(enter(body, loops=loops, branch=branch), None) for body in inside):
                raise ValueError(f"{name} has collectives in it, and a jaxpr does not say how often it runs; use a scan.")
        elif primitive == "cond":
            conditional = f"{name}#{next(serial)}"
            for index, body in enumerate(inside):
                yield from enter(body, loops=loops, branch=(*branch, Branch(conditional, index)))
        else:
            for body in inside:
                yield from enter(body, loops=loops, branch=branch)


def entries_of(
    equation: JaxprEqn, sizes: Mapping[str, int], loops: tuple[int, ...], name: str, branch: tuple[Branch, ...]
) -> Iterator[Entry]:
    """An entry for each array of one collective. Raises ValueError for one over parts of an axis."""
    kind, params = _KINDS[equation.primitive.name.removesuffix("_start")], equation.params
    if params.get("axis_index_groups") is not None:
        raise ValueError(
            f"{name} is over parts of an axis (axis_index_groups), which the ledger cannot name; split the mesh axis."
        )
    axes = tuple(axis for axis in sizes if axis in _axes(params) and sizes[axis] > 1)
    if not axes:
        return
    group = math.prod(sizes[axis] for axis in axes)
    bounded = kind == "ragged-all-to-all"
    for operand in equation.invars[:1] if bounded else equation.invars:
        size = operand.aval.size * operand.aval.dtype.itemsize
        yield Entry(kind, axes, operand.aval.dtype.name, wire_bytes(kind, size, group), loops, name, branch, bounded)


def is_collective(equation: JaxprEqn, sizes: Mapping[str, int]) -> bool:
    """Whether it is a collective. Raises ValueError for what names a mesh axis and is neither one that is known nor known to be silent."""
    primitive = equation.primitive.name
    if primitive.removesuffix("_start") in _KINDS:
        return True
    if primitive in _SILENT or primitive.endswith("_done"):
        return False
    if any(axis in sizes for axis in _axes(equation.params)):
        raise ValueError(f"{primitive} is over {_axes(equation.params)}, and the ledger does not know how to count it.")
    return False


def _axes(params) -> tuple:
    axes = params.get("axis_name", params.get("axes", ()))
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)
