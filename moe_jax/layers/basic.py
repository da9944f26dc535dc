"""Parameters with their shardings, and the layers too small for a file of their own."""

import re
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig
from moe_jax.mesh import BATCH_AXES, batch_spec, explicit, lay_out, present
from moe_jax.ops.quantised import Quantised, dequantise, spec_of


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], spec: tuple, std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), laid out as `spec`.

    The standard deviation is given, not derived from a fan, so a stacked expert axis cannot be mistaken for one.
    """
    return placed(nnx.Param, std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=explicit(P(*spec))), spec)


def constant_param(value: float, shape: tuple[int, ...], spec: tuple) -> nnx.Param:
    """A float32 parameter that starts as a constant."""
    return placed(nnx.Param, jnp.full(shape, value, jnp.float32, out_sharding=explicit(P(*spec))), spec)


def placed(kind: type[nnx.Variable], value: jax.Array, spec: tuple) -> nnx.Variable:
    """A variable laid out as `spec` on the ambient mesh, axes that are not there left out.

    Without a mesh it stays where it is and remembers the whole spec, for `nnx.get_named_sharding` to place it by later.
    """
    mesh, spec = jax.sharding.get_abstract_mesh(), P(*spec)
    if mesh.explicit_axes and mesh.are_all_axes_explicit:
        return kind(lay_out(value, spec), out_sharding=tuple(present(spec)))
    # flax would place it once more, which it can neither without a mesh nor on one of both types
    return kind(lay_out(value, spec), out_sharding=tuple(spec if mesh.empty else present(spec)), eager_sharding=False)


def gathered(param: nnx.Param, spec: P, dtype) -> jax.Array:
    """The parameter in the compute dtype with its fsdp shards gathered: laid out as `spec`, which leaves fsdp out.

    The cast comes first, so bfloat16 travels, not float32. The transpose scatters the gradient back. Of a quantised
    weight the integers and scales travel.
    """
    if isinstance(w := param.get_value(), Quantised):
        return dequantise(jax.tree.map(lay_out, w, spec_of(w, spec)), dtype)
    return lay_out(w.astype(dtype), spec)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a constant, which is not rounded to x's dtype first: 0.22 in bfloat16 would be 0.1% off, everywhere alike."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


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


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias over the last axis, in float32 (1607.06450); with or without the bias."""

    def __init__(self, width: int, eps: float, bias: bool):
        self.eps, self.has_bias = eps, bias
        self.scale_D = constant_param(1.0, (width,), (None,))
        if bias:
            self.bias_D = constant_param(0.0, (width,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        std = jnp.sqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        y32 = x32 / std * self.scale_D[...]
        return (y32 + self.bias_D[...] if self.has_bias else y32).astype(x.dtype)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """A norm over the residual stream, as `model.norm` names it."""
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, bias=config.norm == "layer")


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
        return project("BSD,DV->BSV", x_BSD, gathered(self.table_VD, P("tensor", None), self.dtype).T)


class Head(nnx.Module):
    """Output projection to the vocabulary, which is split over the tensor axis. Tied to the embedding it has no matrix of its own."""

    def __init__(self, vocab_size: int, d_model: int, std: float, dtype, *, tied: bool, bias: bool, rngs: nnx.Rngs):
        self.dtype, self.tied, self.has_bias = dtype, tied, bias
        if not tied:
            self.w_DV = normal_param(rngs, (d_model, vocab_size), ("fsdp", "tensor"), std)
        if bias:
            self.b_V = constant_param(0.0, (vocab_size,), ("tensor",))

    def __call__(self, x_BSD: jax.Array, embed: Embedding) -> jax.Array:
        """Logits [B, S, V]; `embed` is the model's, for a tied head."""
        logits_BSV = embed.attend(x_BSD) if self.tied else self._project(x_BSD)
        return logits_BSV + self.b_V[...].astype(self.dtype) if self.has_bias else logits_BSV

    def _project(self, x_BSD):
        return project("BSD,DV->BSV", x_BSD, gathered(self.w_DV, P(None, "tensor"), self.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(subscripts: str, x: jax.Array, w: jax.Array, out_sharding: P | None = None) -> jax.Array:
    """`jnp.einsum` of activations and a weight, of arrays on an Explicit mesh, with the weight's gradient as x^T g.

    Autodiff's is (g^T x)^T, for which XLA:CPU transposes g: as large as the logits for the head, and once for each of the weights
    that share an x. Every letter is in two of the three terms.
    """
    return jnp.einsum(subscripts, x, w, out_sharding=out_sharding)


def _project_forward(subscripts, x, w, out_sharding):
    return project(subscripts, x, w, out_sharding), (x, w)


def _project_backward(subscripts, out_sharding, residuals, g):
    x, w = residuals
    of_x, of_w, of_g = re.split(",|->", subscripts)
    g_x = jnp.einsum(f"{of_g},{of_w}->{of_x}", g, w, out_sharding=jax.typeof(x).sharding)
    return g_x, jnp.einsum(f"{of_x},{of_g}->{of_w}", x, g, out_sharding=jax.typeof(w).sharding)


project.defvjp(_project_forward, _project_backward)


def tensor_spec(*axes: str | None) -> P:
    """Spec of an activation [B, S, ...] with the batch over the batch axes and `axes` for the rest."""
    return P(BATCH_AXES, None, *axes)
