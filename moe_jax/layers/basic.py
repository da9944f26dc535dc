"""Parameters with their shardings, and the layers too small for a file of their own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.mesh import BATCH_AXES, batch_spec


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], spec: tuple, std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), laid out as `spec`.

    The standard deviation is given, not derived from a fan, so a stacked expert axis cannot be mistaken for one.
    """
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=P(*spec))
    return nnx.Param(value, out_sharding=spec)


def constant_param(value: float, shape: tuple[int, ...], spec: tuple) -> nnx.Param:
    """A float32 parameter that starts as a constant."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=P(*spec)), out_sharding=spec)


def gathered(param: nnx.Param, spec: P, dtype) -> jax.Array:
    """The parameter in the compute dtype with its fsdp shards gathered: laid out as `spec`, which leaves fsdp out.

    The cast comes first, so bfloat16 travels, not float32. The transpose scatters the gradient back.
    """
    return jax.sharding.reshard(param[...].astype(dtype), spec)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (1910.07467)."""

    def __init__(self, width: int, eps: float, axis: str = "D"):
        self.eps = eps
        self.name = f"scale_{axis}"
        setattr(self, self.name, constant_param(1.0, (width,), (None,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 / rms * getattr(self, self.name)[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding; `attend` is the tied output head."""

    def __init__(self, vocab_size: int, d_model: int, std: float, dtype, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.table_VD = normal_param(rngs, (vocab_size, d_model), ("tensor", "fsdp"), std)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        table_VD = gathered(self.table_VD, P(None, None), self.dtype)
        return table_VD.at[tokens_BS].get(out_sharding=batch_spec(3))

    def attend(self, x_BSD: jax.Array) -> jax.Array:
        """Logits [B, S, V], split over the vocabulary on the tensor axis."""
        return jnp.einsum("BSD,VD->BSV", x_BSD, gathered(self.table_VD, P("tensor", None), self.dtype))


class Head(nnx.Module):
    """Untied output projection to the vocabulary, which is split over the tensor axis."""

    def __init__(self, vocab_size: int, d_model: int, std: float, dtype, *, rngs: nnx.Rngs):
        self.dtype = dtype
        self.w_DV = normal_param(rngs, (d_model, vocab_size), ("fsdp", "tensor"), std)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return jnp.einsum("BSD,DV->BSV", x_BSD, gathered(self.w_DV, P(None, "tensor"), self.dtype))


def tensor_spec(*axes: str | None) -> P:
    """Spec of an activation [B, S, ...] with the batch over the batch axes and `axes` for the rest."""
    return P(BATCH_AXES, None, *axes)
