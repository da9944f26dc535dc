"""The part of a jaxpr that a compiler keeps: without what nobody uses.

XLA drops that before anything runs, collectives too, so that a count of what was written would be more than what is sent.
"""

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def what_runs(jaxpr: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """`jaxpr` without dead code, inner jaxprs included; of an `optimization_barrier` each array lives or dies alone, as in XLA."""
    single = _one_by_one(getattr(jaxpr, "jaxpr", jaxpr), {})
    return partial_eval.dce_jaxpr(single, [True] * len(single.outvars), instantiate=True)[0]


def _one_by_one(jaxpr, done) -> Jaxpr:
    """Every barrier of several arrays as barriers of one; `done` has the inner jaxprs that were gone through, by identity."""
    if id(jaxpr) not in done:
        equations = []
        for equation in jaxpr.eqns:
            if equation.primitive.name == "optimization_barrier":
                pairs = zip(equation.invars, equation.outvars, strict=True)
                equations += [equation.replace(invars=[operand], outvars=[result]) for operand, result in pairs]
            else:
                params = {name: _inner(value, done) for name, value in equation.params.items()}
                equations.append(equation.replace(params=params))
        done[id(jaxpr)] = jaxpr, jaxpr.replace(eqns=equations)  # the old one too, lest its identity be given to another
    return done[id(jaxpr)][1]


def _inner(value, done):
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_one_by_one(value.jaxpr, done))
    if isinstance(value, Jaxpr):
        return _one_by_one(value, done)
    return type(value)(_inner(v, done) for v in value) if type(value) in (tuple, list) else value
