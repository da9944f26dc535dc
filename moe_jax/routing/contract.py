"""What a router is given and what it returns: a flat list of assignments, the same for nearly every router of the literature."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.routing.options import check_top_k


class Batch(Protocol):
    """All tokens of a pass, of which a device holds its own. Hashable."""

    def gather(self, x_T: jax.Array) -> jax.Array:
        """[T, ...] of this device to [all tokens, ...] in the order of their places; the same on every device."""
        ...

    def own(self, x_G: jax.Array) -> jax.Array:
        """The rows of this device out of [all tokens, ...]: `own(gather(x)) == x`."""
        ...


@dataclass(frozen=True)
class Alone:
    """A batch that is all on one device."""

    def gather(self, x_T: jax.Array) -> jax.Array:
        """As in `Batch`."""
        return x_T

    def own(self, x_G: jax.Array) -> jax.Array:
        """As in `Batch`."""
        return x_G


@struct.dataclass
class Tokens:
    """What a router may look at: T = B * S tokens of this device, sequence after sequence.

    Attributes:
      x_TD: any float dtype; the arithmetic is float32.
      mask_T: bool, False for padding, which goes nowhere.
      token_id_T: int32, the token's place in the global batch. Noise is a function of (noise_key, token id) alone, so that it
        does not change with the sharding or with gradient accumulation. Required with `noise_key`.
      vocabulary_T: int32, what the token is; for routers that go by the word.
      noise_key: typed key of this step and layer; None means no noise.
      replay_TM: int32, choices made earlier, to be made again (`routing/record.py`); None to choose.
      replay_weight_TM: float32, their weights, in place of this router's own; None to weigh by the router.
      num_sequences: B.
      training: whether this is a training step; some routers choose in another way in evaluation.
      batch: the tokens of all devices, for routers whose choice depends on other sequences.
    """

    x_TD: jax.Array
    mask_T: jax.Array
    token_id_T: jax.Array | None = None
    vocabulary_T: jax.Array | None = None
    noise_key: jax.Array | None = None
    replay_TM: jax.Array | None = None
    replay_weight_TM: jax.Array | None = None
    num_sequences: int = struct.field(pytree_node=False, default=1)
    training: bool = struct.field(pytree_node=False, default=False)
    batch: Batch = struct.field(pytree_node=False, default=Alone())


@struct.dataclass
class Routing:
    """The choices of a router for T tokens, as a flat list of A assignments.

    The order of the list is the order in which assignments claim capacity: *choice-major*, all first choices in token order, then
    all second choices (GShard, 2006.16668, section 3.2).

    Attributes:
      token_A: int32, the row of x the assignment takes.
      expert_A: int32 in [0, E]; E means nowhere (a padding token, a null expert, a choice not made).
      weight_A: float32, the weight of the expert's answer in the token's sum; 0 where the expert is E.
      probs_TE: float32, each row sums to 1: the router's soft preference, differentiable, for the balance losses. Padding too.
      logits_TE: float32, for the z-loss; wider where there are experts without parameters.
      choices: K when the list is exactly `token_A == tile(arange(T), K)` (token choice), else None. A static fact that lets a
        combine be a gather and a sum in place of a scatter.
      score_TE: float32, what the choice went by, -inf for experts that were closed; None for the probabilities, or anything that
        grows with them.
      priority_A: float32, who claims a full buffer first under `moe.capacity_priority="probability"`; None for the weights.
      beside_TD: float32, what the router itself adds to the token's sum (experts without parameters); None for nothing.
      sums: the family's own sums over valid tokens, by name. They add up over devices and microbatches; `Router.loss` and
        `Router.update` see those of the whole batch.
      per_token: the family's own numbers of each token, [T] by name, which `Router.reward_loss` sees beside the token's reward.
      choice_TM: int32, the choices as `Tokens.replay_TM` wants them, where that is more than the list says; else None.
      choice_weight_TM: float32, their weights.
    """

    token_A: jax.Array
    expert_A: jax.Array
    weight_A: jax.Array
    probs_TE: jax.Array
    logits_TE: jax.Array
    choices: int | None = struct.field(pytree_node=False, default=None)
    score_TE: jax.Array | None = None
    priority_A: jax.Array | None = None
    beside_TD: jax.Array | None = None
    sums: dict[str, jax.Array] = struct.field(default_factory=dict)
    per_token: dict[str, jax.Array] = struct.field(default_factory=dict)
    choice_TM: jax.Array | None = None
    choice_weight_TM: jax.Array | None = None

    @property
    def num_experts(self) -> int:
        return self.probs_TE.shape[-1]


@struct.dataclass
class SoftRouting:
    """A router that gives every expert a mix of all tokens of a sequence (Soft MoE, 2308.00951): no list, dense weights.

    `P` = E * slots: expert e has the slots e * slots .. (e + 1) * slots - 1.

    Attributes:
      dispatch_BSP: float32, slot p of a sequence holds `sum_s dispatch[b, s, p] x[b, s]`.
      combine_BSP: float32, token s gets `sum_p combine[b, s, p] answer[b, p]`; 0 for padding.
      probs_TE, logits_TE, sums, per_token: as in `Routing`.
    """

    dispatch_BSP: jax.Array
    combine_BSP: jax.Array
    probs_TE: jax.Array
    logits_TE: jax.Array
    sums: dict[str, jax.Array] = struct.field(default_factory=dict)
    per_token: dict[str, jax.Array] = struct.field(default_factory=dict)

    choices = None
    beside_TD = None

    @property
    def num_experts(self) -> int:
        return self.probs_TE.shape[-1]


class ParamSpec(NamedTuple):
    """A parameter of a router, float32, the same on every device.

    Attributes:
      shape: of one layer's; at least one axis (a stacked scalar changes its layout after a step, and the step compiles twice).
      value: what it starts as everywhere; None = normal with the model's `init_std`.
    """

    shape: tuple[int, ...]
    value: float | None = None


@dataclass(frozen=True)
class Router:
    """A routing rule. Frozen and hashable; parameters and state come in as arrays. A family overrides what it needs.

    Attributes:
      num_experts: E.
      top_k: K, experts a token (on average, for families that say so).
      causal: in evaluation a token's routing depends on no later token; a language model refuses a router of which that is not true.
      causal_in_training: the same of a training step.
      by_token: in evaluation a token's routing depends on nothing but the token, so that it can be decoded: no other token, no other text.
      has_loss: `loss` is not always 0.
      has_reward_loss: `reward_loss` is to be called.
    """

    num_experts: int
    top_k: int

    causal: ClassVar[bool] = True
    causal_in_training: ClassVar[bool] = True
    by_token: ClassVar[bool] = True
    has_loss: ClassVar[bool] = False
    has_reward_loss: ClassVar[bool] = False

    def __post_init__(self):
        check_top_k(self.num_experts, self.top_k)

    @property
    def uses_noise(self) -> bool:
        """True when training needs `Tokens.noise_key`."""
        return False

    @property
    def active_experts(self) -> float:
        """Experts a token runs through, on average: what its FLOPs are counted by."""
        return self.top_k

    def params(self, d_model: int) -> dict[str, ParamSpec]:
        """The router's parameters, by name. Names begin with `w_router_` (these decay) or `b_router_` (these do not)."""
        return {"w_router_DE": ParamSpec((d_model, self.num_experts))}

    def init_state(self) -> dict[str, jax.Array]:
        """What `update` moves once an optimizer step, as it starts: float32 arrays by name, each with at least one axis."""
        return {}

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> "Routing | SoftRouting":
        """Routes T tokens.

        Args:
          tokens: what it may look at.
          params: by the names of `params`, float32.
          state: by the names of `init_state`.
        """
        raise NotImplementedError

    def loss(self, sums, state: dict[str, jax.Array]) -> jax.Array:
        """The family's own auxiliary loss, with its weight: of one layer, from the `losses.RoutingSums` of the whole batch.

        Differentiable in the floating sums. It may be any function of them: under gradient accumulation the sums of the whole batch
        are counted first.
        """
        return jnp.zeros(())

    def reward_loss(self, per_token: dict[str, jax.Array], reward_T: jax.Array) -> jax.Array:
        """Loss of each token, [T], from the family's `Routing.per_token` and the token's reward: its log-likelihood, no gradient."""
        raise NotImplementedError

    def update(self, state: dict[str, jax.Array], sums) -> dict[str, jax.Array]:
        """The state of the next step from the `losses.RoutingSums` of this one; both may have a leading axis of layers."""
        return state


def token_choice(
    expert_TK: jax.Array, weight_TK: jax.Array, probs_TE: jax.Array, logits_TE: jax.Array, tokens: Tokens, **more
) -> Routing:
    """Flattens per-token choices into a choice-major `Routing`; padding tokens go nowhere with weight 0.

    Args:
      expert_TK: int32; E is nowhere.
      weight_TK: replaced by `tokens.replay_weight_TM` where that is given.
      probs_TE: as in `Routing`.
      logits_TE: as in `Routing`.
      tokens: what the router was given.
      **more: other fields of `Routing`.
    """
    num_tokens, choices = expert_TK.shape
    num_experts = probs_TE.shape[-1]
    weight_TK = weight_TK if tokens.replay_weight_TM is None else tokens.replay_weight_TM
    expert_TK = jnp.where(tokens.mask_T[:, None], expert_TK.astype(jnp.int32), num_experts)
    weight_TK = jnp.where(expert_TK < num_experts, weight_TK.astype(jnp.float32), 0.0)
    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    return Routing(
        token_A=jnp.tile(token_T, choices),
        expert_A=expert_TK.T.reshape(-1),
        weight_A=weight_TK.T.reshape(-1),
        probs_TE=probs_TE,
        logits_TE=logits_TE,
        choices=choices,
        **more,
    )
