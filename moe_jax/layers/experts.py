"""The experts' weights, and the function a dispatch calls with rows grouped by expert."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.dispatch.contract import ExpertFn
from moe_jax.layers.basic import normal_param
from moe_jax.layers.mlp import GATED, activate
from moe_jax.mesh import OUR_AXES, Axes
from moe_jax.ops.grouped_mlp import grouped_mlp


class Experts(nnx.Module):
    """E feed-forward networks of hidden width F: experts over the expert axes, F over tensor, D over fsdp."""

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        activation: str,
        std: float,
        out_std: float,
        *,
        axes: Axes = OUR_AXES,
        rngs: nnx.Rngs,
    ):
        up, down = axes.weight_spec("EDF"), axes.weight_spec("EFD")
        if activation in GATED:
            self.w_gate_EDF = normal_param(rngs, (num_experts, d_model, d_ff), up, std)
        self.w_up_EDF = normal_param(rngs, (num_experts, d_model, d_ff), up, std)
        self.w_down_EFD = normal_param(rngs, (num_experts, d_ff, d_model), down, out_std)

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

    names = ("w_up_EDF", "w_gate_EDF") if activation in GATED else ("w_up_EDF",)
    w_in, w_down_EFD = [weights[name] for name in names], weights["w_down_EFD"]

    def act(up, gate=None):
        return activate(activation, up, gate)

    def expert_fn(x, group_sizes_E=None):
        if group_sizes_E is not None:
            return grouped_mlp(x, w_in, w_down_EFD, group_sizes_E, act, backend)
        return jnp.einsum("ECF,EFD->ECD", act(*(jnp.einsum("ECD,EDF->ECF", x, w_EDF) for w_EDF in w_in)), w_down_EFD)

    return expert_fn
