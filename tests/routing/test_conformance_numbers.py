"""What every router's numbers must be, run over the table: precise, finite, differentiable, the same on any devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from conformance import cases_where, close, every_case, every_step, floats, route, same, scalar
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from router_cases import B, D, E, T, in_training, problem
from tolerance import assert_close

from moe_jax.exchange.spread import Spread
from moe_jax.mesh import BATCH_AXES
from moe_jax.routing.contract import SoftRouting
from moe_jax.routing.losses import balance_loss, routing_sums
from moe_jax.routing.record import choices_of


@every_step
@every_case
def test_float32_inside_for_bfloat16_tokens(case, step):
    tokens, params, state = problem(case)
    low = tokens.replace(x_TD=tokens.x_TD.astype(jnp.bfloat16))
    routing = route(case, low, params, state, step)
    for array in floats(routing):
        assert array.dtype == jnp.float32
    same(routing, route(case, low.replace(x_TD=low.x_TD.astype(jnp.float32)), params, state, step))


@every_case
def test_loads_are_int32(case):
    routing = route(case, *problem(case))
    sums = routing_sums(routing, problem(case)[0].mask_T, B)
    assert sums.load_E.dtype == jnp.int32
    big = sums.replace(load_E=jnp.full(E, 2**24 + 1, jnp.int32)) + sums
    np.testing.assert_array_equal(big.load_E, 2**24 + 1 + np.asarray(sums.load_E))


@cases_where(lambda case: case.router.params(D))
def test_balance_loss_is_one_when_the_router_prefers_nobody(case):
    tokens, params, state = problem(case)
    routing = route(case, tokens, *jax.tree.map(jnp.zeros_like, (params, state)))
    sums = routing_sums(routing, tokens.mask_T, B)
    load_E = sums.load_E if sums.load_E.any() else np.ones(E, np.int32)  # some choose nobody without a preference
    assert_close(balance_loss(load_E, sums.prob_sum_E, sums.num_tokens), 1.0)


@every_step
@every_case
def test_gradient_is_live_and_finite_at_extreme_logits(case, step):
    def loss(params, x_TD, tokens, state):
        value, routing = scalar(case, step, params, x_TD, tokens, state)
        sums = routing_sums(routing, tokens.mask_T, B)
        return value + case.router.loss(sums, state) * 1e-30, routing

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for scale in (0.8, 30.0, 1e4, 1e30):
        tokens, params, state = problem(case, scale=scale)
        grads, routing = gradient(params, tokens.x_TD, tokens, state)
        for array in jax.tree.leaves((grads, floats(routing))):
            assert np.all(np.isfinite(array)), scale
        assert_close(routing.probs_TE.sum(-1), np.ones(T))
        if scale < 1:
            live = [np.abs(grad).max() > 1e-3 for grad in grads.values()]
            assert all(live) if step == "training" else any(live) or not live


@every_step
@cases_where(lambda case: case.router.params(D))
def test_products_ask_for_full_precision_forward_and_backward(case, step):
    """A CPU multiplies float32 as float32 whatever is asked; TPUs and GPUs do so only when asked."""
    tokens, params, state = problem(case)
    gradient = jax.grad(lambda *args: scalar(case, step, *args, tokens, state)[0], (0, 1))
    jaxpr = jax.make_jaxpr(gradient)(params, tokens.x_TD)
    products = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) >= 3  # logits, and the gradients of w and x
    assert all(eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for eqn in products)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@every_step
@every_case
def test_eight_devices_agree_with_one_and_with_remat(case, step):
    tokens, params, state = problem(case)
    mesh, router = mesh_of(data=2, fsdp=2, expert=2), case.router

    def outputs(params, tokens, axes):
        tokens = in_training(tokens, router) if step == "training" else tokens
        tokens = tokens.replace(num_sequences=B // (8 if axes else 1), **({"batch": Spread(axes)} if axes else {}))
        routing = router(tokens, params, state)
        sums = routing_sums(routing, tokens.mask_T, tokens.num_sequences)
        sums = jax.lax.psum(sums, axes) if axes else sums
        if isinstance(routing, SoftRouting):
            expert_TM, weight_TM = (x.reshape(-1, x.shape[-1]) for x in (routing.dispatch_BSP, routing.combine_BSP))
        else:
            expert_TM, weight_TM = choices_of(routing)
        rank_M = 1 + jnp.arange(weight_TM.shape[1])  # else weights that sum to 1 would have no gradient
        value = jnp.sum(weight_TM * jnp.cos(tokens.token_id_T)[:, None] * rank_M)
        return (jax.lax.psum(value, axes) if axes else value) + router.loss(sums, state), (expert_TM, weight_TM, sums)

    def gradient(axes):
        return jax.jit(jax.value_and_grad(functools.partial(function(axes)), has_aux=True))

    def function(axes):
        if not axes:
            return functools.partial(outputs, axes=())
        rows = P(axes)
        island = jax.shard_map(functools.partial(outputs, axes=axes), in_specs=(P(), rows), out_specs=(P(), (rows, rows, P())))
        return jax.checkpoint(island)

    (value, parts), grads = gradient(())(params, tokens)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(BATCH_AXES))
        (sharded_value, sharded_parts), sharded_grads = gradient(BATCH_AXES)(
            jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(tokens, rows)
        )
    assert_close(sharded_value, value)
    jax.tree.map(close, jax.device_get(sharded_parts), jax.device_get(parts))
    jax.tree.map(functools.partial(assert_close, what="gradient"), jax.device_get(sharded_grads), jax.device_get(grads))
