"""The dense feed-forward network, and the activation shared with the experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.layers.basic import gathered, normal_param, tensor_spec

GATED = ("swiglu", "geglu")


def activate(activation: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """`silu(gate) * up` (SwiGLU), `gelu(gate) * up` (GEGLU; both 2002.05202), or `gelu(up)`."""
    if activation == "swiglu":
        return jax.nn.silu(gate) * up
    if activation == "geglu":
        return jax.nn.gelu(gate, approximate=True) * up
    return jax.nn.gelu(up, approximate=True)


class MLP(nnx.Module):
    """Dense FFN of hidden width F, which is split over the tensor axis. Also the shared experts: n of them are one of width n * F."""

    def __init__(self, d_model: int, d_ff: int, activation: str, std: float, out_std: float, dtype, *, rngs: nnx.Rngs):
        self.activation, self.dtype = activation, dtype
        if activation in GATED:
            self.w_gate_DF = normal_param(rngs, (d_model, d_ff), ("fsdp", "tensor"), std)
        self.w_up_DF = normal_param(rngs, (d_model, d_ff), ("fsdp", "tensor"), std)
        self.w_down_FD = normal_param(rngs, (d_ff, d_model), ("tensor", "fsdp"), out_std)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        def project(w):
            return jnp.einsum("BSD,DF->BSF", x_BSD, gathered(w, P(None, "tensor"), self.dtype))

        gate_BSF = project(self.w_gate_DF) if self.activation in GATED else None
        h_BSF = activate(self.activation, project(self.w_up_DF), gate_BSF)
        w_down_FD = gathered(self.w_down_FD, P("tensor", None), self.dtype)
        return jnp.einsum("BSF,FD->BSD", h_BSF, w_down_FD, out_sharding=tensor_spec(None))
