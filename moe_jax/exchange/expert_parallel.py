"""The manual island: from a batch split over devices to the experts' answers, every collective of the layer in one place."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.config import MoEConfig
from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.exchange.plan import make_exchange
from moe_jax.exchange.soft import run_soft
from moe_jax.exchange.spread import Spread
from moe_jax.mesh import OUR_AXES, Axes, axis_size, lay_out
from moe_jax.ops.ordering import together
from moe_jax.ops.quantised import spec_of
from moe_jax.routing.contract import Alone, Router, SoftRouting, Tokens
from moe_jax.routing.losses import RoutingSums, routing_sums
from moe_jax.routing.record import RECORDED, choices_of


def moe_island(
    x_BSD: jax.Array,
    rows: Mapping[str, jax.Array],
    params: Mapping[str, jax.Array],
    state: Mapping[str, jax.Array],
    weights: Mapping[str, jax.Array],
    noise_key: jax.Array | None,
    loss_probe: Mapping[str, jax.Array] | None = None,
    *,
    router: Router,
    moe: MoEConfig,
    make_expert_fn: Callable[[Mapping[str, jax.Array]], ExpertFn],
    axes: Axes = OUR_AXES,
    beside_BSD: jax.Array | None = None,
    training: bool = False,
    record: bool = False,
) -> tuple[jax.Array, RoutingSums, Stats, dict[str, jax.Array]]:
    """Routes a batch and runs its experts on the ambient mesh (`jax.set_mesh`), or on one device where none is set.

    Tokens are split over the batch axes, experts over the expert axes, their width F over tensor and D over fsdp; D is gathered
    here just before use (the transpose scatters the gradient). A tensor device sums its slice of F; y is summed over it last.
    What is laid out otherwise is moved first; axes of the mesh may be explicit or auto.

    Args:
      x_BSD: split over the batch axes, any float dtype.
      rows: what a router may know of a token, [B, S] or [B, S, M], by the names of `routing.contract.Tokens`: `mask_T` (False for
        padding, which goes nowhere: its y is zero) and `token_id_T`; `vocabulary_T`, `replay_TM`, `replay_weight_TM` where known.
      params: the router's, by `Router.params`; float32, replicated.
      state: the router's, by `Router.init_state`; replicated.
      weights: expert arrays by name, the suffix giving their axes and so their sharding: `w_up_EDF`, `w_down_EFD`.
      noise_key: typed key of this step and layer; None for no noise.
      loss_probe: arrays as `params`, whatever their values: their gradient is the part of that of `params` that comes through the
        routing sums, and so from this layer's auxiliary losses. None asks for nothing.
      router: the routing rule.
      moe: names dispatch, exchange, and whether per-sequence balance sums are wanted.
      make_expert_fn: from the gathered weights of this device's experts to the function that applies them.
      axes: which axes of the mesh play which part.
      beside_BSD: something to add to y (shared experts), ready before the experts start: it can be computed while the tokens travel.
      training: as in `Tokens`.
      record: whether to return the choices too.

    Returns: y_BSD like x; the routing sums and the counts of the global batch (`bytes_sent` of all devices, those along tensor too,
      without the gathers of weights and the sum over tensor); and arrays of one row a token, [B, S, ...] split as x: the router's
      `per_token`, and with `record` more (`_by_token`).

    Raises:
      ValueError: rows, experts or widths that the devices do not divide, or arrays of a mesh that is not set.
    """
    whole, axes = axes, axes.present()  # an axis of size 1 splits nothing, but on a CPU its collectives would copy every weight
    specs = {name: spec_of(w, axes.weight_spec(name.rsplit("_", 1)[1])) for name, w in weights.items()}
    tensor = (axes.tensor,) if axes.tensor else ()

    def body(x_BSD, rows, params, state, weights, beside_BSD, loss_probe, noise_key):
        in_lines = {name: array.reshape(-1, *array.shape[2:]) for name, array in ({"x_TD": x_BSD} | rows).items()}
        about = {"num_sequences": len(x_BSD), "training": training, "batch": Spread(axes.batch) if axes.batch else Alone()}
        tokens = Tokens(**in_lines, noise_key=noise_key, **about)
        routing, sums = _route(router, tokens, params, state, loss_probe, moe)
        weights = jax.tree.map(partial(_gather_fsdp, fsdp=axes.fsdp), weights, specs)
        expert_fn = jax.named_scope("experts")(make_expert_fn(weights))
        y_TD, stats, beside_BSD = _run_experts(x_BSD, tokens, routing, expert_fn, beside_BSD, moe, axes)
        y_TD = jax.lax.psum(y_TD, tensor)
        y_TD = y_TD if routing.beside_TD is None else y_TD + routing.beside_TD
        y_BSD = y_TD.astype(x_BSD.dtype).reshape(x_BSD.shape) + (0 if beside_BSD is None else beside_BSD)
        padding = jnp.sum(~tokens.mask_T, dtype=jnp.int32) * (routing.choices or 0)
        stats = stats.replace(padding=padding, bytes_sent=stats.bytes_sent * math.prod(map(axis_size, tensor)))
        per_token = _by_token(x_BSD, routing, tokens, moe, axes, record)
        return y_BSD, per_token, *(jax.lax.psum((sums, stats), axes.batch) if axes.batch else (sums, stats))

    rows_BSD, rows_BS = axes.batch_spec(3), axes.batch_spec(2)
    row_specs = {name: axes.batch_spec(array.ndim) for name, array in rows.items()}
    in_specs = (rows_BSD, row_specs, P(), P(), specs, rows_BSD, P())
    arrays = (x_BSD, dict(rows), dict(params), dict(state), dict(weights), beside_BSD, loss_probe and dict(loss_probe))
    arrays = jax.tree.map(_lay_out_all, in_specs, arrays, is_leaf=lambda leaf: isinstance(leaf, P))
    island = body
    if not jax.sharding.get_abstract_mesh().empty:
        island = jax.shard_map(body, in_specs=(*in_specs, P()), out_specs=(rows_BSD, P(rows_BS[0]), P(), P()))
    y_BSD, per_token, sums, stats = island(*arrays, noise_key)
    per_token = {name: lay_out(array, whole.batch_spec(array.ndim)) for name, array in per_token.items()}
    return lay_out(y_BSD, whole.batch_spec(3)), sums, stats, per_token


@jax.named_scope("route")
def _route(router, tokens, params, state, loss_probe, moe):
    """The routing of this device's tokens and its sums, these through the probe where there is one."""
    routing = router(tokens, params, state)
    probed = routing if loss_probe is None else router(tokens, jax.tree.map(_tapped, params, loss_probe), state)
    by_sequence = moe.balance_loss_scope == "sequence"
    return routing, routing_sums(probed, tokens.mask_T, tokens.num_sequences, sequence_balance=by_sequence)


@jax.custom_vjp
def _tapped(param, probe):
    """`param`, whose gradient goes to `probe` too."""
    return param


_tapped.defvjp(lambda param, probe: (param, None), lambda _, gradient: (gradient, gradient))


def _by_token(x_BSD, routing, tokens, moe, axes, record):
    """Arrays of one row a token, [B, S, ...]: the router's own, and with `record` "choice" and "choice_weight"
    (`routing.record.choices_of`) and "dropped", int32: how many of its choices no expert answered."""
    arrays = dict(routing.per_token)
    if record:
        choice_TM, weight_TM = choices_of(routing)
        dropped_T = _dropped(x_BSD, routing, tokens, moe, axes) if moe.may_drop else jnp.zeros_like(choice_TM[:, 0])
        arrays |= dict(zip((*RECORDED, "dropped"), (choice_TM, weight_TM, dropped_T), strict=True))
    return {name: array.reshape(*x_BSD.shape[:2], *array.shape[1:]) for name, array in arrays.items()}


def _dropped(x_BSD, routing, tokens, moe, axes):
    """How many of each token's choices got no answer, int32 [T]: what does not come home when it sends the number 1 to its experts."""
    made_A = (routing.expert_A < routing.num_experts).astype(jnp.int32)
    made_T = jnp.zeros_like(tokens.token_id_T).at[routing.token_A].add(made_A)
    by_one = routing.replace(weight_A=made_A.astype(jnp.float32), priority_A=routing.weight_A, beside_TD=None)
    of_ones = tokens.replace(x_TD=jnp.ones_like(tokens.x_TD[:, :1]))
    sum_T1, _, _ = _run_experts(x_BSD[:, :, :1], of_ones, by_one, lambda x, group_sizes_E=None: x, None, moe, axes)
    return made_T - jnp.round(sum_T1[:, 0]).astype(jnp.int32)


def _lay_out_all(spec, arrays):
    return jax.tree.map(lambda array: lay_out(array, spec), arrays)


def _run_experts(x_BSD, tokens, routing, expert_fn, beside_BSD, moe, axes):
    """(y_TD float32 before the sum over tensor, counts, beside_BSD) of this device's tokens."""
    if isinstance(routing, SoftRouting):
        y_BSD, stats = run_soft(x_BSD, routing, expert_fn, axes.expert)
        return y_BSD.reshape(tokens.x_TD.shape), stats, beside_BSD
    exchange = make_exchange(moe, {axis: axis_size(axis) for axis in axes.expert})
    sent = exchange.begin(tokens.x_TD, routing)
    if beside_BSD is not None and axes.expert:
        arrived, beside_BSD = together(sent.arrived, beside_BSD)
        sent = sent._replace(arrived=arrived)
    return *exchange.finish(exchange.work(sent, expert_fn)), beside_BSD


def _gather_fsdp(w: jax.Array, spec: P, fsdp: str | None) -> jax.Array:
    """The whole D of a weight, of which this device holds its fsdp slice."""
    if fsdp is None or fsdp not in spec:
        return w
    return jax.lax.all_gather(w, fsdp, axis=spec.index(fsdp), tiled=True)
