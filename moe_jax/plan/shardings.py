"""What an equation on arrays with Explicit shardings asks of the network: the collectives that the partitioner must put in.

An equation of a jaxpr says how its operands and its results are laid out. Where the results need what other devices hold, something is
sent: a sum over a split dimension is an all-reduce of what every device has of it, a `reshard` that drops an axis is an all-gather.
Everything else must be local; an equation for which that cannot be shown is refused, so that nothing is missed in silence.

Where `jax.sharding.auto_axes` leaves layouts to the compiler (looking up embeddings), they are those of the operands carried along.
"""

from collections.abc import Mapping

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import PartitionSpec

from moe_jax.config import ConfigError
from moe_jax.plan.loops import scan_counts
from moe_jax.plan.sharding_rules import RULES, Equation, Need, Spec, is_auto, refusal

CALLS = ("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call", "scan", "while", "cond", "shard_map")


class Layouts:
    """Reads the equations of one jaxpr, in order."""

    def __init__(self, sizes: Mapping[str, int], known: Mapping[Var, Spec] | None = None):
        """Args: `sizes` of the mesh's axes in order; `known` layouts of variables on Auto axes."""
        self.sizes, self.auto = sizes, dict(known or {})
        self.made, self.asked = {}, set()

    def spec(self, variable: Var | Literal) -> Spec:
        """How a variable is laid out."""
        if not isinstance(variable, Literal) and variable in self.auto:
            return self.auto[variable]
        sharding = getattr(variable.aval, "sharding", None)
        if sharding is None or isinstance(variable, Literal):
            return ((),) * len(getattr(variable.aval, "shape", ()))
        if getattr(sharding.spec, "unreduced", None):
            raise ConfigError(
                f"{variable.aval} is unreduced, and the traffic of such sums cannot be inferred; reduce it at once."
            )
        return self.normal(sharding.spec, len(variable.aval.shape))

    def _is_repeated(self, equation, spec):
        """Whether the same array was laid out so before, the same cast of it: a table that is both embedding and head."""
        (operand,), (result,) = equation.invars, equation.outvars
        if isinstance(operand, Literal):
            return False
        source, steps = self.made.get(operand, (operand, ()))
        way = source, (*steps, (result.aval.dtype, spec))
        self.made[result] = way
        repeated = way in self.asked
        self.asked.add(way)
        return repeated

    def into(self, equation: JaxprEqn, body: Jaxpr) -> "Layouts | None":
        """The layouts of a jaxpr that this equation runs; None within `shard_map`, where collectives are written by hand.

        Raises:
          ConfigError: layouts that do not carry over.
        """
        name, specs = equation.primitive.name, [self.spec(variable) for variable in equation.invars]
        if name == "shard_map":
            self._check_island(equation, specs)
            return None
        if name == "scan":
            first = sum(scan_counts(equation.params))
            if any(spec and spec[0] for spec in specs[first:]):
                raise refusal(equation, "it scans over a dimension that is split")
        carried = [variable for variable in equation.invars if not isinstance(variable, Literal) and variable in self.auto]
        if any(any(self.auto[variable]) for variable in carried) and name != "jit":
            raise refusal(equation, "its operands are on Auto axes")
        known = zip(body.invars, equation.invars, strict=True) if name == "jit" else ()
        return Layouts(self.sizes, {inner: self.spec(outer) for inner, outer in known if outer in carried})

    def out_of(self, equation: JaxprEqn, body: Jaxpr, inside: "Layouts | None") -> None:
        """Notes the layouts of what a call returns on Auto axes."""
        if equation.primitive.name == "jit":
            for outer, inner in zip(equation.outvars, body.outvars, strict=True):
                if is_auto(outer.aval):
                    self.auto[outer] = inside.spec(inner)

    def _check_island(self, equation, specs):
        manual = equation.params["manual_axes"] if "manual_axes" in equation.params else equation.params["newly_manual_axes"]
        if left := [axis for axis, size in self.sizes.items() if size > 1 and axis not in manual]:
            raise refusal(equation, f"the axes {left} are not manual in it")
        for spec, wanted in zip(specs, equation.params["in_specs"], strict=True):
            if spec != self.normal(wanted, len(spec)):
                raise refusal(equation, f"an operand laid out as {spec} is asked for as {wanted}")

    def normal(self, spec: PartitionSpec, rank: int) -> Spec:
        """A spec in full, axes of size 1 left out."""
        dims = ((axes,) if isinstance(axes, str) else axes or () for axes in spec)
        dims = [tuple(axis for axis in axes if self.sizes.get(axis, 1) > 1) for axes in dims]
        return (*dims, *((),) * (rank - len(dims)))

    def needs(self, equation: JaxprEqn) -> list[Need]:
        """What an equation without a jaxpr of its own asks for; [] for one that is local.

        Raises:
          ConfigError: one of which that cannot be told.
        """
        specs, outs = [self.spec(v) for v in equation.invars], equation.outvars
        given = [None if is_auto(out.aval) else self.spec(out) for out in outs]
        if not any(map(any, specs)) and not any(spec and any(spec) for spec in given):
            return []
        name = equation.primitive.name
        rule = RULES.get(name)
        if rule is None:
            raise refusal(equation, "it is not known")
        reader = Equation(equation, specs, given, self.sizes)
        needs, found = rule(reader)
        if name in ("reshard", "convert_element_type"):
            needs = [] if self._is_repeated(equation, found[0]) else needs
        for out, is_given, spec in zip(outs, given, found, strict=True):
            if is_given is None:
                self.auto[out] = spec
        return needs
