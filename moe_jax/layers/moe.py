"""The mixture-of-experts layer: a router, experts behind an exchange, and shared experts beside them."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig
from moe_jax.dispatch.contract import Stats
from moe_jax.exchange.expert_parallel import moe_island
from moe_jax.layers.basic import normal_param
from moe_jax.layers.experts import Experts, make_expert_fn
from moe_jax.layers.mlp import MLP
from moe_jax.routing import make_router
from moe_jax.routing.losses import RoutingSums


class RouterBias(nnx.Variable):
    """The balancing bias of a router, [E] float32: state that the train step moves, not a parameter."""


@struct.dataclass
class MoEAux:
    """What an MoE layer tells about a batch: sums for the losses (differentiable) and exact counts. Global, not per device."""

    sums: RoutingSums
    stats: Stats


class MoE(nnx.Module):
    """y = sum of the chosen experts' weighted answers, plus the shared experts' (2401.06066, eq. 9)."""

    def __init__(self, config: ModelConfig, out_std: float, dtype, *, rngs: nnx.Rngs):
        moe, D, std = config.moe, config.d_model, config.init_std
        self.config, self.dtype, self.activation = moe, dtype, config.activation
        self.router = make_router(moe.router, moe.num_experts)
        self.w_router_DE = normal_param(rngs, (D, moe.num_experts), (None, None), std)
        self.bias_E = RouterBias(jnp.zeros(moe.num_experts, jnp.float32), out_sharding=(None,))
        self.experts = Experts(moe.num_experts, D, moe.d_ff, config.activation, std, out_std, rngs=rngs)
        if moe.num_shared_experts:
            width = moe.num_shared_experts * moe.d_ff
            self.shared = MLP(D, width, config.activation, std, out_std, dtype, rngs=rngs)

    def __call__(
        self, x_BSD: jax.Array, mask_BS: jax.Array, token_id_BS: jax.Array, noise_key: jax.Array | None = None
    ) -> tuple[jax.Array, MoEAux]:
        """Applies the layer to x_BSD, split over the batch axes.

        Args:
          x_BSD: activations in the compute dtype.
          mask_BS: bool, False for padding, which gets no expert (and zero from the routed part).
          token_id_BS: int32, places in the global batch, for noise that no layout changes.
          noise_key: key of this step and layer; None in evaluation.
        """
        y_BSD, sums, stats = moe_island(
            x_BSD,
            mask_BS,
            token_id_BS,
            jax.sharding.reshard(self.w_router_DE[...], P(None, None)),
            self.bias_E[...],
            self.experts.weights(self.dtype),
            noise_key if self.router.uses_noise else None,
            router=self.router,
            moe=self.config,
            make_expert_fn=partial(make_expert_fn, activation=self.activation, backend=self.config.grouped_matmul),
        )
        if self.config.num_shared_experts:
            y_BSD = y_BSD + self.shared(x_BSD)
        return y_BSD, MoEAux(sums, stats)
