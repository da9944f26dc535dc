"""The manual island: from a batch split over devices to the experts' answers, every collective of the layer in one place."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.config import MoEConfig
from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.exchange.plan import make_exchange
from moe_jax.mesh import OUR_AXES, Axes, axis_size, lay_out
from moe_jax.ops.ordering import together
from moe_jax.routing.contract import Router
from moe_jax.routing.losses import RoutingSums, routing_sums


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
    axes: Axes = OUR_AXES,
    beside_BSD: jax.Array | None = None,
) -> tuple[jax.Array, RoutingSums, Stats]:
    """Routes a batch and runs its experts on the ambient mesh (`jax.set_mesh`), or on one device where none is set.

    Tokens are split over the batch axes, experts over the expert axes, their width F over tensor and D over fsdp; D is gathered
    here just before use (the transpose scatters the gradient). A tensor device sums its slice of F; y is summed over it last.
    What is laid out otherwise is moved first; axes of the mesh may be explicit or auto.

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
      axes: which axes of the mesh play which part.
      beside_BSD: something to add to y that does not come from these experts (shared experts); it is there before they start, so that it
        can be computed while the tokens travel.

    Returns: y_BSD like x; the routing sums and the counts of the global batch. `bytes_sent` adds up all devices, those along
      tensor too; the gathers of weights and the sum over tensor are not in it.

    Raises:
      ValueError: rows, experts or widths that the devices do not divide, or arrays of a mesh that is not set.
    """
    whole, axes = axes, axes.present()  # an axis of size 1 splits nothing, but on a CPU its collectives would copy every weight
    specs = {name: axes.weight_spec(name.rsplit("_", 1)[1]) for name in weights}
    exchange = make_exchange(moe, {axis: axis_size(axis) for axis in axes.expert})
    tensor = (axes.tensor,) if axes.tensor else ()

    def body(x_BSD, mask_BS, token_id_BS, w_router_DE, bias_E, weights, beside_BSD, noise_key):
        x_TD, mask_T = x_BSD.reshape(-1, x_BSD.shape[-1]), mask_BS.reshape(-1)
        token_id_T = token_id_BS.reshape(-1)
        routing = router(x_TD, w_router_DE, bias_E, mask_T, noise_key=noise_key, token_id_T=token_id_T)
        sequence_balance = moe.balance_loss_scope == "sequence"
        sums = routing_sums(routing, mask_T, x_BSD.shape[0], sequence_balance=sequence_balance)
        weights = {name: _gather_fsdp(w, specs[name], axes.fsdp) for name, w in weights.items()}
        sent = exchange.begin(x_TD, routing)
        if beside_BSD is not None and axes.expert:
            arrived, beside_BSD = together(sent.arrived, beside_BSD)
            sent = sent._replace(arrived=arrived)
        y_TD, stats = exchange.finish(exchange.work(sent, make_expert_fn(weights)))
        y_BSD = jax.lax.psum(y_TD, tensor).astype(x_TD.dtype).reshape(x_BSD.shape)
        y_BSD = y_BSD if beside_BSD is None else y_BSD + beside_BSD
        stats = stats.replace(
            padding=jnp.sum(~mask_T, dtype=jnp.int32) * (routing.choices or 0),
            bytes_sent=stats.bytes_sent * math.prod(map(axis_size, tensor)),
        )
        return y_BSD, *(jax.lax.psum((sums, stats), axes.batch) if axes.batch else (sums, stats))

    rows_BSD, rows_BS = axes.batch_spec(3), axes.batch_spec(2)
    in_specs = (rows_BSD, rows_BS, rows_BS, P(), P(), specs, rows_BSD)
    arrays = (x_BSD, mask_BS, token_id_BS, w_router_DE, bias_E, dict(weights), beside_BSD)
    arrays = jax.tree.map(
        lambda array, spec: array if array is None else lay_out(array, spec), arrays, in_specs, is_leaf=_is_none
    )
    island = body
    if not jax.sharding.get_abstract_mesh().empty:
        island = jax.shard_map(body, in_specs=(*in_specs, P()), out_specs=(rows_BSD, P(), P()))
    y_BSD, sums, stats = island(*arrays, noise_key)
    return lay_out(y_BSD, whole.batch_spec(3)), sums, stats


def _is_none(leaf):
    return leaf is None


def _gather_fsdp(w: jax.Array, spec: P, fsdp: str | None) -> jax.Array:
    """The whole D of a weight, of which this device holds its fsdp slice."""
    if fsdp is None or fsdp not in spec:
        return w
    return jax.lax.all_gather(w, fsdp, axis=spec.index(fsdp), tiled=True)
