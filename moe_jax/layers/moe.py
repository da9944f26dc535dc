"""The mixture-of-experts layer: a router, experts behind an exchange, and shared experts beside them.

Alone, in anybody's NNX model and on their mesh: `MoE.standalone`. In a Linen model: `layers/linen.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx, struct

from moe_jax.config import Config, ConfigError, ModelConfig, MoEConfig
from moe_jax.dispatch.contract import Stats
from moe_jax.exchange.expert_parallel import moe_island
from moe_jax.layers.basic import constant_param, normal_param, placed
from moe_jax.layers.experts import Experts
from moe_jax.layers.mlp import MLP
from moe_jax.mesh import OUR_AXES, Axes, lay_out
from moe_jax.routing import losses, make_router
from moe_jax.routing.losses import RoutingSums


@nnx.register_variable_name("router_state")
class RouterState(nnx.Variable):
    """State of a router that the train step moves, float32, not a parameter: the balancing bias `bias_E` for most that have one."""


@struct.dataclass
class Replay:
    """Choices to make again in place of the router's own.

    Attributes:
      expert_BSM: int32 (`routing.record.choices_of`).
      weight_BSM: float32 weights of theirs; None for the router's own weights of those experts, which have a gradient.
    """

    expert_BSM: jax.Array
    weight_BSM: jax.Array | None = None


@struct.dataclass
class MoEAux:
    """What an MoE layer tells about a batch: sums for the losses (differentiable) and exact counts. Global, not per device.

    Stacked over layers, [L, ...], each method sums the layers' losses.

    Attributes:
      sums: of the batch.
      stats: of the batch.
      router_loss: the router family's own auxiliary loss of this batch (`Router.loss`).
      per_token: arrays of one row a token, [B, S, ...]: the router's own, and what was recorded.
    """

    sums: RoutingSums
    stats: Stats
    router_loss: jax.Array
    per_token: dict[str, jax.Array] = struct.field(default_factory=dict)

    def balance_loss(self, scope: str = "global") -> jax.Array:
        """1 at perfect balance, of this batch; `scope` "sequence" is the mean over sequences, as `moe.balance_loss_scope`."""
        if scope == "sequence":
            return jnp.sum(losses.sequence_balance_loss(self.sums.sequence_balance_sum, self.sums.num_sequences))
        return jnp.sum(losses.balance_loss(self.sums.load_E, self.sums.prob_sum_E, self.sums.num_tokens))

    def z_loss(self) -> jax.Array:
        """Mean of the squared logsumexp of the router's logits."""
        return jnp.sum(losses.z_loss(self.sums.z_sum, self.sums.num_tokens))

    def loss(self, moe: MoEConfig) -> jax.Array:
        """What to add to the task's loss: both by the weights of `moe`, and the router's own; for a batch that is one optimizer step."""
        by_weight = moe.balance_loss_weight * self.balance_loss(moe.balance_loss_scope) + moe.z_loss_weight * self.z_loss()
        return by_weight + jnp.sum(self.router_loss)


class MoE(nnx.Module):
    """y = sum of the chosen experts' weighted answers, plus the shared experts' (2401.06066, eq. 9).

    With `shared_gate` the shared experts' answer is multiplied by sigmoid(x . w_shared_gate), one number a token (Qwen2-MoE).
    """

    def __init__(self, config: ModelConfig, out_std: float, dtype, *, axes: Axes = OUR_AXES, rngs: nnx.Rngs):
        moe, D, std = config.moe, config.d_model, config.init_std
        self.d_model = D
        self.config, self.dtype, self.axes = moe, dtype, axes
        self.activation, self.limit = config.activation, config.activation_limit
        self.router = make_router(moe.router, moe.num_experts)
        for name, spec in self.router.params(D).items():
            everywhere = (None,) * len(spec.shape)
            if spec.value is None:
                setattr(self, name, normal_param(rngs, spec.shape, everywhere, std))
            else:
                setattr(self, name, constant_param(spec.value, spec.shape, everywhere))
        for name, value in self.router.init_state().items():
            setattr(self, name, placed(RouterState, value, (None,) * value.ndim))
        sizes = moe.num_experts, D, moe.d_ff
        self.experts = Experts(*sizes, self.activation, std, out_std, bias=moe.expert_bias, axes=axes, rngs=rngs)
        if moe.num_shared_experts:
            width = moe.num_shared_experts * (moe.shared_d_ff or moe.d_ff)
            self.shared = MLP(D, width, self.activation, std, out_std, dtype, limit=self.limit, axes=axes, rngs=rngs)
        if moe.shared_gate:
            self.w_shared_gate_D = normal_param(rngs, (D,), (None,), std)

    @classmethod
    def standalone(
        cls,
        d_model: int,
        moe: MoEConfig,
        *,
        axes: Axes = OUR_AXES,
        activation: str = "swiglu",
        activation_limit: float = 7.0,
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
          activation: "swiglu", "geglu", "swiglu_clamped", "gelu" or "relu" (`layers.mlp.activate`).
          activation_limit: for "swiglu_clamped".
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
        activations = {"activation": activation, "activation_limit": activation_limit}
        config = ModelConfig(d_model=d_model, **activations, init_std=init_std, dtype=name, num_layers=1, moe=moe)
        Config(model=config)  # the rules
        return cls(config, init_std if out_std is None else out_std, jnp.dtype(dtype), axes=axes, rngs=rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        mask_BS: jax.Array | None = None,
        token_id_BS: jax.Array | None = None,
        noise_key: jax.Array | None = None,
        *,
        vocabulary_BS: jax.Array | None = None,
        replay: Replay | None = None,
        record: bool = False,
        loss_probe: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, MoEAux]:
        """Applies the layer to x_BSD.

        Args:
          x_BSD: activations, cast to the compute dtype, and moved to be split over the batch axes where they are not; y is laid out
            as x is.
          mask_BS: bool, False for padding, which gets no expert (and zero from the routed part). Default: all are valid.
          token_id_BS: int32, places in the global batch, for noise that no layout changes. Default: row-major in this batch.
          noise_key: key of this step and layer; None in evaluation.
          vocabulary_BS: int32, what the tokens are; only routers that go by the word ask for it.
          replay: choices to make again.
          record: whether `MoEAux.per_token` tells the choices.
          loss_probe: as `moe_island`.

        Raises:
          ValueError: as `moe_island`, and as the router.
        """
        B, S, _ = x_BSD.shape
        theirs = jax.typeof(x_BSD).sharding.spec
        x_BSD = lay_out(x_BSD.astype(self.dtype), self.axes.batch_spec(3))
        rows = {
            "mask_T": jnp.ones((B, S), bool) if mask_BS is None else mask_BS,
            "token_id_T": jnp.arange(B * S, dtype=jnp.int32).reshape(B, S) if token_id_BS is None else token_id_BS,
            "vocabulary_T": vocabulary_BS,
            "replay_TM": None if replay is None else replay.expert_BSM,
            "replay_weight_TM": None if replay is None else replay.weight_BSM,
        }
        state = self.router_state()
        settings = {"backend": self.config.grouped_matmul, "limit": self.limit, "tensor": self.axes.present().tensor}
        y_BSD, sums, stats, per_token = moe_island(
            x_BSD,
            {name: array for name, array in rows.items() if array is not None},
            {name: getattr(self, name)[...] for name in self.router.params(self.d_model)},
            state,
            self.experts.weights(self.dtype),
            noise_key if self.router.uses_noise else None,
            loss_probe,
            router=self.router,
            moe=self.config,
            make_expert_fn=partial(self.experts.make_fn, activation=self.activation, **settings),
            axes=self.axes,
            beside_BSD=self._shared(x_BSD),
            training=noise_key is not None,
            record=record,
        )
        if jax.typeof(y_BSD).sharding.spec != theirs:
            y_BSD = jax.sharding.reshard(y_BSD, theirs)
        return y_BSD, MoEAux(sums, stats, self.router.loss(sums, state), per_token)

    def _shared(self, x_BSD):
        """The shared experts' answer; None where there are none."""
        if not self.config.num_shared_experts:
            return None
        y_BSD = self.shared(x_BSD)
        if not self.config.shared_gate:
            return y_BSD
        gate_BS = jax.nn.sigmoid(jnp.einsum("BSD,D->BS", x_BSD, self.w_shared_gate_D[...].astype(self.dtype)))
        return y_BSD * gate_BS[..., None]

    def router_state(self) -> dict[str, jax.Array]:
        """What the router keeps from step to step, by name."""
        return {name: getattr(self, name)[...] for name in self.router.init_state()}

    def update_router(self, aux: MoEAux) -> None:
        """Moves the router's state by a batch: once an optimizer step, outside the gradient. Nothing for a router without one."""
        for name, value in self.router.update(self.router_state(), aux.sums).items():
            getattr(self, name)[...] = value
