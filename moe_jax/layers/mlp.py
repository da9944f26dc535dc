"""The dense feed-forward network, and the activation shared with the experts."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.layers.basic import gathered, normal_param
from moe_jax.mesh import OUR_AXES, Axes, explicit, lay_out
from moe_jax.sizes import GATED

CLAMPED_SLOPE = 1.702  # of the sigmoid in swiglu_clamped: x sigmoid(1.702 x) is near gelu(x) (1606.08415, section 2)


def activate(activation: str, up: jax.Array, gate: jax.Array | None, limit: float = 7.0) -> jax.Array:
    """The activation by its name in `model.activation`; 0 where `up` and `gate` are.

    Gated: swiglu, `silu(gate) * up`; geglu, `gelu(gate) * up` (both 2002.05202); swiglu_clamped, of gpt-oss (2508.10925),
    `gate * sigmoid(1.702 gate) * (up + 1)` of `min(gate, limit)` and `clip(up, -limit, limit)`. Not gated: `gelu(up)`, `relu(up)`.
    """
    if activation == "swiglu":
        return jax.nn.silu(gate) * up
    if activation == "geglu":
        return jax.nn.gelu(gate, approximate=True) * up
    if activation == "swiglu_clamped":
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(CLAMPED_SLOPE * gate) * (up + 1)
    return jax.nn.relu(up) if activation == "relu" else jax.nn.gelu(up, approximate=True)


class MLP(nnx.Module):
    """Dense FFN of hidden width F, which is split over the tensor axis. Also the shared experts: n of them are one of width n * F."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str,
        std: float,
        out_std: float,
        dtype,
        *,
        limit: float = 7.0,
        axes: Axes = OUR_AXES,
        rngs: nnx.Rngs,
    ):
        self.activation, self.limit, self.dtype, self.axes = activation, limit, dtype, axes
        if activation in GATED:
            self.w_gate_DF = normal_param(rngs, (d_model, d_ff), axes.weight_spec("DF"), std)
        self.w_up_DF = normal_param(rngs, (d_model, d_ff), axes.weight_spec("DF"), std)
        self.w_down_FD = normal_param(rngs, (d_ff, d_model), axes.weight_spec("FD"), out_std)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        rows_TD, rows_BSD = self.axes.batch_spec(2), self.axes.batch_spec(3)
        # flat rows: XLA:CPU takes a third longer over products, and above all their gradients, with two axes of rows
        x_TD = jax.lax.reshape(x_BSD, (math.prod(x_BSD.shape[:2]), x_BSD.shape[2]), out_sharding=explicit(rows_TD))

        def project(w):
            return jnp.einsum("TD,DF->TF", x_TD, gathered(w, P(None, self.axes.tensor), self.dtype))

        gate_TF = project(self.w_gate_DF) if self.activation in GATED else None
        h_TF = activate(self.activation, project(self.w_up_DF), gate_TF, self.limit)
        w_down_FD = gathered(self.w_down_FD, P(self.axes.tensor, None), self.dtype)
        y_TD = jnp.einsum("TF,FD->TD", h_TF, w_down_FD, out_sharding=explicit(rows_TD))
        return lay_out(jax.lax.reshape(y_TD, x_BSD.shape, out_sharding=explicit(rows_BSD)), rows_BSD)
