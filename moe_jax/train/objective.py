"""The training objective as sums over microbatches, so that accumulated gradients are those of the whole batch.

    L = nll + w_a nll_ahead + w_z logit_z
        + sum over MoE layers of (w_b balance + w_r router_z + the router's own loss + its reward loss)

The mean negative log-likelihood is over the counted targets of the *whole* batch and router terms over its valid tokens. Each
microbatch contributes its sum divided by the whole batch's count. The balance loss (2101.03961, eq. 4) is a product of the load
fractions f, which take no gradient, and the mean probabilities P, which are linear in the tokens: with f known for the whole batch,
its gradient is a sum over microbatches too. So is that of any function of sums over tokens (a router's own loss), taken at the sums of
the whole batch: d L(S) = L'(S) sum_m dS_m.

nll_ahead is that of the token after the next (`model.mtp_layers`; DeepSeek-V3, 2412.19437, eqs. 24, 25), the mean over the places whose
next two tokens are of their document and counted. The layer that predicts it is one more MoE layer, the last, to every term, figure
and state by layer, over the tokens that it sees; but its choices are not recorded, nor replayed. Evaluation leaves it out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.dispatch.contract import Stats
from moe_jax.layers.moe import Replay
from moe_jax.models.transformer import innermost
from moe_jax.ops.cross_entropy import cross_entropy
from moe_jax.routing import losses, make_router
from moe_jax.routing.record import RECORDED

Batch = dict[str, jax.Array]


@struct.dataclass
class Totals:
    """Counts of the whole batch, known before any forward pass, float32: what the sums are divided by.

    Attributes:
      targets: that count.
      tokens: without padding.
      sequences: with at least one token.
      ahead: the same of `ahead(batch)`; None: the token after the next is not predicted.
    """

    targets: jax.Array
    tokens: jax.Array
    sequences: jax.Array
    ahead: "Totals | None" = None

    def of_layers(self, num_layers: int) -> "Totals":
        """What each of so many MoE layers, that of `ahead` included, divides its sums by: numbers that are alike, or [L]."""
        if self.ahead is None:
            return self
        own = self.replace(ahead=None)
        return jax.tree.map(lambda own, last: jnp.stack([own] * (num_layers - 1) + [last]), own, self.ahead)


@struct.dataclass
class Sums:
    """What one microbatch contributes; adding them over microbatches gives the whole batch's figures.

    Attributes:
      nll: of the counted targets.
      logit_z: of the counted targets.
      balance_L: this microbatch's share of each layer's balance loss, with the loads that its gradient used.
      router_L: its share of each layer's own loss of the router.
      reward: its reward losses, each times the targets over those of its layer.
      routing: None for a dense model.
      stats: None for a dense model.
      nll_ahead: of the counted targets of `ahead(batch)`; None where they are not predicted.
    """

    nll: jax.Array
    logit_z: jax.Array
    balance_L: jax.Array | None = None
    router_L: jax.Array | None = None
    reward: jax.Array | None = None
    routing: losses.RoutingSums | None = None
    stats: Stats | None = None
    nll_ahead: jax.Array | None = None


def ahead(batch: Batch) -> Batch:
    """The batch in which each place has the next token and predicts the one after it; padding where the next is not in its segment.

    At the end of a row the next token is not looked at, though the row's last target tells it: the one after is not known.
    """

    def following(x_BS):
        return jnp.concatenate([x_BS[:, 1:], jnp.zeros_like(x_BS[:, :1])], axis=1)

    segment_ids_BS = batch["segment_ids"]
    has_next_BS = (segment_ids_BS > 0) & (following(segment_ids_BS) == segment_ids_BS)
    shifted = {name: following(batch[name]) for name in ("tokens", "targets", "loss_weights")}
    shifted["loss_weights"] = jnp.where(has_next_BS, shifted["loss_weights"], 0)
    return batch | shifted | {"segment_ids": jnp.where(has_next_BS, segment_ids_BS, 0)}


def count(batch: Batch, *, with_ahead: bool = False) -> Totals:
    """Totals of a batch with `loss_weights` and `segment_ids`, [B, S]; `with_ahead` for a loss of the token after the next too."""
    valid_BS = batch["segment_ids"] > 0
    return Totals(
        ahead=count(ahead(batch)) if with_ahead else None,
        targets=jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0),
        tokens=jnp.maximum(jnp.sum(valid_BS, dtype=jnp.float32), 1.0),
        sequences=jnp.maximum(jnp.sum(jnp.any(valid_BS, axis=1), dtype=jnp.float32), 1.0),
    )


def objective(
    params: Any,
    router_state: Any,
    batch: Batch,
    noise_key: jax.Array | None,
    totals: Totals,
    choose_sums: Callable[[losses.RoutingSums], losses.RoutingSums] = lambda own: own,
    loss_probe: dict[str, jax.Array] | None = None,
    *,
    graphdef: nnx.GraphDef,
    config: ModelConfig,
    record: bool = False,
) -> tuple[jax.Array, tuple[Sums, dict[str, jax.Array]]]:
    """One microbatch's contribution to the loss of the whole batch, its sums, and what was recorded of its routing.

    Args:
      params: nested dict of arrays.
      router_state: nested dict of arrays.
      batch: tokens, targets, segment_ids, positions, token_id (int32) and loss_weights (float32), all [B, S]; and to replay a routing
        `choice` (int32) with or without `choice_weight` (float32), [B, S, L, M].
      noise_key: key of this step; None in evaluation.
      totals: of the whole batch. They say whether the token after the next is predicted.
      choose_sums: from this microbatch's sums [L, ...] to those that the balance loss takes f from, and where the router's own loss is
        linearised.
      loss_probe: arrays like the routers' parameters, [L, ...] (`routers`): their gradient is the part of the parameters' that comes
        from the auxiliary losses of the same layer.
      record: whether to return `choice` and `choice_weight`, [B, S, L, M], as `batch` takes them, and `dropped`, int32 [B, S, L]: how
        many of a token's choices no expert answered.
    """
    model = nnx.merge(graphdef, params, router_state)
    replay = _replay(batch)
    inputs = batch["tokens"], batch["segment_ids"], batch["positions"], noise_key, batch["token_id"]
    of_hidden, of_ahead = _probes(loss_probe, config)
    x_BSD, aux = model.hidden(*inputs, replay=replay, record=record, loss_probe=of_hidden)
    nll_BS, z_BS = cross_entropy(model.logits(x_BSD), batch["targets"])
    sums = Sums(jnp.sum(nll_BS * batch["loss_weights"]), jnp.sum(z_BS * batch["loss_weights"]))
    loss = sums.nll / totals.targets + config.logit_z_loss_weight * sums.logit_z / totals.targets
    names = (*RECORDED, "dropped") if record and aux is not None else ()
    recorded = {name: jnp.moveaxis(aux.per_token[name], 0, 2) for name in names}
    reward_LBS, weight_LBS = -jax.lax.stop_gradient(nll_BS)[None], batch["loss_weights"][None]
    if totals.ahead is not None:
        later = ahead(batch)
        inputs = later["tokens"], later["segment_ids"], batch["positions"], noise_key, batch["token_id"]
        logits_BSV, last = model.ahead(x_BSD, *inputs, loss_probe=of_ahead)
        nll_BS, _ = cross_entropy(logits_BSV, later["targets"])
        sums = sums.replace(nll_ahead=jnp.sum(nll_BS * later["loss_weights"]))
        loss += config.mtp_loss_weight * sums.nll_ahead / totals.ahead.targets
        if aux is not None:
            weight_BS = later["loss_weights"] * (totals.targets / totals.ahead.targets)
            reward_LBS = _one_more(reward_LBS, -jax.lax.stop_gradient(nll_BS)[None], config.num_moe_layers)
            weight_LBS = _one_more(weight_LBS, weight_BS[None], config.num_moe_layers)
            per_token = {name: aux.per_token[name] for name in last.per_token}
            aux = jax.tree.map(lambda *parts: jnp.concatenate(parts), aux.replace(per_token=per_token), last)
    if aux is None:
        return loss, (sums, recorded)
    more, by_layer = _router_terms(aux, router_state, totals, choose_sums, reward_LBS, weight_LBS, config.moe)
    return loss + more, (sums.replace(**by_layer, routing=aux.sums, stats=aux.stats), recorded)


def _probes(loss_probe, config):
    """The probe of the layers that `hidden` runs, and of the one that predicts the token after the next."""
    if loss_probe is None:
        return None, None
    count = config.num_moe_layers
    ahead = {name: array_L[count:] for name, array_L in loss_probe.items()} if config.mtp_layers else None
    return {name: array_L[:count] for name, array_L in loss_probe.items()}, ahead


def _one_more(x_1BS, last_1BS, count):
    """`count` layers of the first and one of the last."""
    return jnp.concatenate([x_1BS] * count + [last_1BS])


def _replay(batch):
    if "choice" not in batch:
        return None
    layers_first = {name: jnp.moveaxis(batch[name], 2, 0) for name in RECORDED if name in batch}
    return Replay(layers_first["choice"], layers_first.get("choice_weight"))


def _router_terms(aux, router_state, totals, choose_sums, reward_LBS, weight_LBS, moe: MoEConfig):
    """Everything the routers add to the loss, and the parts of it that are reported; rewards may be one for all layers."""
    router = make_router(moe.router, moe.num_experts)
    at, num_layers = choose_sums(aux.sums), len(aux.router_loss)
    of_layers = totals.of_layers(num_layers)
    balance_L = _balance(aux, of_layers, at, moe.balance_loss_scope)
    router_z_L = losses.z_loss(aux.sums.z_sum, of_layers.tokens)
    loss = moe.balance_loss_weight * jnp.sum(balance_L) + moe.z_loss_weight * jnp.sum(router_z_L)
    parts = {"balance_L": balance_L}
    if router.has_loss:
        state = jax.tree.map(lambda array: array[:num_layers], innermost(router_state))
        parts["router_L"] = _own_loss(router, aux.sums, at, state, of_layers)
        loss += jnp.sum(parts["router_L"])
    if router.has_reward_loss:
        parts["reward"] = jnp.sum(router.reward_loss(aux.per_token, reward_LBS) * weight_LBS)
        loss += parts["reward"] / totals.targets
    return loss, parts


def _balance(aux, totals, at, scope):
    """This microbatch's share of the balance loss of each layer, [L]; the shares add up to 1 at perfect balance."""
    if scope == "sequence":
        return losses.sequence_balance_loss(aux.sums.sequence_balance_sum, totals.sequences)
    load_LE = at.load_E if scope == "global" else aux.sums.load_E
    return losses.balance_loss(load_LE, aux.sums.prob_sum_E, totals.tokens)


def _own_loss(router, sums, at, state, totals):
    """This microbatch's share of the router's own loss of each layer, [L]: its part of the value by tokens, its part of the gradient."""

    def moved(at, own):  # the value of `at`, the gradient of `own`
        if not jnp.issubdtype(own.dtype, jnp.floating):
            return at
        return jax.lax.stop_gradient(at) + (own - jax.lax.stop_gradient(own))

    value_L = jax.vmap(router.loss)(jax.tree.map(moved, at, sums), state)
    share_L = jax.lax.stop_gradient(value_L) * sums.num_tokens / totals.tokens
    return share_L + (value_L - jax.lax.stop_gradient(value_L))
