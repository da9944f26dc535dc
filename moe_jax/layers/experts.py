"""The experts' weights, and the function a dispatch calls with rows grouped by expert."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.dispatch.contract import ExpertFn
from moe_jax.layers.basic import constant_param, normal_param
from moe_jax.layers.mlp import GATED, activate
from moe_jax.mesh import OUR_AXES, Axes
from moe_jax.ops.grouped_mlp import grouped_mlp
from moe_jax.ops.quantised import Quantised, dequantise


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
        bias: bool = False,
        axes: Axes = OUR_AXES,
        rngs: nnx.Rngs,
    ):
        up, down = axes.weight_spec("EDF"), axes.weight_spec("EFD")
        if activation in GATED:
            self.w_gate_EDF = normal_param(rngs, (num_experts, d_model, d_ff), up, std)
        self.w_up_EDF = normal_param(rngs, (num_experts, d_model, d_ff), up, std)
        self.w_down_EFD = normal_param(rngs, (num_experts, d_ff, d_model), down, out_std)
        if bias:
            for name in ("b_gate_EF", "b_up_EF") if activation in GATED else ("b_up_EF",):
                setattr(self, name, constant_param(0.0, (num_experts, d_ff), axes.weight_spec("EF")))
            self.b_down_ED = constant_param(0.0, (num_experts, d_model), axes.weight_spec("ED"))

    def weights(self, dtype) -> dict[str, jax.Array | Quantised]:
        """The weights by name as they cross into the manual island: in the compute dtype, or as they are quantised."""
        names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD", "b_gate_EF", "b_up_EF", "b_down_ED")
        values = {name: getattr(self, name).get_value() for name in names if hasattr(self, name)}
        return {name: w if isinstance(w, Quantised) else w.astype(dtype) for name, w in values.items()}

    def make_fn(self, weights: Mapping[str, jax.Array], **settings) -> ExpertFn:
        """`make_expert_fn`."""
        return make_expert_fn(weights, **settings)


def make_expert_fn(
    weights: Mapping[str, jax.Array], activation: str, backend: str, *, limit: float = 7.0, tensor: str | None = None
) -> ExpertFn:
    """The experts of `weights` as a function of grouped rows (see `ExpertFn`).

    Under tensor parallelism the weights hold a slice of F and the result is a partial sum over the tensor axis, to which the first
    device of that axis alone adds `b_down_ED`.

    Args:
      weights: `w_up_EDF`, `w_down_EFD` and, for gated activations, `w_gate_EDF`; with biases also one `b_` for each of them. An empty
        row of a buffer [E, C, D] then has an answer that is not 0, and that nothing may use.
      activation: as in `layers.mlp.activate`.
      backend: of `ops.grouped_matmul`, for ragged rows.
      limit: as in `layers.mlp.activate`.
      tensor: the mesh axis that splits F inside `shard_map`; None for none.
    """
    inward = ("up", "gate") if activation in GATED else ("up",)
    matrices = [*(weights[f"w_{name}_EDF"] for name in inward), weights["w_down_EFD"]]
    biases = _biases(weights, inward, tensor) if "b_down_ED" in weights else ()

    def act(up, gate=None):
        return activate(activation, up, gate, limit)

    def expert_fn(x, group_sizes_E=None):
        *w_in, w_down_EFD = (dequantise(w, x.dtype) if isinstance(w, Quantised) else w for w in matrices)
        if group_sizes_E is not None:
            return grouped_mlp(x, w_in, w_down_EFD, group_sizes_E, act, backend, biases)
        pre = [jnp.einsum("ECD,EDF->ECF", x, w_EDF) for w_EDF in w_in]
        if not biases:
            return jnp.einsum("ECF,EFD->ECD", act(*pre), w_down_EFD)
        *b_in, b_down_ED = biases
        h_ECF = act(*(pre_ECF + b_EF[:, None] for pre_ECF, b_EF in zip(pre, b_in, strict=True)))
        return jnp.einsum("ECF,EFD->ECD", h_ECF, w_down_EFD) + b_down_ED[:, None]

    return expert_fn


def _biases(weights, inward, tensor):
    b_down_ED = weights["b_down_ED"]
    if tensor:
        b_down_ED = jnp.where(jax.lax.axis_index(tensor) == 0, b_down_ED, jnp.zeros_like(b_down_ED))
    return *(weights[f"b_{name}_EF"] for name in inward), b_down_ED
