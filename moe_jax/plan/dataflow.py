"""A traced step as one device's dataflow: which values a compiler would store, how large each is, and who reads it when.

Calls (`jit`, `remat`, `shard_map`, custom gradients) are entered and disappear; loops and conditionals stay, with a dataflow of their own.
Sizes are a device's own: of an array with an Explicit sharding its shard, inside `shard_map` the array that is written there.
"""

import math
from dataclasses import dataclass, field

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxprs_in_params

from moe_jax.plan.loops import scan_counts

_ELEMENTWISE = """
abs add add_any and atan2 bitcast_convert_type broadcast_in_dim cbrt ceil clamp concatenate convert_element_type copy copysign
cos cosh device_put div dynamic_slice eq erf erf_inv erfc exp exp2 expm1 floor gather ge gt integer_pow iota is_finite le log log1p
logistic lt max min mul ne neg nextafter not or pad population_count pow real reduce_precision rem rev round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt square sub tan tanh transpose xor
threefry2x32 random_wrap random_unwrap random_bits random_fold_in random_seed random_split
"""
_VIEWS = "expand_dims name optimization_barrier pcast pvary preduced reshape squeeze stop_gradient sharding_constraint"
_REDUCTIONS = "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"
_IN_PLACE = "dynamic_update_slice scatter scatter-add scatter_add scatter_mul psum psum2 psum_invariant"

FUSED = frozenset(_ELEMENTWISE.split())  # computed where they are read
VIEWS = frozenset(_VIEWS.split())  # the same memory under another shape or name
REDUCTIONS = frozenset(_REDUCTIONS.split())  # compute what they read, and store their result
IN_PLACE = frozenset(_IN_PLACE.split())  # write over an operand that nobody reads later
LOOPS = ("scan", "while", "cond")


@dataclass(eq=False)
class Value:
    """An array that the program computes or is given.

    Attributes:
      bytes: of one device.
      shape: of one device.
      dtype: its name.
      name: the scopes and the primitive it comes from.
      sources: of a value that need not be stored, the values it is computed from.
      fused: whether it need not be stored.
      transposed: whether it is its source with the axes in another order.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    name: str
    sources: tuple["Value", ...] = ()
    fused: bool = False
    transposed: bool = False


@dataclass(eq=False)
class Node:
    """One operation.

    Attributes:
      primitive: its name.
      inputs: in order.
      outputs: in order.
      bodies: of a loop or conditional.
      params: of the equation.
    """

    primitive: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    bodies: tuple["Dataflow", ...] = ()
    params: dict = field(default_factory=dict)


@dataclass(eq=False)
class Dataflow:
    """Operations in the order they were written in.

    Attributes:
      inputs: in order.
      nodes: in order.
      outputs: in order.
    """

    inputs: tuple[Value, ...]
    nodes: list[Node]
    outputs: tuple[Value, ...]


def dataflow(jaxpr: ClosedJaxpr | Jaxpr) -> Dataflow:
    """The dataflow of a traced function: `jax.jit(f).trace(...).jaxpr`. What nobody reads is left out."""
    flow = _flow(getattr(jaxpr, "jaxpr", jaxpr), "")
    _keep_only_what_is_read(flow, [True] * len(flow.outputs))
    return flow


def array_shape(aval) -> tuple[int, ...]:
    """One device's part of an array, by its Explicit sharding."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return tuple(aval.shape)
    axes = ((part,) if isinstance(part, str) else part or () for part in sharding.spec)
    ways = [math.prod(sharding.mesh.shape[name] for name in names) for names in axes]
    return tuple(-(-length // parts) for length, parts in zip(aval.shape, ways, strict=False)) + tuple(aval.shape[len(ways) :])


def _value(aval, name, **settings):
    shape = array_shape(aval) if hasattr(aval, "shape") else ()
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 4)
    return Value(math.prod(shape) * itemsize, shape, str(getattr(aval, "dtype", "")), name, **settings)


def _flow(jaxpr, path, stacks=0) -> Dataflow:
    """Of a body whose last `stacks` inputs are cut out of stacked arrays where they are first read."""
    inputs = [_value(var.aval, "argument") for var in jaxpr.invars]
    parts = {id(part) for part in inputs[len(inputs) - stacks :]}
    for part in inputs[len(inputs) - stacks :]:
        part.fused, part.sources = True, (Value(0, (), "", "stack"),)
    body = _Body()
    outputs = body.enter(jaxpr, inputs, path)
    nodes = []
    for node in body.nodes:
        for value in node.inputs:
            if id(value) in parts:
                parts.discard(id(value))
                nodes.append(Node("dynamic_slice", value.sources, (value,)))
        nodes.append(node)
    return Dataflow(tuple(inputs), nodes, tuple(outputs))


class _Body:
    """The operations of a body, calls entered; what is computed twice from the same values is computed once, as compilers do."""

    def __init__(self):
        self.nodes: list[Node] = []
        self.known = {}

    def enter(self, jaxpr, inputs, path) -> list[Value]:
        """Appends a jaxpr's operations; its outputs."""
        values = dict(zip(jaxpr.invars, inputs, strict=True))
        values |= {var: _value(var.aval, "constant") for var in jaxpr.constvars}

        def read(atom):
            return self._literal(atom) if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            arguments = [read(atom) for atom in equation.invars]
            values |= zip(equation.outvars, self._apply(equation, arguments, path), strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _literal(self, atom):
        key = str(atom.val), str(atom.aval)
        return self.known.setdefault(key, _value(atom.aval, "constant", fused=True))

    def _apply(self, equation, arguments, path) -> list[Value]:
        primitive, inside = equation.primitive.name, list(jaxprs_in_params(equation.params))
        scope = "/".join(filter(None, [path, str(equation.source_info.name_stack)]))
        if inside and primitive in LOOPS:
            stacks = len(arguments) - sum(scan_counts(equation.params)) if primitive == "scan" else 0
            bodies = tuple(_flow(body, scope, stacks) for body in inside)
            return self._append(equation, arguments, f"{scope}/{primitive}", bodies)
        if inside and primitive != "pallas_call" and len(inside[0].invars) == len(arguments):
            return self.enter(inside[0], arguments, scope)
        if primitive in VIEWS or _moves_nothing(equation, arguments):
            return arguments[: len(equation.outvars)]
        if inside:
            return self._append(equation, arguments, f"{scope}/{primitive}")
        key = primitive, tuple(map(id, arguments)), str(equation.params)
        if key not in self.known:
            self.known[key] = self._append(equation, arguments, f"{scope}/{primitive}")
        return self.known[key]

    def _append(self, equation, arguments, name, bodies=()) -> list[Value]:
        primitive, settings = equation.primitive.name, {}
        if primitive in FUSED:
            settings = {"fused": True, "sources": tuple(arguments), "transposed": primitive == "transpose"}
        outputs = [_value(var.aval, name, **settings) for var in equation.outvars]
        self.nodes.append(Node(primitive, tuple(arguments), tuple(outputs), bodies, equation.params))
        return outputs


def _moves_nothing(equation, arguments):
    """A change of layout or a sum over axes of size 1."""
    if equation.primitive.name not in ("reshard", "psum", "psum_invariant", "all_gather", "all_gather_invariant", "psum2"):
        return False
    mesh = next((var.aval.sharding.mesh for var in equation.outvars if not var.aval.sharding.mesh.empty), None)
    if equation.primitive.name == "reshard":
        return arguments[0].shape == array_shape(equation.outvars[0].aval)
    axes = equation.params.get("axes", equation.params.get("axis_name", ()))
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    return mesh is not None and math.prod(mesh.shape.get(axis, 2) for axis in axes) == 1


def _keep_only_what_is_read(flow, wanted) -> None:
    """Drops nodes that no wanted output needs, and of loops the results that nobody reads."""
    needed = {id(value) for value, keep in zip(flow.outputs, wanted, strict=True) if keep}
    kept = []
    for node in reversed(flow.nodes):
        read = [id(value) in needed for value in node.outputs]
        if not any(read):
            continue
        needed |= {id(value) for value in _inputs_read(node, read)}
        kept.append(node)
    flow.nodes[:] = reversed(kept)


def _inputs_read(node, read):
    if not node.bodies:
        return node.inputs
    if node.primitive == "while":
        for body in node.bodies:
            _keep_only_what_is_read(body, [True] * len(body.outputs))
        return node.inputs
    start, carry = scan_counts(node.params) if node.primitive == "scan" else (0, 0)
    for body in node.bodies:
        wanted = [True] * carry + read[carry:]
        _keep_only_what_is_read(body, wanted)
        body.outputs = tuple(value if keep else None for value, keep in zip(body.outputs, wanted, strict=True))
    node.outputs = tuple(
        value if keep else None for value, keep in zip(node.outputs, [True] * carry + read[carry:], strict=True)
    )
    used = {id(value) for body in node.bodies for value in _all_read(body)}
    first = 1 if node.primitive == "cond" else 0
    places = zip(*(body.inputs for body in node.bodies), strict=True)
    flags = [any(id(value) in used for value in place) for place in places]
    flags = [flag or start <= i < start + carry for i, flag in enumerate(flags)]
    return [*node.inputs[:first], *(value for value, flag in zip(node.inputs[first:], flags, strict=True) if flag)]


def _all_read(flow):
    for node in flow.nodes:
        yield from node.inputs
    yield from (value for value in flow.outputs if value is not None)
