"""What each primitive on arrays with Explicit shardings needs to be sent, and how its results are then laid out.

A rule takes an `Equation` and returns (needs, layouts of the results), or refuses it.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.extend.core import JaxprEqn, Var
from jax.sharding import AxisType

from moe_jax.config import ConfigError

Spec = tuple[tuple[str, ...], ...]  # mesh axes larger than 1 of each dimension


class Need(NamedTuple):
    """A collective: its kind, mesh axes, the operand's dtype and bytes on one device."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    operand_bytes: int


class Equation(NamedTuple):
    """An equation, how its operands are laid out, how its results are asked for (None on Auto axes), and the mesh's sizes."""

    equation: JaxprEqn
    specs: list[Spec]
    given: list[Spec | None]
    sizes: Mapping[str, int]

    @property
    def params(self):
        return self.equation.params

    def expect(self, found: Spec, result: int = 0, subset: bool = False) -> Spec:
        """`found`, checked to be how the result is laid out; with `subset` the result may be split further."""
        wanted = self.given[result]
        if wanted is None:
            return found
        if any(f != w and not (subset and not f) for f, w in zip(found, wanted, strict=True)):
            raise refusal(self.equation, f"{found} becomes {wanted}")
        return wanted

    def local_bytes(self, variable: Var, spec: Spec) -> int:
        parts = math.prod(self.sizes[axis] for axes in spec for axis in axes)
        return variable.aval.size // parts * variable.aval.dtype.itemsize

    def need(self, kind: str, axes, variable: Var, spec: Spec) -> list[Need]:
        axes = tuple(axis for axis in self.sizes if axis in axes)
        return [Need(kind, axes, variable.aval.dtype.name, self.local_bytes(variable, spec))] if axes else []


def is_auto(aval) -> bool:
    """Whether the compiler chooses an array's layout on some axis."""
    sharding = getattr(aval, "sharding", None)
    return sharding is not None and any(kind == AxisType.Auto for kind in sharding.mesh.axis_types or ())


def refusal(equation: JaxprEqn, why: str) -> ConfigError:
    """What is raised of an equation for which that cannot be told."""
    avals = ", ".join(str(v.aval) for v in equation.invars)
    return ConfigError(
        f"{equation.primitive.name} of {avals} ({equation.source_info.name_stack}): what it sends cannot be inferred from its shardings,"
        f" {why}; give it a rule in moe_jax/plan/sharding_rules.py."
    )


def _merged(e: Equation) -> Spec:
    """Of operands of one shape, some of which may be whole."""
    rank = max(map(len, e.specs))
    dims = []
    for i in range(rank):
        axes = {spec[i] for spec in e.specs if len(spec) == rank and spec[i]}
        if len(axes) > 1:
            raise refusal(e.equation, f"dimension {i} is split in {len(axes)} ways")
        dims.append(axes.pop() if axes else ())
    return tuple(dims)


def _elementwise(e):
    return [], [e.expect(_merged(e), i, subset=True) for i in range(len(e.given))]


def _each(e):
    return [], [e.expect(spec, i) for i, spec in enumerate(e.specs)]


def _made(e):
    return [], [
        spec if spec is not None else ((),) * len(out.aval.shape) for spec, out in zip(e.given, e.equation.outvars, strict=True)
    ]


def _along(*names: str) -> Callable:
    """A rule for what works along some dimensions, which must be whole."""

    def rule(e):
        dims = next(e.params[name] for name in names if name in e.params)
        dims = dims if isinstance(dims, tuple | list) else (dims,)
        if any(spec[dim] for spec in e.specs for dim in dims if spec):
            raise refusal(e.equation, f"it works along dimensions {dims}")
        return _elementwise(e)

    return rule


def _resized(e):
    """Slices, updates of slices, pads: where the length changes a dimension must be whole."""
    shape = e.equation.invars[0].aval.shape
    shapes = [v.aval.shape for v in (*e.equation.invars, *e.equation.outvars) if len(v.aval.shape) == len(shape)]
    if any(len({s[i] for s in shapes}) > 1 and axes for i, axes in enumerate(e.specs[0])):
        raise refusal(e.equation, "it cuts a dimension that is split")
    return _elementwise(e)


def _broadcast(e):
    out = [()] * len(e.params["shape"])
    for axes, to in zip(e.specs[0], e.params["broadcast_dimensions"], strict=True):
        out[to] = axes
    return [], [e.expect(tuple(out), subset=True)]


def _stack(e):
    dims = list(_merged(e))
    dims.insert(e.params["axis"], ())
    return [], [e.expect(tuple(dims), subset=True)]


def _transpose(e):
    return [], [e.expect(tuple(e.specs[0][i] for i in e.params["permutation"]))]


def _squeeze(e):
    return [], [e.expect(tuple(axes for i, axes in enumerate(e.specs[0]) if i not in e.params["dimensions"]))]


def _reshape(e):
    """Local where each split dimension stays the outermost of what it becomes or was made of."""

    def blocks(shape, spec):
        return sorted((math.prod(shape[:i]), axes) for i, axes in enumerate(spec) if axes)

    before, (out,) = e.equation.invars[0].aval.shape, e.equation.outvars
    if e.given[0] is None or blocks(before, e.specs[0]) != blocks(out.aval.shape, e.given[0]):
        raise refusal(e.equation, f"{e.specs[0]} becomes {e.given[0]}")
    return [], [e.given[0]]


def _reduce(e):
    axes = e.params["axes"]
    found = tuple(axes_ for i, axes_ in enumerate(e.specs[0]) if i not in axes)
    out = e.expect(found)
    summed = [axis for i in axes for axis in e.specs[0][i]]
    return e.need("all-reduce", summed, e.equation.outvars[0], out), [out]


def _dot(e):
    (left, right), (left_batch, right_batch) = e.params["dimension_numbers"]
    a, b = e.specs
    if [a[i] for i in left] != [b[i] for i in right]:
        raise refusal(e.equation, "its operands are split in different ways along what is summed")
    summed = [axis for i in left for axis in a[i]]
    free = [a[i] for i in range(len(a)) if i not in (*left, *left_batch)]
    free += [b[i] for i in range(len(b)) if i not in (*right, *right_batch)]
    batch = [x or y for x, y in zip((a[i] for i in left_batch), (b[i] for i in right_batch), strict=True)]
    found = e.expect((*batch, *free), subset=True)
    extra = {axis for axes in found for axis in axes} & set(summed)
    if extra:
        raise refusal(e.equation, f"its sum is over {summed}, some of which its result is split over")
    return e.need("all-reduce", summed, e.equation.outvars[0], found), [found]


def _reshard(e):
    before, (operand,) = e.specs[0], e.equation.invars
    after = before if e.given[0] is None else e.given[0]
    kept = {axis for axes in after for axis in axes}
    held = {axis for axes in before for axis in axes}
    needs, now = [], list(before)
    for i, axes in reversed([*enumerate(before)]):  # the last dimension first, as XLA has it
        stays = tuple(axis for axis in axes if axis in kept)
        if axes[: len(stays)] != stays or after[i][: len(stays)] != stays:
            raise refusal(e.equation, f"{before} becomes {after}")
        needs += e.need("all-gather", axes[len(stays) :], operand, tuple(now))
        now[i] = stays
    if any(axis in held for i, axes in enumerate(after) for axis in axes[len(now[i]) :]):
        raise refusal(e.equation, f"{before} becomes {after}")
    return needs, [after]


def _gather(e):
    table, indices = e.specs
    if any(table) or indices[-1]:
        raise refusal(e.equation, "its table is split")
    out, batch = [()] * len(e.equation.outvars[0].aval.shape), list(indices[:-1])
    places = [i for i in range(len(out)) if i not in e.params["dimension_numbers"].offset_dims]
    for place, axes in zip(places, batch, strict=True):
        out[place] = axes
    return [], [e.expect(tuple(out))]


def _scatter_add(e):
    table, indices, updates = e.specs
    window = e.params["dimension_numbers"].update_window_dims
    if any(table) or indices[-1] or any(updates[i] for i in window):
        raise refusal(e.equation, "its table is split")
    batch = [axes for i, axes in enumerate(updates) if i not in window]
    summed = [axis for one, other in zip(batch, indices[:-1], strict=True) for axis in one or other]
    out = e.expect(table)
    return e.need("all-reduce", summed, e.equation.outvars[0], out), [out]


_ELEMENTWISE = """abs acos add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p cos cosh div eq eq_to erf erf_inv
erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul mul_add ne neg nextafter not or pow
population_count reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
square stop_gradient sub tan tanh xor name"""
_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_prod"
RULES = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    **dict.fromkeys(("slice", "dynamic_slice", "dynamic_update_slice", "pad"), _resized),
    **dict.fromkeys(("iota", "random_bits", "random_wrap", "random_unwrap"), _made),
    **dict.fromkeys(("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp"), _along("axis")),
    "sort": _along("dimension"),
    "rev": _along("dimensions"),
    "concatenate": _along("dimension"),
    "split": _along("axis"),
    "optimization_barrier": _each,
    "broadcast_in_dim": _broadcast,
    "stack": _stack,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "dot_general": _dot,
    "reshard": _reshard,
    "gather": _gather,
    "scatter-add": _scatter_add,
}
