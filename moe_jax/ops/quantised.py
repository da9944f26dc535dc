"""Weights in 8 or 4 bits, for serving: symmetric integers with float32 scales, worked out by qwix.

int8        one scale for each output of a matrix, for all the values that are summed over
int4:GROUP  one scale for every GROUP of those in a row; "int4" is "int4:64"

A scale is the largest magnitude over 127.5 or 7.5 (qwix's convention, whose steps are finer than over 127 or 7) and a ten-thousandth
more, so that the largest weight is not half-way between two integers, where the last bit, and so the layout, would decide. Integers go
from -127 to 127 or -7 to 7, and no weight moves by more than half of its scale.

Two 4-bit integers share a byte of an int8 array. XLA packs arrays of jnp.int4 as tightly, but its CPU code that reads them is scalar, and
several times as slow as shifting bytes (slower yet for a slice of a stack of experts).
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import qwix
from flax import struct
from jax.sharding import PartitionSpec as P

from moe_jax.config import ConfigError

DEFAULT_GROUP = 64
CALIBRATION = "absmax,1.0001"
FORMATS = ("none", "int8", "int4", "int4:32", "int4:64", "int4:128")

# The letters of each kind of matrix, and those that are summed over when it is applied ("DD" by its first D).
SUMMED = {
    "DHN": "D",  # queries
    "DGN": "D",  # keys, values
    "HND": "HN",  # out of attention
    "DR": "D",  # down to a latent
    "RHN": "R",  # up from a latent
    "DN": "D",  # the rotated key that all heads share
    "DF": "D",  # into a dense FFN, and out of it
    "FD": "F",
    "EDF": "D",  # into the experts, and out of them
    "EFD": "F",
    "DV": "D",  # the head
    "DD": "D",  # into the layer that predicts the token after the next
}
ROUTER = "w_router"  # begins the names of a router's weights, which decide who is chosen: they stay as they are


@dataclass(frozen=True)
class Format:
    """How weights are stored.

    Attributes:
      bits: 8 or 4.
      group: how many of the values that are summed over share a scale, an even number; 0 for all of them, with 8 bits.
    """

    bits: int
    group: int = 0

    def __str__(self):
        return f"int{self.bits}:{self.group}" if self.group else f"int{self.bits}"


@struct.dataclass
class Quantised:
    """A weight as integers times scales. Mapping an index into its first axes (layers, experts) over it gives that part of the weight.

    Attributes:
      values: int8, of the weight's shape; with `pairs` half as long along that axis, where a byte holds two 4-bit integers that
        follow each other, the first in its low half.
      scale: float32, as many axes, each dividing the weight's: the number of its parts that have a scale of their own.
      pairs: an axis, counted from the last (-1); None with 8 bits.
    """

    values: jax.Array
    scale: jax.Array
    pairs: int | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        twice = None if self.pairs is None else self.values.ndim + self.pairs
        return tuple(2 * length if axis == twice else length for axis, length in enumerate(self.values.shape))

    @property
    def nbytes(self) -> int:
        """Of integers and scales."""
        return self.values.nbytes + self.scale.nbytes

    def qarray(self) -> qwix.QArray:
        """As qwix has it, an integer a byte."""
        if self.pairs is None:
            return qwix.QArray(self.values, self.scale)
        shift = jnp.array([4, 0], jnp.int8).reshape(2, *(1,) * (-1 - self.pairs))
        # a broadcast and two shifts: where two halves are stacked, XLA:CPU takes about ten times as long
        each = (jnp.expand_dims(self.values, self.pairs) << shift) >> 4
        return qwix.QArray(each.reshape(self.shape), self.scale)


def format_of(name: str, field: str = "quantise") -> Format | None:
    """The format of that name, None for "none". Raises ConfigError, which calls it `field`."""
    if name == "none":
        return None
    if name == "int8":
        return Format(8)
    if found := re.fullmatch(r"int4(?::(\d+))?", name):
        group = int(found[1] or DEFAULT_GROUP)
        if group == 0 or group % 2:
            raise ConfigError(f"{field} = {name!r} has groups of {group}; give an even number, as two values share a byte.")
        return Format(4, group)
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"{field} = {name!r} is no format of weights: {hint}there are none, int8, int4 and int4:GROUP.")


def summed_axes(name: str) -> tuple[int, ...] | None:
    """The axes that a parameter is summed over, counted from the last (-1); None for one that stays as it is."""
    letters = name.rsplit("_", 1)[-1]
    if not name.startswith("w") or name.startswith(ROUTER) or letters not in SUMMED:
        return None
    return tuple(letters.index(letter) - len(letters) for letter in SUMMED[letters])


def quantise(name: str, w: jax.Array, how: Format, field: str = "quantise") -> Quantised:
    """A weight in the integers of `how`; on a mesh they are laid out as the weight is.

    Args:
      name: ends with the letters of the last axes; axes before them (layers) have scales of their own.
      w: of any float dtype.
      how: the format.
      field: what an error calls the format.

    Raises:
      ConfigError: a parameter that stays as it is, or a group that does not divide what is summed over, or a device's part of it.
    """
    axes = summed_axes(name)
    if axes is None:
        raise ConfigError(
            f"{name} is no matrix that is quantised; leave it as it is, or add its letters to ops.quantised.SUMMED."
        )
    check([(name, w)], how, field)
    summed = [w.ndim + axis for axis in axes]
    channels = [axis for axis in range(w.ndim) if axis not in summed]
    tiles = dict(zip(summed, _tiles(_parts(name, w), how.group), strict=True)) if how.group else {}
    settings = {"channelwise_axes": channels, "tiled_axes": tiles, "calibration_method": CALIBRATION}
    q = qwix.quantize(w.astype(jnp.float32), jnp.int8 if how.bits == 8 else jnp.int4, **settings)
    return Quantised(q.qvalue, q.scale) if how.bits == 8 else Quantised(_pack(q.qvalue, axes[-1]), q.scale, axes[-1])


def dequantise(w: Quantised | jax.Array, dtype) -> jax.Array:
    """The weight in `dtype`: worked out in float32 and rounded once. A plain array is cast."""
    return (qwix.dequantize(w.qarray()) if isinstance(w, Quantised) else w).astype(dtype)


def spec_of(w: Quantised | jax.Array, spec: P) -> Quantised | P:
    """`spec`, as it lays out a weight, for each array of it: an axis with one scale is not split in the scales.

    Raises:
      ConfigError: groups that the ambient mesh would cut.
    """
    if not isinstance(w, Quantised):
        return spec
    spec = P(*spec, *(None,) * (w.scale.ndim - len(spec)))
    sizes, of_scale = jax.sharding.get_abstract_mesh().shape, []
    for axes, length, scales in zip(spec, w.shape, w.scale.shape, strict=True):
        parts = _devices(axes, sizes)
        if scales > 1 and scales % parts:
            raise ConfigError(
                f"a weight {list(w.shape)} with {scales} scales along {length} cannot be split in {parts} over the mesh axes {axes!r};"
                " quantise it when it lies on that mesh, in smaller groups."
            )
        of_scale.append(axes if scales > 1 else None)
    return Quantised(spec, P(*of_scale), w.pairs)


def check(weights: Iterable[tuple[str, jax.Array]], how: Format, field: str = "quantise") -> None:
    """Raises ConfigError when the group does not divide what a weight is summed over, with the nearest that does for all of them."""
    if how.group == 0:
        return
    names = {_parts(name, w): name for name, w in weights if summed_axes(name)}
    unfit = next((lengths for lengths in names if not _fits(lengths, how.group)), None)
    if unfit is None:
        return
    groups = [g for g in range(2, math.prod(unfit) + 1, 2) if all(_fits(lengths, g) for lengths in names)]
    if groups:
        fix = f"int{how.bits}:{min(groups, key=lambda g: abs(g - how.group))} is the nearest that divides what every matrix sums over"
    else:
        fix = "nor does any other divide what every matrix sums over; use int8"
    raise ConfigError(
        f"{field} = '{how}' does not divide the {' x '.join(map(str, unfit))} values that {names[unfit]} sums over on each"
        f" device; {fix}."
    )


def _parts(name, w):
    """How long the axes are that are summed over, on each device."""
    sharding = jax.typeof(w).sharding
    spec = (*sharding.spec, *(None,) * (w.ndim - len(sharding.spec)))
    axes = [w.ndim + axis for axis in summed_axes(name)]
    return tuple(w.shape[axis] // _devices(spec[axis], sharding.mesh.shape) for axis in axes)


def _devices(axes, sizes):
    """How many parts the mesh axes of one entry of a spec make."""
    return math.prod(sizes.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def _fits(lengths, group):
    *outer, last = lengths
    return last % 2 == 0 and (last % group == 0 or (group % last == 0 and outer != [] and outer[-1] % (group // last) == 0))


def _tiles(lengths, group):
    """How much of each summed axis shares a scale."""
    last = lengths[-1]
    return (*(1,) * (len(lengths) - 1), group) if last % group == 0 else (group // last, last)


def _pack(values, axis):
    """Two 4-bit integers a byte, along an axis counted from the last."""
    at = values.ndim + axis
    shape = values.shape
    pairs = values.astype(jnp.int8).reshape(*shape[:at], shape[at] // 2, 2, *shape[at + 1 :])
    low, high = (jax.lax.index_in_dim(pairs, i, at + 1, keepdims=False) for i in range(2))
    return (low & 15) | (high << 4)
