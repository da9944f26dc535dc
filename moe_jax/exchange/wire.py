"""What travels: the dtype of tokens, answers and gradients between devices.

Tokens may go out in 8 bits, each row scaled so that its largest element is the largest the format holds. Answers, partial sums and all
gradients go in the combine dtype: they add up, and what is lost in them stays lost.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.config import MoEConfig

SCALED = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest number of each format


class Wire(NamedTuple):
    """Names of the dtypes on the wire.

    Attributes:
      dispatch: of tokens on their way out.
      combine: of answers on their way home, and of gradients both ways.
    """

    dispatch: str
    combine: str

    @classmethod
    def of(cls, moe: MoEConfig, compute: DTypeLike) -> "Wire":
        """The wire of `moe` for activations of dtype `compute`."""
        name = jnp.dtype(compute).name
        return cls(*(name if wish == "compute" else wish for wish in (moe.dispatch_wire, moe.combine_wire)))

    @property
    def is_scaled(self) -> bool:
        """Whether every token row travels with a float32 scale."""
        return self.dispatch in SCALED


def row_bytes(wire: Wire, width: int, columns: int) -> int:
    """Bytes of a row out and its answer home: the token, `columns` words of 4 bytes with it (a scale besides), the answer."""
    there, home = (jnp.dtype(name).itemsize for name in wire)
    return width * (there + home) + 4 * (columns + wire.is_scaled)


def encode(x_RD: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Rows in the wire's dtype and their scales, float32 [R, 1]; [R, 0] for a format that needs none."""
    if dtype not in SCALED:
        return x_RD.astype(dtype), jnp.zeros((x_RD.shape[0], 0), jnp.float32)
    largest_R1 = jnp.max(jnp.abs(x_RD), axis=-1, keepdims=True).astype(jnp.float32)
    scale_R1 = jnp.maximum(largest_R1 / SCALED[dtype], jnp.finfo(jnp.float32).tiny)  # never 0; NaN where the row has one
    scaled_RD = x_RD.astype(jnp.float32) / scale_R1
    return (jnp.round(scaled_RD) if dtype == "int8" else scaled_RD).astype(dtype), scale_R1


def decode(payload_RD: jax.Array, scale_R1: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The rows that `encode` wrote, in `dtype`."""
    if scale_R1.shape[-1] == 0:
        return payload_RD.astype(dtype)
    return (payload_RD.astype(jnp.float32) * scale_R1).astype(dtype)
