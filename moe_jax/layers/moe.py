"""The mixture-of-experts layer: a router, experts behind an exchange, and shared experts beside them.

Alone, in anybody's NNX model and on their mesh: `MoE.standalone`. In a Linen model: `layers/linen.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import PartitionSpec as P

from moe_jax.config import Config, ConfigError, ModelConfig, MoEConfig
from moe_jax.dispatch.contract import Stats
from moe_jax.exchange.expert_parallel import moe_island
from moe_jax.layers.basic import normal_param, placed
from moe_jax.layers.experts import Experts, make_expert_fn
from moe_jax.layers.mlp import MLP
from moe_jax.mesh import OUR_AXES, Axes, lay_out
from moe_jax.routing import losses, make_router
from moe_jax.routing.losses import RoutingSums


@nnx.register_variable_name("router_bias")
class RouterBias(nnx.Variable):
    """The balancing bias of a router, [E] float32: state that the train step moves, not a parameter."""


@struct.dataclass
class MoEAux:
    """What an MoE layer tells about a batch: sums for the losses (differentiable) and exact counts. Global, not per device.

    Stacked over layers, [L, ...], each method sums the layers' losses.
    """

    sums: RoutingSums
    stats: Stats

    def balance_loss(self, scope: str = "global") -> jax.Array:
        """1 at perfect balance, of this batch; `scope` "sequence" is the mean over sequences, as `moe.balance_loss_scope`."""
        if scope == "sequence":
            return jnp.sum(losses.sequence_balance_loss(self.sums.sequence_balance_sum, self.sums.num_sequences))
        return jnp.sum(losses.balance_loss(self.sums.load_E, self.sums.prob_sum_E, self.sums.num_tokens))

    def z_loss(self) -> jax.Array:
        """Mean of the squared logsumexp of the router's logits."""
        return jnp.sum(losses.z_loss(self.sums.z_sum, self.sums.num_tokens))

    def loss(self, moe: MoEConfig) -> jax.Array:
        """What to add to the task's loss: both, by the weights of `moe`, for a batch that is one optimizer step."""
        return moe.balance_loss_weight * self.balance_loss(moe.balance_loss_scope) + moe.z_loss_weight * self.z_loss()


class MoE(nnx.Module):
    """y = sum of the chosen experts' weighted answers, plus the shared experts' (2401.06066, eq. 9)."""

    def __init__(self, config: ModelConfig, out_std: float, dtype, *, axes: Axes = OUR_AXES, rngs: nnx.Rngs):
        moe, D, std = config.moe, config.d_model, config.init_std
        self.config, self.dtype, self.activation, self.axes = moe, dtype, config.activation, axes
        self.router = make_router(moe.router, moe.num_experts)
        self.w_router_DE = normal_param(rngs, (D, moe.num_experts), (None, None), std)
        self.bias_E = placed(RouterBias, jnp.zeros(moe.num_experts, jnp.float32), (None,))
        self.experts = Experts(moe.num_experts, D, moe.d_ff, config.activation, std, out_std, axes=axes, rngs=rngs)
        if moe.num_shared_experts:
            width = moe.num_shared_experts * moe.d_ff
            self.shared = MLP(D, width, config.activation, std, out_std, dtype, axes=axes, rngs=rngs)

    @classmethod
    def standalone(
        cls,
        d_model: int,
        moe: MoEConfig,
        *,
        axes: Axes = OUR_AXES,
        activation: str = "swiglu",
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ) -> "MoE":
        """The layer for a model that is not of this project.

        Made and called under `jax.set_mesh` (axes explicit or auto) it spreads over the mesh; where no mesh is set it is on one device.
        It may also be made first and placed later.

        Args:
          d_model: D, width of the model.
          moe: experts, router, loss weights, dispatch, exchange (`configs/base.py` explains each field). `first_dense` and `every`
            are the model's business, not the layer's.
          axes: which axes of your mesh play which part; with one device there is nothing to say.
          activation: "swiglu", "geglu" or "gelu".
          init_std: standard deviation of the weights; those back into the model have `out_std`, by default the same.
          dtype: of the computation, and of y; parameters are float32.
          rngs: with a `params` stream, or a default one.

        Raises:
          ConfigError: a field that makes no sense, by its name.
        """
        if moe.num_experts == 0:
            raise ConfigError(
                "model.moe.num_experts = 0 is a dense model, and this is an MoE layer; give it at least one expert."
            )
        name = jnp.dtype(dtype).name
        config = ModelConfig(d_model=d_model, activation=activation, init_std=init_std, dtype=name, num_layers=1, moe=moe)
        Config(model=config)  # the rules
        return cls(config, init_std if out_std is None else out_std, jnp.dtype(dtype), axes=axes, rngs=rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        mask_BS: jax.Array | None = None,
        token_id_BS: jax.Array | None = None,
        noise_key: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEAux]:
        """Applies the layer to x_BSD.

        Args:
          x_BSD: activations, cast to the compute dtype, and moved to be split over the batch axes where they are not; y is laid out
            as x is.
          mask_BS: bool, False for padding, which gets no expert (and zero from the routed part). Default: all are valid.
          token_id_BS: int32, places in the global batch, for noise that no layout changes. Default: row-major in this batch.
          noise_key: key of this step and layer; None in evaluation.

        Raises:
          ValueError: as `moe_island`.
        """
        B, S, _ = x_BSD.shape
        theirs = jax.typeof(x_BSD).sharding.spec
        x_BSD = lay_out(x_BSD.astype(self.dtype), self.axes.batch_spec(3))
        mask_BS = jnp.ones((B, S), bool) if mask_BS is None else mask_BS
        token_id_BS = jnp.arange(B * S, dtype=jnp.int32).reshape(B, S) if token_id_BS is None else token_id_BS
        y_BSD, sums, stats = moe_island(
            x_BSD,
            mask_BS,
            token_id_BS,
            lay_out(self.w_router_DE[...], P(None, None)),
            self.bias_E[...],
            self.experts.weights(self.dtype),
            noise_key if self.router.uses_noise else None,
            router=self.router,
            moe=self.config,
            make_expert_fn=partial(make_expert_fn, activation=self.activation, backend=self.config.grouped_matmul),
            axes=self.axes,
            beside_BSD=self.shared(x_BSD) if self.config.num_shared_experts else None,
        )
        if jax.typeof(y_BSD).sharding.spec != theirs:
            y_BSD = jax.sharding.reshard(y_BSD, theirs)
        return y_BSD, MoEAux(sums, stats)

    def update_bias(self, aux: MoEAux) -> None:
        """Moves the balancing bias by the loads of a batch: once an optimizer step, outside the gradient. Nothing without a bias."""
        self.bias_E[...] = self.router.update_bias(self.bias_E[...], aux.stats.load_E)
