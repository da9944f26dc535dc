"""Sums over tokens that add up across devices and microbatches, and the auxiliary losses as functions of the sums.

The balance loss here is 1 at perfect balance (so in Megatron, OLMo, AXLearn). Elsewhere, for the same routing:

    HF Mixtral, MaxText, Flaxformer   K times ours (they sum f over the K choices in place of dividing by K)
    HF Mixtral over L layers          K * E * sum_e mean_l(f) mean_l(P): tokens of all layers are pooled before the product, so
                                      that layers skewed in opposite ways cancel; ours is one loss per layer

A weight c there is thus K * c here, on the mean over layers, and exactly so only when all layers route alike.
"""

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.config import ConfigError
from moe_jax.routing.contract import Routing, SoftRouting


@struct.dataclass
class RoutingSums:
    """Sums over the tokens at hand. `jax.lax.psum` over devices and `+` over microbatches make them those of the global batch.

    Attributes:
      load_E: int32, assignments the router made to each expert, before any drop; without padding.
      prob_sum_E: float32, sum over valid tokens of the router's probabilities; differentiable.
      z_sum: float32, sum over valid tokens of logsumexp(logits)^2; differentiable.
      entropy_sum: float32, sum over valid tokens of the entropy of the probabilities, nats; no gradient.
      sequence_balance_sum: float32, sum over sequences of each one's own balance loss; differentiable. 0 unless asked for.
      num_tokens: int32, valid tokens.
      num_sequences: int32, sequences with at least one valid token.
      margin_sum: float32, sum over valid tokens of `score_margin`; no gradient. None where a router makes no such choice.
      own: the family's own sums by name (`Routing.sums`).
    """

    load_E: jax.Array
    prob_sum_E: jax.Array
    z_sum: jax.Array
    entropy_sum: jax.Array
    sequence_balance_sum: jax.Array
    num_tokens: jax.Array
    num_sequences: jax.Array
    margin_sum: jax.Array | None = None
    own: dict[str, jax.Array] = struct.field(default_factory=dict)

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        return jax.tree.map(jnp.add, self, other)


def count_load(routing: Routing | SoftRouting) -> jax.Array:
    """Assignments per expert, [E] int32. What goes nowhere (expert E) is not counted; a soft expert counts its filled slots."""
    if isinstance(routing, SoftRouting):
        filled_BP = jnp.any(routing.dispatch_BSP > 0, axis=1)
        return jnp.sum(filled_BP, 0, dtype=jnp.int32).reshape(routing.num_experts, -1).sum(1, dtype=jnp.int32)
    return jnp.zeros(routing.num_experts + 1, jnp.int32).at[routing.expert_A].add(1)[:-1]


def routing_sums(
    routing: Routing | SoftRouting, mask_T: jax.Array, num_sequences: int, *, sequence_balance: bool = False
) -> RoutingSums:
    """The sums of `routing` over its tokens, padding excluded.

    Args:
      routing: a router's answer for T = B * S tokens, sequence after sequence.
      mask_T: bool, False for padding; the mask the router was given.
      num_sequences: B.
      sequence_balance: whether to compute `sequence_balance_sum`.

    Raises:
      ValueError: T is not a multiple of `num_sequences`.
      ConfigError: the balance of sequences under a soft router.
    """
    if mask_T.shape[0] % num_sequences:
        raise ValueError(f"num_sequences = {num_sequences} does not divide the {mask_T.shape[0]} tokens of mask_T.")
    if sequence_balance and isinstance(routing, SoftRouting):
        raise ConfigError(
            "model.moe.balance_loss_scope = 'sequence' but a soft router makes no choices to count; set 'global', and"
            " model.moe.balance_loss_weight=0.0: its balance loss is always 1."
        )
    probs_TE = jnp.where(mask_T[:, None], routing.probs_TE, 0.0)
    z_T = jnp.square(jax.nn.logsumexp(routing.logits_TE, axis=-1))
    margin_T = score_margin(routing)
    balance_sum = _sequence_balance_sum(routing, probs_TE, mask_T, num_sequences) if sequence_balance else jnp.zeros(())
    return RoutingSums(
        load_E=count_load(routing),
        prob_sum_E=probs_TE.sum(0),
        z_sum=jnp.sum(jnp.where(mask_T, z_T, 0.0)),
        entropy_sum=jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(probs_TE))),
        sequence_balance_sum=balance_sum,
        num_tokens=jnp.sum(mask_T, dtype=jnp.int32),
        num_sequences=jnp.sum(mask_T.reshape(num_sequences, -1).any(1), dtype=jnp.int32),
        margin_sum=None if margin_T is None else jnp.sum(jnp.where(mask_T, margin_T, 0.0)),
        own=dict(routing.sums),
    )


def score_margin(routing: Routing | SoftRouting) -> jax.Array | None:
    """How near each token was to another choice, [T] float32: the least score of its experts less the greatest of the others.

    In the scores that the router chooses by (`Routing.score_TE`); negative where it chose against them (noise, a replay, a
    balanced assignment). 0 for a token without experts, or whose other experts were all closed to it. None where nothing is chosen
    by token: a soft router, an expert's choice, all experts at once.
    """
    if isinstance(routing, SoftRouting) or not routing.choices or routing.choices >= routing.num_experts:
        return None
    score_TE = jax.lax.stop_gradient(routing.probs_TE if routing.score_TE is None else routing.score_TE)
    expert_TK = routing.expert_A.reshape(routing.choices, -1).T
    is_chosen_TE = jnp.any(expert_TK[:, :, None] == jnp.arange(routing.num_experts), axis=1)
    least_T = jnp.min(jnp.where(is_chosen_TE, score_TE, jnp.inf), axis=1)
    greatest_T = jnp.max(jnp.where(is_chosen_TE, -jnp.inf, score_TE), axis=1)
    margin_T = least_T - greatest_T
    return jnp.where(jnp.isfinite(margin_T), margin_T, 0.0)


def _sequence_balance_sum(routing, probs_TE, mask_T, num_sequences):
    """Sum over sequences of E * sum_e f_e P_e within each (DeepSeek-V3, 2412.19437, eqs. 17-20, without its factor alpha).

    f counts the choices as they were made; eq. 18 counts those of the affinities without the bias (equal while the bias is 0).
    """
    length = mask_T.shape[0] // num_sequences
    load_BE = jnp.zeros((num_sequences, routing.num_experts + 1), jnp.int32)
    load_BE = load_BE.at[routing.token_A // length, routing.expert_A].add(1)[:, :-1]
    prob_sum_BE = probs_TE.reshape(num_sequences, length, -1).sum(1)
    return jnp.sum(balance_loss(load_BE, prob_sum_BE, mask_T.reshape(num_sequences, length).sum(1)))


def balance_loss(load_E: jax.Array, prob_sum_E: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """E * sum_e f_e P_e with f = load / sum(load), without gradient, and P = prob_sum / num_tokens: 1 at perfect balance.

    Switch Transformer (2101.03961) eqs. 4-6, with f over all K choices. The loss is linear in `prob_sum_E`: with the loads and
    the token count of the whole batch, the terms of its parts (microbatches, devices) add up to the whole batch's loss, values
    and gradients. That is the global scope of 2501.11873; with the loads and tokens of one microbatch it is the microbatch's.

    Args:
      load_E: int32 [..., E] over the scope of f.
      prob_sum_E: float32 [..., E] over the tokens at hand.
      num_tokens: [...], valid tokens over the scope of f.

    Returns: float32 [...]; 0 where there is no token.
    """
    load_E = load_E.astype(jnp.float32)
    fraction_E = load_E / jnp.maximum(load_E.sum(-1, keepdims=True), 1.0)
    return load_E.shape[-1] * jnp.sum(fraction_E * prob_sum_E, -1) / jnp.maximum(num_tokens, 1)


def sequence_balance_loss(sequence_balance_sum: jax.Array, num_sequences: jax.Array) -> jax.Array:
    """Mean over sequences of their own balance losses; parts over the whole batch's count add up like `balance_loss`."""
    return sequence_balance_sum / jnp.maximum(num_sequences, 1)


def z_loss(z_sum: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, 2202.08906, eq. 5; weight 1e-3); parts add up like `balance_loss`."""
    return z_sum / jnp.maximum(num_tokens, 1)
