"""The training objective as sums over microbatches, so that accumulated gradients are those of the whole batch.

    L = nll + w_z logit_z + sum over MoE layers of (w_b balance + w_r router_z)

The mean negative log-likelihood is over the counted targets of the *whole* batch and router terms over its valid tokens. Each
microbatch contributes its sum divided by the whole batch's count. The balance loss (2101.03961, eq. 4) is a product of the load
fractions f, which take no gradient, and the mean probabilities P, which are linear in the tokens: with f known for the whole batch,
its gradient is a sum over microbatches too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from moe_jax.config import ModelConfig
from moe_jax.layers.moe import MoEAux
from moe_jax.ops.cross_entropy import cross_entropy
from moe_jax.routing import losses

Batch = dict[str, jax.Array]


@struct.dataclass
class Totals:
    """Counts of the whole batch, known before any forward pass, float32: what the sums are divided by."""

    targets: jax.Array
    tokens: jax.Array
    sequences: jax.Array


@struct.dataclass
class Sums:
    """What one microbatch contributes; adding them over microbatches gives the whole batch's figures.

    `balance` [L] is this microbatch's share of each layer's balance loss, with the loads that its gradient used.
    """

    nll: jax.Array
    logit_z: jax.Array
    balance_L: jax.Array | None
    aux: MoEAux | None


def count(batch: Batch) -> Totals:
    """Totals of a batch with `loss_weights` and `segment_ids`, [B, S]."""
    valid_BS = batch["segment_ids"] > 0
    return Totals(
        targets=jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0),
        tokens=jnp.maximum(jnp.sum(valid_BS, dtype=jnp.float32), 1.0),
        sequences=jnp.maximum(jnp.sum(jnp.any(valid_BS, axis=1), dtype=jnp.float32), 1.0),
    )


def objective(
    params: Any,
    router_bias: Any,
    batch: Batch,
    noise_key: jax.Array | None,
    totals: Totals,
    choose_load: Callable[[jax.Array], jax.Array] = lambda own_LE: own_LE,
    *,
    graphdef: nnx.GraphDef,
    config: ModelConfig,
) -> tuple[jax.Array, Sums]:
    """One microbatch's contribution to the loss of the whole batch, and its sums.

    Args:
      params: nested dict of arrays.
      router_bias: nested dict of arrays.
      batch: tokens, targets, segment_ids, positions, token_id (int32) and loss_weights (float32), all [B, S].
      noise_key: key of this step; None in evaluation.
      totals: of the whole batch.
      choose_load: from this microbatch's int32 loads [L, E] to those that the balance loss takes f from.
    """
    model = nnx.merge(graphdef, params, router_bias)
    logits_BSV, aux = model(batch["tokens"], batch["segment_ids"], batch["positions"], noise_key, batch["token_id"])
    nll_BS, z_BS = cross_entropy(logits_BSV, batch["targets"])
    sums = Sums(jnp.sum(nll_BS * batch["loss_weights"]), jnp.sum(z_BS * batch["loss_weights"]), None, aux)
    loss = sums.nll / totals.targets + config.logit_z_loss_weight * sums.logit_z / totals.targets
    if aux is not None:
        moe = config.moe
        balance_L = _balance(aux, totals, choose_load, moe.balance_loss_scope)
        sums = sums.replace(balance_L=balance_L)
        router_z_L = losses.z_loss(aux.sums.z_sum, totals.tokens)
        loss = loss + moe.balance_loss_weight * jnp.sum(balance_L) + moe.z_loss_weight * jnp.sum(router_z_L)
    return loss, sums


def _balance(aux, totals, choose_load, scope):
    """This microbatch's share of the balance loss of each layer, [L]; the shares add up to 1 at perfect balance."""
    if scope == "sequence":
        return losses.sequence_balance_loss(aux.sums.sequence_balance_sum, totals.sequences)
    return losses.balance_loss(choose_load(aux.stats.load_E), aux.sums.prob_sum_E, totals.tokens)
