"""The experts' weights for decoding on a CPU: an array for each expert, gate and up side by side in one."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.layers.mlp import activate
from moe_jax.mesh import EXPERT_AXES, axis_size
from moe_jax.ops.quantised import Quantised, dequantise
from moe_jax.ops.separate_experts import grouped_rows, touched_sum
from moe_jax.ops.varying import varying_axes
from moe_jax.sizes import GATED

SPECS = {"EDF": P(EXPERT_AXES, None, "tensor"), "EFD": P(EXPERT_AXES, "tensor", None), "EF": P(EXPERT_AXES, "tensor")}
SPECS["ED"] = P(EXPERT_AXES, None)


class SeparateExperts(nnx.Module):
    """Stands in for `Experts`, of the same numbers. Of P devices on the expert axes each has E/P experts: w_in3_EDF [P, D, 2F] is the
    fourth of every device."""

    def __init__(self, arrays: Mapping[str, jax.Array]):
        self.names = sorted(arrays)
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))

    def weights(self, dtype) -> dict[str, jax.Array]:
        """As `Experts.weights`."""
        values = {name: getattr(self, name).get_value() for name in self.names}
        return {name: w if isinstance(w, Quantised) else w.astype(dtype) for name, w in values.items()}

    def make_fn(self, weights: Mapping[str, jax.Array], **settings) -> Callable[..., jax.Array]:
        """`make_separate_fn`."""
        return make_separate_fn(weights, **settings)


def make_separate_fn(
    weights: Mapping[str, jax.Array], activation: str, backend: str, *, limit: float = 7.0, tensor: str | None = None
):
    """As `layers.experts.make_expert_fn`, of one device's weights [1, ...]; it takes rows with `group_sizes_E`, or with `weight_TE`."""
    count, gated = sum(name.startswith("w_down") for name in weights), activation in GATED
    axes = varying_axes(*jax.tree.leaves(dict(weights)))

    def network(j):
        w_in, w_down = (jax.tree.map(lambda array: array[0], weights[name]) for name in (f"w_in{j}_EDF", f"w_down{j}_EFD"))

        def run(x_RD):
            w_in_DF, w_down_FD = dequantise(w_in, x_RD.dtype), dequantise(w_down, x_RD.dtype)
            pre_RF = jnp.einsum("RD,DF->RF", x_RD, w_in_DF)
            pre_RF = pre_RF + weights[f"b_in{j}_EF"] if f"b_in{j}_EF" in weights else pre_RF
            h_RF = activate(activation, *(jnp.split(pre_RF, 2, axis=1) if gated else (pre_RF, None)), limit)
            y_RD = jnp.einsum("RF,FD->RD", h_RF, w_down_FD, preferred_element_type=jnp.float32)
            if f"b_down{j}_ED" not in weights:
                return y_RD
            b_down_1D = weights[f"b_down{j}_ED"]
            return y_RD + (jnp.where(jax.lax.axis_index(tensor) == 0, b_down_1D, 0) if tensor else b_down_1D)

        return run

    networks = [network(j) for j in range(count)]

    def expert_fn(x_RD, group_sizes_E=None, *, weight_TE=None):
        if weight_TE is not None:
            return touched_sum(x_RD, weight_TE, networks, axes)
        return grouped_rows(x_RD, group_sizes_E, networks, axes)

    return expert_fn


def separate(stacked: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays of `SeparateExperts` from those of `Experts`, on the ambient mesh, without a split over fsdp."""
    specs = {name: SPECS[name.rsplit("_", 1)[1]] for name in stacked}
    count = len(stacked["w_down_EFD"]) // (axis_size(EXPERT_AXES[0]) * axis_size(EXPERT_AXES[1]))

    def body(stacked):
        arrays = {}
        for j in range(count):
            own = {name: array[j : j + 1] for name, array in stacked.items()}
            for kind, axes in (("w", "EDF"), ("b", "EF")):
                if inward := [own[name] for which in ("up", "gate") if (name := f"{kind}_{which}_{axes}") in own]:
                    arrays[f"{kind}_in{j}_{axes}"] = jnp.concatenate(inward, axis=-1)
            arrays[f"w_down{j}_EFD"] = own["w_down_EFD"]
            if "b_down_ED" in own:
                arrays[f"b_down{j}_ED"] = own["b_down_ED"]
        return arrays

    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in stacked.items()}
    out_specs = {name: SPECS[name.rsplit("_", 1)[1]] for name in jax.eval_shape(body, shapes)}
    laid_out = {name: jax.sharding.reshard(array, specs[name]) for name, array in stacked.items()}
    return jax.shard_map(body, in_specs=(specs,), out_specs=out_specs)(laid_out)
