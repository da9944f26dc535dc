"""The train step: (state, batch, key) -> (state, metrics), pure, jitted once, the state donated.

Gradient accumulation is exactly the large batch: see `train.objective`. With `balance_loss_accumulation="exact"` and a global-scope
balance loss, one forward pass over the microbatches comes first to count the loads; "running" uses the loads counted so far in this
step instead (2501.11873, section 3.2), which is cheaper and approximate.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import Config
from moe_jax.mesh import BATCH_AXES
from moe_jax.models.transformer import innermost, token_ids, with_innermost
from moe_jax.routing import make_router, metrics
from moe_jax.routing.contract import Router
from moe_jax.routing.record import RECORDED
from moe_jax.train import objective as obj
from moe_jax.train.finite import take_or_skip
from moe_jax.train.optimizer import learning_rate, updates_made
from moe_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    config: Config, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, obj.Batch, jax.Array], tuple[TrainState, Metrics]]:
    """The jitted step of a config.

    The batch holds tokens, targets, segment_ids, positions (int32) and loss_weights (float32), [B, S], split over the batch axes; to
    replay a routing, `choice` and maybe `choice_weight` (`train.objective`).
    Metrics are a flat dict: scalars, and arrays over MoE layers [L] or layers and experts [L, E], the last of them the layer of
    `model.mtp_layers` if there is one. With `train.record` the routing is
    among them, as `make_gradient_fn` has it. A step whose loss or gradient norm is not finite is skipped (`train.finite`).
    """
    schedule = learning_rate(config.optimizer, config.train.steps)
    measure = make_gradient_fn(config, graphdef, record=bool(config.train.record), observe=config.train.observe)

    def train_step(state, batch, key):
        step_key = jax.random.fold_in(key, state.step)
        gradients, router_state, report = measure(state.params, state.router_state, batch, step_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        report |= {"train/learning_rate": schedule(updates_made(state.opt_state))}
        new = TrainState(state.step + 1, params, router_state, opt_state)
        return (new, report) if config.guards.non_finite == "off" else take_or_skip(state, new, report)

    return jax.jit(train_step, donate_argnums=0)


def make_gradient_fn(
    config: Config, graphdef: nnx.GraphDef, *, record: bool = False, observe: bool = False
) -> Callable[..., tuple[dict, dict, Metrics]]:
    """The pure `(params, router_state, batch, noise_key) -> (gradients, next router_state, metrics)`: a train step but for optax.

    With `record` the metrics have the routing's `record/choice` and `record/choice_weight`, [B, S, L, M]; with `observe` what
    docs/observatory.md says of a step.
    """
    model = config.model
    router = make_router(model.moe.router, model.moe.num_experts) if model.num_moe_layers else None

    has_loss = router is not None and (router.has_loss or model.moe.balance_loss_weight > 0 or model.moe.z_loss_weight > 0)

    def measure(params, router_state, batch, noise_key):
        settings = {"graphdef": graphdef, "config": config, "record": record}
        probe = routers(params, router, model.d_model) if observe and has_loss else None
        (gradients, of_losses), (sums, recorded), totals = _batch_gradients(
            params, probe, router_state, batch, noise_key, **settings
        )
        state = innermost(router_state)
        if state:
            state = router.update(state, sums.routing)
            router_state = with_innermost(router_state, state)
        report = _metrics(model, sums, totals, state) | {"train/gradient_norm": optax.global_norm(gradients)}
        if observe and router is not None:
            report |= _observed(model, sums, totals, state)
            if of_losses:
                report["router/gradient_ratio"] = gradient_ratio(of_losses, routers(gradients, router, model.d_model))
        return gradients, router_state, report | {f"record/{name}": recorded[name] for name in RECORDED if name in recorded}

    return measure


def _batch_gradients(params, probe, router_state, batch, noise_key, *, graphdef, config: Config, record: bool):
    """Gradients of the whole batch's objective by (params, probe), its sums and records, and its totals, over `train.accumulation`
    microbatches."""
    batch = batch | {"token_id": token_ids(batch["tokens"])}
    totals = obj.count(batch, with_ahead=config.model.mtp_layers > 0)
    objective = partial(obj.objective, graphdef=graphdef, config=config.model, record=record)

    def loss(by, router_state, batch, noise_key, totals, choose=lambda own: own):
        return objective(by[0], router_state, batch, noise_key, totals, choose, by[1])

    by = params, probe
    gradient = jax.grad(loss, has_aux=True)
    count = config.train.accumulation
    if count == 1:
        return *gradient(by, router_state, batch, noise_key, totals), totals

    microbatches = split(batch, count)
    mode = _sums_mode(config.model)
    routing_of = lambda m: loss(by, router_state, m, noise_key, totals)[1][0].routing  # noqa: E731
    start = None
    if mode == "exact":
        start = _count(routing_of, microbatches)
    elif mode == "running":
        one = jax.tree.map(lambda x: x[0], microbatches)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(routing_of, one))

    def body(carry, microbatch):
        gradients, seen = carry
        choose = {"exact": lambda own: seen, "running": lambda own: seen + own, "own": lambda own: own}[mode]
        new, (sums, recorded) = gradient(by, router_state, microbatch, noise_key, totals, choose)
        if mode == "running":
            seen = seen + sums.routing
        return (jax.tree.map(jnp.add, gradients, new), seen), (sums, recorded)

    (gradients, _), (sums, recorded) = jax.lax.scan(body, (jax.tree.map(jnp.zeros_like, by), start), microbatches)
    return gradients, (_add_up(sums), jax.tree.map(_unsplit, recorded)), totals


def _sums_mode(model):
    """Where the router's losses take the sums from that they are no linear functions of: "exact", "running" or a microbatch's "own"."""
    moe = model.moe
    if not model.num_moe_layers:
        return "own"
    by_load = moe.balance_loss_weight != 0 and moe.balance_loss_scope == "global"
    if by_load or make_router(moe.router, moe.num_experts).has_loss:
        return moe.balance_loss_accumulation
    return "own"


def _count(routing_of, microbatches):
    """Routing sums [L, ...] of all microbatches together, by a forward pass over each."""
    return _add_up(jax.lax.scan(lambda _, microbatch: (None, routing_of(microbatch)), None, microbatches)[1])


def _add_up(parts):
    return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), parts)


def split(batch: obj.Batch, count: int) -> obj.Batch:
    """[B, ...] -> [count, B / count, ...]: microbatch m takes rows m, m + count, ... so that no row changes its device."""

    def one(x):
        x = jax.lax.reshape(x, (x.shape[0] // count, count, *x.shape[1:]), out_sharding=P(BATCH_AXES, *(None,) * x.ndim))
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(one, batch)


def _unsplit(x):
    """The inverse of `split` for one array."""
    x = jnp.swapaxes(x, 0, 1)
    return jax.lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), out_sharding=P(BATCH_AXES, *(None,) * (x.ndim - 2)))


def _metrics(config, sums, totals, state):
    nll = sums.nll / totals.targets
    report = {"train/loss": nll, "train/perplexity": jnp.exp(nll), "train/targets": totals.targets}
    if config.logit_z_loss_weight:
        report["train/logit_z_loss"] = sums.logit_z / totals.targets
    if sums.nll_ahead is not None:
        report["loss/mtp"] = sums.nll_ahead / totals.ahead.targets
    if sums.routing is None:
        return report
    stats, routing_sums = sums.stats, sums.routing
    tokens = totals.of_layers(len(stats.load_E)).tokens
    dropped_L = stats.dropped_capacity + stats.dropped_sender + stats.dropped_receiver
    routed_L = jnp.maximum(jnp.sum(stats.load_E, axis=-1), 1)
    report |= {
        "router/balance_loss": jnp.mean(sums.balance_L),
        "router/z_loss": jnp.mean(routing_sums.z_sum / tokens),
        "router/load": stats.load_E,
        "router/max_violation": metrics.max_violation(stats.load_E),
        "router/dead_experts": metrics.dead_experts(stats.load_E),
        "router/entropy": metrics.mean_entropy(routing_sums.entropy_sum, tokens, config.moe.num_experts),
        "router/dropped_fraction": dropped_L / routed_L,
        "router/dropped_capacity": stats.dropped_capacity,
        "router/dropped_sender": stats.dropped_sender,
        "router/dropped_receiver": stats.dropped_receiver,
        "router/padding": stats.padding,
        "exchange/bytes": stats.bytes_sent,
        "exchange/exact": (stats.exact > 0).astype(jnp.int32),
    }
    report["router/experts_per_token"] = jnp.sum(stats.load_E, axis=-1) / tokens
    if sums.router_L is not None:
        report["router/own_loss"] = jnp.mean(sums.router_L)
    if sums.reward is not None:
        report["router/reward_loss"] = sums.reward / totals.targets
    return report | {f"router/{name.rsplit('_', 1)[0]}": value for name, value in state.items()}


def _observed(config, sums, totals, state):
    """Figures of docs/observatory.md beyond those that every step has."""
    stats, routing_sums = sums.stats, sums.routing
    mean_L = jnp.maximum(jnp.mean(stats.load_E.astype(jnp.float32), axis=-1), 1.0)
    report = {"router/noise_floor": metrics.noise_floor(config.moe.num_experts, mean_L)}
    if routing_sums.margin_sum is not None:
        report["router/margin"] = routing_sums.margin_sum / totals.of_layers(len(stats.load_E)).tokens
    if "bias_E" in state:
        report["router/bias_range"] = jnp.ptp(state["bias_E"], axis=-1)
    return report


def routers(tree: dict, router: Router, d_model: int) -> dict[str, jax.Array]:
    """The routers' parameters by name, stacked over MoE layers [L, ...], out of the nested dict of a model's parameters or gradients."""
    names = router.params(d_model)
    stacks = list(_with_keys(tree, set(names)))
    return {name: jnp.concatenate([stack[name] for stack in stacks]) for name in names} if names else {}


def _with_keys(tree, names):
    """The dicts within a nested dict that have all these keys, in the order of its keys, which is that of the layers."""
    if names <= tree.keys():
        yield tree
        return
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            yield from _with_keys(tree[name], names)


def gradient_ratio(of_losses: dict[str, jax.Array], all_of_it: dict[str, jax.Array]) -> jax.Array:
    """Norm of a layer's router gradient that comes from the layer's auxiliary losses, over that of the rest of it, [L].

    Args:
      of_losses: that part, by the routers' parameters [L, ...].
      all_of_it: the whole gradient.
    """

    def norms(tree):
        return jnp.sqrt(sum(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(tree)))

    rest = jax.tree.map(jnp.subtract, all_of_it, of_losses)
    return norms(of_losses) / jnp.maximum(norms(rest), jnp.finfo(jnp.float32).tiny)
