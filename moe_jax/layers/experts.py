"""The experts' weights, and the function a dispatch calls with rows grouped by expert."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.dispatch.contract import ExpertFn
from moe_jax.layers.basic import normal_param
from moe_jax.layers.mlp import GATED, activate
from moe_jax.ops.grouped_matmul import grouped_matmul


class Experts(nnx.Module):
    """E feed-forward networks of hidden width F: experts over the expert axis, F over tensor, D over fsdp."""

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, activation: str, std: float, out_std: float, *, rngs: nnx.Rngs
    ):
        if activation in GATED:
            self.w_gate_EDF = normal_param(rngs, (num_experts, d_model, d_ff), ("expert", "fsdp", "tensor"), std)
        self.w_up_EDF = normal_param(rngs, (num_experts, d_model, d_ff), ("expert", "fsdp", "tensor"), std)
        self.w_down_EFD = normal_param(rngs, (num_experts, d_ff, d_model), ("expert", "tensor", "fsdp"), out_std)

    def weights(self, dtype) -> dict[str, jax.Array]:
        """The raw weights by name in the compute dtype, as they cross into the manual island."""
        names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
        return {name: getattr(self, name)[...].astype(dtype) for name in names if hasattr(self, name)}


def make_expert_fn(weights: Mapping[str, jax.Array], activation: str, backend: str) -> ExpertFn:
    """The experts of `weights` as a function of grouped rows (see `ExpertFn`).

    Under tensor parallelism the weights hold a slice of F and the result is a partial sum over the tensor axis.

    Args:
      weights: `w_up_EDF`, `w_down_EFD` and, for gated activations, `w_gate_EDF`.
      activation: as in `layers.mlp.activate`.
      backend: of `ops.grouped_matmul`, for ragged rows.
    """

    def expert_fn(x, group_sizes_E=None):
        def multiply(x, w):
            if group_sizes_E is None:
                return jnp.einsum("ECI,EIO->ECO", x, w)
            return grouped_matmul(x, w, group_sizes_E, backend)

        gate = multiply(x, weights["w_gate_EDF"]) if activation in GATED else None
        return multiply(activate(activation, multiply(x, weights["w_up_EDF"]), gate), weights["w_down_EFD"])

    return expert_fn
