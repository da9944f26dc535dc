"""All weights of a model in 8 or 4 bits, and what that costs: bytes and error by kind of matrix."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops.quantised import Format, Quantised, check, dequantise, quantise, summed_axes


class Kind(NamedTuple):
    """The parameters of one name, digits in it left out.

    Attributes:
      name: as `w_up_EDF`; `w_in_EDF` for `w_in0_EDF`, `w_in1_EDF`, ...
      arrays: how many there are.
      numbers: in all of them.
      bytes_before: as they were given.
      bytes_after: integers and scales; the same for what stays as it is.
      error: root mean square of what is lost over that of the weights, 0.01 for 1%; None for what stays as it is.
    """

    name: str
    arrays: int
    numbers: int
    bytes_before: int
    bytes_after: int
    error: float | None


@dataclass(frozen=True)
class Report:
    """What became of a model's parameters: kinds, the largest first."""

    kinds: tuple[Kind, ...]

    @property
    def bytes_before(self) -> int:
        """Of all parameters as they were given."""
        return sum(kind.bytes_before for kind in self.kinds)

    @property
    def bytes_after(self) -> int:
        """Of all parameters as they are stored."""
        return sum(kind.bytes_after for kind in self.kinds)

    def __str__(self):
        rows = [("", "numbers", "MB before", "MB after", "error")]
        for kind in (
            *self.kinds,
            Kind("all", 0, sum(k.numbers for k in self.kinds), self.bytes_before, self.bytes_after, None),
        ):
            megabytes = (f"{size / 1e6:,.3f}" for size in (kind.bytes_before, kind.bytes_after))
            rows.append((kind.name, f"{kind.numbers:,}", *megabytes, "" if kind.error is None else f"{kind.error:.2%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )


def quantise_tree(params: Any, how: Format | None, field: str = "quantise") -> tuple[Any, Report]:
    """The parameters with `Quantised` in place of every matrix that has a rule (`ops.quantised.SUMMED`), and the report.

    Args:
      params: a tree of dicts (and lists) of arrays, whose last string key is the parameter's name. With a mesh, call under it.
      how: None leaves them all as they are.
      field: what an error calls the format.

    Raises:
      ConfigError: a group that does not divide what some matrix is summed over; before anything is worked out.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    named = [(_name(path), array) for path, array in leaves]
    if how is not None:
        check(named, how, field)
    results, sums = [], {}
    for name, array in named:
        if how is None or summed_axes(name) is None:
            result, squares = array, None
        else:
            result, squares = _with_squares(name, how, array)
        results.append(result)
        sums.setdefault(re.sub(r"\d", "", name), []).append((array, result, squares))
    kinds = [_kind(name, entries) for name, entries in sums.items()]
    return structure.unflatten(results), Report(tuple(sorted(kinds, key=lambda kind: -kind.bytes_before)))


def _name(path):
    return next(str(key.key) for key in reversed(path) if isinstance(getattr(key, "key", None), str))


@partial(jax.jit, static_argnums=(0, 1))
def _with_squares(name, how, w) -> tuple[Quantised, jax.Array]:
    """A weight quantised, and the sums of squares of what is lost and of the weight."""
    q, w32 = quantise(name, w, how), w.astype(jnp.float32)
    lost = dequantise(q, jnp.float32) - w32
    return q, jnp.stack([jnp.sum(jnp.square(lost)), jnp.sum(jnp.square(w32))])


def _kind(name, entries):
    arrays, results, squares = zip(*entries, strict=True)
    error = None
    if squares[0] is not None:
        lost, whole = (float(sum(part)) for part in zip(*jax.device_get(list(squares)), strict=True))
        error = (lost / whole) ** 0.5 if whole else 0.0
    before, after = (sum(array.nbytes for array in some) for some in (arrays, results))
    return Kind(name, len(arrays), sum(array.size for array in arrays), before, after, error)
