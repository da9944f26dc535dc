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
from moe_jax.models.transformer import token_ids
from moe_jax.routing import make_router, metrics
from moe_jax.train import objective as obj
from moe_jax.train.optimizer import learning_rate
from moe_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    config: Config, graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, obj.Batch, jax.Array], tuple[TrainState, Metrics]]:
    """The jitted step of a config.

    The batch holds tokens, targets, segment_ids, positions (int32) and loss_weights (float32), [B, S], split over the batch axes.
    Metrics are a flat dict: scalars, and arrays over MoE layers [L] or layers and experts [L, E].
    """
    schedule = learning_rate(config.optimizer, config.train.steps)
    measure = make_gradient_fn(config, graphdef)

    def train_step(state, batch, key):
        step_key = jax.random.fold_in(key, state.step)
        gradients, router_bias, report = measure(state.params, state.router_bias, batch, step_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        report |= {"train/learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, router_bias, opt_state), report

    return jax.jit(train_step, donate_argnums=0)


def make_gradient_fn(config: Config, graphdef: nnx.GraphDef) -> Callable[..., tuple[dict, dict, Metrics]]:
    """The pure `(params, router_bias, batch, noise_key) -> (gradients, next router_bias, metrics)`: a train step but for optax."""
    model = config.model
    router = make_router(model.moe.router, model.moe.num_experts) if model.num_moe_layers else None

    def measure(params, router_bias, batch, noise_key):
        gradients, sums, totals = _batch_gradients(params, router_bias, batch, noise_key, graphdef=graphdef, config=config)
        if router is not None and router.has_bias:
            router_bias = jax.tree.map(lambda bias_LE: router.update_bias(bias_LE, sums.aux.stats.load_E), router_bias)
        report = _metrics(model, sums, totals, router_bias) | {"train/gradient_norm": optax.global_norm(gradients)}
        return gradients, router_bias, report

    return measure


def _batch_gradients(params, router_bias, batch, noise_key, *, graphdef, config: Config):
    """Gradients of the whole batch's objective, its sums and its totals, over `train.accumulation` microbatches."""
    batch = batch | {"token_id": token_ids(batch["tokens"])}
    totals = obj.count(batch)
    loss = partial(obj.objective, graphdef=graphdef, config=config.model)
    gradient = jax.grad(loss, has_aux=True)
    count = config.train.accumulation
    if count == 1:
        gradients, sums = gradient(params, router_bias, batch, noise_key, totals)
        return gradients, sums, totals

    microbatches = split(batch, count)
    mode = _load_mode(config.model)
    load_LE = None
    if mode == "exact":
        load_LE = _count_loads(lambda m: loss(params, router_bias, m, noise_key, totals)[1].aux.stats.load_E, microbatches)
    elif mode == "running":
        load_LE = jnp.zeros((config.model.num_moe_layers, config.model.moe.num_experts), jnp.int32)

    def body(carry, microbatch):
        gradients, load_LE = carry
        choose = {"exact": lambda own: load_LE, "running": lambda own: load_LE + own, "own": lambda own: own}[mode]
        new, sums = gradient(params, router_bias, microbatch, noise_key, totals, choose)
        if mode == "running":
            load_LE = load_LE + sums.aux.stats.load_E
        return (jax.tree.map(jnp.add, gradients, new), load_LE), sums

    (gradients, _), sums = jax.lax.scan(body, (jax.tree.map(jnp.zeros_like, params), load_LE), microbatches)
    return gradients, jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), sums), totals


def _load_mode(model):
    """Where the balance loss takes its loads from under accumulation: "exact", "running" or the microbatch's "own"."""
    moe = model.moe
    if not model.num_moe_layers or moe.balance_loss_weight == 0 or moe.balance_loss_scope != "global":
        return "own"
    return moe.balance_loss_accumulation


def _count_loads(load_of, microbatches):
    """Loads [L, E] of all microbatches together, by a forward pass over each."""

    def body(_, microbatch):
        return None, load_of(microbatch)

    return jnp.sum(jax.lax.scan(body, None, microbatches)[1], axis=0, dtype=jnp.int32)


def split(batch: obj.Batch, count: int) -> obj.Batch:
    """[B, ...] -> [count, B / count, ...]: microbatch m takes rows m, m + count, ... so that no row changes its device."""

    def one(x):
        x = jax.lax.reshape(x, (x.shape[0] // count, count, *x.shape[1:]), out_sharding=P(BATCH_AXES, *(None,) * x.ndim))
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(one, batch)


def _metrics(config, sums, totals, router_bias):
    nll = sums.nll / totals.targets
    report = {"train/loss": nll, "train/perplexity": jnp.exp(nll), "train/targets": totals.targets}
    if config.logit_z_loss_weight:
        report["train/logit_z_loss"] = sums.logit_z / totals.targets
    if sums.aux is None:
        return report
    stats, routing_sums = sums.aux.stats, sums.aux.sums
    dropped_L = stats.dropped_capacity + stats.dropped_sender + stats.dropped_receiver
    routed_L = jnp.maximum(jnp.sum(stats.load_E, axis=-1), 1)
    report |= {
        "router/balance_loss": jnp.mean(sums.balance_L),
        "router/z_loss": jnp.mean(routing_sums.z_sum) / totals.tokens,
        "router/load": stats.load_E,
        "router/max_violation": metrics.max_violation(stats.load_E),
        "router/dead_experts": metrics.dead_experts(stats.load_E),
        "router/entropy": metrics.mean_entropy(routing_sums.entropy_sum, totals.tokens, config.moe.num_experts),
        "router/dropped_fraction": dropped_L / routed_L,
        "router/dropped_capacity": stats.dropped_capacity,
        "router/dropped_sender": stats.dropped_sender,
        "router/dropped_receiver": stats.dropped_receiver,
        "router/padding": stats.padding,
        "exchange/bytes": stats.bytes_sent,
        "exchange/exact": (stats.exact > 0).astype(jnp.int32),
    }
    biases = jax.tree.leaves(router_bias)
    return report | ({"router/bias": biases[0]} if biases else {})
