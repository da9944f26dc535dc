"""The jaxpr of a step as straight pieces: bodies of loops, branches and `shard_map`s, each with how often it runs.

Calls (`jit`, custom gradients, checkpoints) are spliced into the body around them, so that what a body computes can be followed from
equation to equation; what nobody needs is cut off first, as a compiler does. Kernels, and the CPU's loop over experts, stay one equation.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Literal, jaxprs_in_params

from moe_jax.config import ModelConfig
from moe_jax.plan.dataflow import array_shape
from moe_jax.plan.program import Step
from moe_jax.plan.what_runs import what_runs

CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "remat")


@dataclass(frozen=True)
class Value:
    """An array within a body.

    Attributes:
      key: what tells it from others; None for a literal.
      shape: of one device's part of it.
      dtype: its name.
      bytes: of one device's part.
      whole: the shape of all parts together; of one device's own in a `shard_map`.
      axes: the mesh axes that split it.
    """

    key: int | None
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    whole: tuple[int, ...]
    axes: frozenset[str]


@dataclass(frozen=True)
class Equation:
    """One operation; `path` is JAX's names of the place it came from, outermost first."""

    primitive: str
    params: Mapping[str, Any]
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    path: str


@dataclass(frozen=True)
class Body:
    """A straight piece of program.

    Attributes:
      equations: in order.
      ins, outs: what it is given and what it gives back.
      times: how often it runs in a step.
      share: of its runs that take this branch, on average: 1 outside branches.
      scans: loops around it.
      manual: whether it is inside a `shard_map`.
    """

    equations: tuple[Equation, ...]
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    times: int
    share: float
    scans: int
    manual: bool


def bodies(step: Step) -> Iterator[Body]:
    """Every body of the step, the outermost first.

    Of a branch on `model.attention.full_every` the share of layers that take it; of any other the cheaper one, which is the path
    without overflow of an exchange (`exchange_overflow = "exact"`) and the step that is not skipped.
    """
    yield from _Reader(step.config.model).read(what_runs(step.traced.jaxpr), "", 1, 1.0, 0, False)


def is_expert_loop(equation: Equation) -> bool:
    """Whether this is the loop over experts of the CPU's grouped products (`ops.grouped_matmul_cpu`), whose blocks are loops too."""
    if equation.primitive != "scan" or "experts" not in equation.path.split("/"):
        return False
    return any(e.primitive.name == "while" for jaxpr in jaxprs_in_params(equation.params) for e in jaxpr.eqns)


class _Reader:
    def __init__(self, model: ModelConfig):
        self.model, self.count = model, 0

    def read(self, jaxpr, path, times, share, scans, manual):
        names: dict[Any, Value] = {}
        ins = tuple(self.value(v, names, manual) for v in (*jaxpr.constvars, *jaxpr.invars))
        equations = list(self.flat(jaxpr, path, names, manual))
        outs = tuple(self.value(v, names, manual) for v in jaxpr.outvars)
        yield Body(tuple(equations), ins, outs, times, share, scans, manual)
        for equation in equations:
            if equation.primitive == "pallas_call" or is_expert_loop(equation):
                continue
            here, deeper = f"{equation.path}/{equation.primitive}", list(jaxprs_in_params(equation.params))
            if equation.primitive == "scan":
                length = equation.params["length"]
                yield from self.read(deeper[0], here, times * length, share, scans + 1, manual)
            elif equation.primitive == "cond":
                for body, part in zip(deeper, self.shares(equation, deeper), strict=True):
                    yield from self.read(body, here, times, share * part, scans, manual)
            elif equation.primitive != "while":  # how often those run is data
                for body in deeper:
                    yield from self.read(body, here, times, share, scans, manual or equation.primitive == "shard_map")

    def flat(self, jaxpr, path, names, manual):
        for eqn in jaxpr.eqns:
            here = "/".join(filter(None, (path, str(eqn.source_info.name_stack))))
            body = next(jaxprs_in_params(eqn.params), None) if eqn.primitive.name in CALLS else None
            if body is not None:
                given = [self.value(v, names, manual) for v in eqn.invars]
                within = dict(zip(body.invars, given[len(given) - len(body.invars) :], strict=True))
                yield from self.flat(body, f"{here}/{eqn.primitive.name}", within, manual)
                names |= {v: self.value(w, within, manual) for v, w in zip(eqn.outvars, body.outvars, strict=True)}
                continue
            ins = tuple(self.value(v, names, manual) for v in eqn.invars)
            outs = tuple(self.value(v, names, manual) for v in eqn.outvars)
            yield Equation(eqn.primitive.name, eqn.params, ins, outs, here)

    def value(self, var, names, manual):
        if isinstance(var, Literal):
            return Value(None, (), "", 0, (), frozenset())
        if var not in names:
            self.count += 1
            names[var] = _value(self.count, var.aval, manual)
        return names[var]

    def shares(self, equation, branches):
        if "attention" in equation.path.split("/") and self.model.attention.full_every:
            windows = [self.model.attention.layer_window(layer) for layer in range(self.model.num_layers)]
            full = windows.count(0) / len(windows)
            return (1 - full, full)
        weights = [_weight(branch) for branch in branches]
        cheapest = weights.index(min(weights))
        return [float(i == cheapest) for i in range(len(branches))]


def _weight(jaxpr):
    """Products of a branch, to tell which is the cheaper one."""
    own = sum(eqn.primitive.name in ("dot_general", "pallas_call") for eqn in jaxpr.eqns)
    return own + sum(_weight(body) for eqn in jaxpr.eqns for body in jaxprs_in_params(eqn.params))


def _value(key, aval, manual):
    whole = tuple(getattr(aval, "shape", ()))
    shape, axes = whole, frozenset()
    if not manual and whole:
        shape, spec = array_shape(aval), getattr(aval.sharding, "spec", ())
        axes = frozenset(axis for names in spec for axis in ((names,) if isinstance(names, str) else names or ()))
    dtype = getattr(aval, "dtype", None)
    itemsize = getattr(dtype, "itemsize", 4) if not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else 8
    return Value(key, shape, getattr(dtype, "name", ""), math.prod(shape) * itemsize, whole, axes)
