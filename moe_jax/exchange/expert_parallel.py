"""The manual island: from a batch split over devices to the experts' answers, every collective of the layer in one place."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.config import MoEConfig
from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.exchange.contract import AXIS
from moe_jax.exchange.plan import make_exchange
from moe_jax.mesh import BATCH_AXES, axis_size, batch_spec
from moe_jax.routing.contract import Router
from moe_jax.routing.losses import RoutingSums, routing_sums

WEIGHT_AXES = {"E": AXIS, "D": "fsdp", "F": "tensor"}  # by the letters of a weight's name


def moe_island(
    x_BSD: jax.Array,
    mask_BS: jax.Array,
    token_id_BS: jax.Array,
    w_router_DE: jax.Array,
    bias_E: jax.Array,
    weights: Mapping[str, jax.Array],
    noise_key: jax.Array | None,
    *,
    router: Router,
    moe: MoEConfig,
    make_expert_fn: Callable[[Mapping[str, jax.Array]], ExpertFn],
) -> tuple[jax.Array, RoutingSums, Stats]:
    """Routes a batch and runs its experts on the ambient mesh (`jax.set_mesh`).

    Tokens are split over (data, fsdp, expert), experts over expert, their width F over tensor and D over fsdp; D is gathered
    here just before use (the transpose scatters the gradient). A tensor device sums its slice of F; y is summed over it last.

    Args:
      x_BSD: split over the batch axes, any float dtype.
      mask_BS: bool, False for padding, which goes nowhere: its y is zero.
      token_id_BS: int32, places in the global batch.
      w_router_DE: float32, replicated.
      bias_E: float32, replicated.
      weights: expert arrays by name, the suffix giving their axes and so their sharding: `w_up_EDF`, `w_down_EFD`.
      noise_key: typed key of this step and layer; None for no noise.
      router: the routing rule.
      moe: names dispatch, exchange, and whether per-sequence balance sums are wanted.
      make_expert_fn: from the gathered weights of this device's experts to the function that applies them.

    Returns: y_BSD like x; the routing sums and the counts of the global batch. `bytes_sent` adds up all devices, those along
      tensor too; the gathers of weights and the sum over tensor are not in it.
    """
    specs = {name: P(*(WEIGHT_AXES[letter] for letter in name.rsplit("_", 1)[1])) for name in weights}
    exchange = make_exchange(moe, axis_size(AXIS), jnp.float32)

    def body(x_BSD, mask_BS, token_id_BS, w_router_DE, bias_E, weights, noise_key):
        x_TD, mask_T = x_BSD.reshape(-1, x_BSD.shape[-1]), mask_BS.reshape(-1)
        token_id_T = token_id_BS.reshape(-1)
        routing = router(x_TD, w_router_DE, bias_E, mask_T, noise_key=noise_key, token_id_T=token_id_T)
        sequence_balance = moe.balance_loss_scope == "sequence"
        sums = routing_sums(routing, mask_T, x_BSD.shape[0], sequence_balance=sequence_balance)
        weights = {name: _gather_fsdp(w, specs[name]) for name, w in weights.items()}
        y_TD, stats = exchange(x_TD, routing, make_expert_fn(weights))
        y_TD = jax.lax.psum(y_TD, "tensor").astype(x_TD.dtype)
        stats = stats.replace(
            padding=jnp.sum(~mask_T, dtype=jnp.int32) * (routing.choices or 0),
            bytes_sent=stats.bytes_sent * axis_size("tensor"),
        )
        return y_TD.reshape(x_BSD.shape), *jax.lax.psum((sums, stats), BATCH_AXES)

    in_specs = (batch_spec(3), batch_spec(2), batch_spec(2), P(), P(), specs, P())
    island = jax.shard_map(body, in_specs=in_specs, out_specs=(batch_spec(3), P(), P()))
    return island(x_BSD, mask_BS, token_id_BS, w_router_DE, bias_E, dict(weights), noise_key)


def _gather_fsdp(w: jax.Array, spec: P) -> jax.Array:
    """The whole D of a weight, of which this device holds its fsdp slice."""
    if "fsdp" not in spec:
        return w
    return jax.lax.all_gather(w, "fsdp", axis=spec.index("fsdp"), tiled=True)
