"""ReMoE: ReLU weights by hand, the adaptive penalty in NumPy, and training that reaches its sparsity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tolerance import assert_close

from moe_jax.config import ConfigError, OptimizerConfig, RouterConfig
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.routing import make_router
from moe_jax.routing.contract import Tokens
from moe_jax.routing.losses import routing_sums
from moe_jax.routing.remoe import ReMoE
from moe_jax.train.state import create
from moe_jax.train.step import make_train_step

X_TD = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
W_DE = np.array([[0.5, -1.0, 2.0], [-0.25, 3.0, 1.0]])
# x W: token 0 runs experts 2, 0; token 1 experts 1, 2; token 2 expert 1; token 3 all, 2 first; token 4 (all zero) none
LOGITS_TE = np.array([[0.5, -1.0, 2.0], [-0.25, 3.0, 1.0], [-0.5, 1.0, -2.0], [0.25, 2.0, 3.0], [0.0, 0.0, 0.0]])
STATE = {"l1_coefficient_1": jnp.full(1, 0.5, jnp.float32)}


def route(router, w_DE=W_DE, valid=5, x_TD=X_TD, **more):
    tokens = Tokens(jnp.asarray(x_TD, jnp.float32), jnp.arange(len(x_TD)) < valid, **more)
    return router(tokens, {"w_router_DE": jnp.asarray(w_DE, jnp.float32)}, STATE)


def table(routing):
    return (np.asarray(array_A).reshape(routing.choices, -1).T for array_A in (routing.expert_A, routing.weight_A))


def test_the_worked_example():
    experts, weights = table(route(ReMoE(3, 1)))
    np.testing.assert_array_equal(experts, [[2, 0, 3], [1, 2, 3], [1, 3, 3], [2, 1, 0], [3, 3, 3]])
    np.testing.assert_allclose(weights, [[2.0, 0.5, 0], [3.0, 1.0, 0], [1.0, 0, 0], [3.0, 2.0, 0.25], [0, 0, 0]], rtol=1e-6)


def test_fewer_choices_keep_the_largest():
    experts, weights = table(route(ReMoE(3, 1, max_choices=2)))
    np.testing.assert_array_equal(experts, [[2, 0], [1, 2], [1, 3], [2, 1], [3, 3]])
    np.testing.assert_allclose(weights[3], [3.0, 2.0], rtol=1e-6)
    sums = route(ReMoE(3, 1, max_choices=2)).sums
    np.testing.assert_array_equal(sums["active_E"], [2, 3, 3])  # the penalty and the sparsity see those left out, too


def test_an_expert_that_does_not_run_has_no_gradient():
    """d weight_te / d W_de = x_td where x W > 0, and 0 where it is not: at 0 too."""
    u_TE = np.random.default_rng(0).normal(size=(5, 3))

    def loss(w_DE):
        routing = route(ReMoE(3, 1), w_DE)
        coefficient_TE = jnp.pad(jnp.asarray(u_TE, jnp.float32), ((0, 0), (0, 1)))
        return jnp.sum(coefficient_TE[routing.token_A, routing.expert_A] * routing.weight_A)

    assert_close(jax.grad(loss)(jnp.asarray(W_DE, jnp.float32)), X_TD.T @ (u_TE * (LOGITS_TE > 0)))


@pytest.mark.parametrize("load_balanced", [True, False])
def test_the_penalty_by_hand(load_balanced):
    """Four valid tokens, k = 1. Tokens run experts 0, 1, 2 at 2, 3 and 3 of them: f = 3 / 4 * (2, 3, 3); ReLU sums 0.75, 6, 6."""
    router = ReMoE(3, 1, load_balanced=load_balanced)
    f_E = np.array([1.5, 2.25, 2.25]) if load_balanced else np.ones(3)

    def loss(w_DE):
        routing = route(router, w_DE, valid=4)
        return router.loss(routing_sums(routing, jnp.arange(5) < 4, 1), STATE)

    value, grad = jax.value_and_grad(loss)(jnp.asarray(W_DE, jnp.float32))
    assert_close(value, 0.5 * f_E @ np.array([0.75, 6.0, 6.0]) / 4)
    assert_close(grad, 0.5 * X_TD[:4].T @ (f_E * (LOGITS_TE[:4] > 0)) / 4)  # f takes no gradient


def test_padding_and_no_tokens_at_all():
    padded = route(ReMoE(3, 1), valid=2)
    np.testing.assert_array_equal(padded.sums["active_E"], [1, 1, 2])
    assert_close(padded.sums["gate_sum_E"], np.array([0.5, 3.0, 3.0]))
    nothing = routing_sums(route(ReMoE(3, 1), valid=0), jnp.zeros(5, bool), 1)
    assert float(ReMoE(3, 1).loss(nothing, STATE)) == 0
    assert ReMoE(3, 1).update(STATE, nothing)["l1_coefficient_1"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("active_LE", "factor"),
    [
        ([[2, 3, 3], [2, 2, 1]], 1.2),
        ([[1, 1, 0], [1, 2, 2]], 1 / 1.2),
        ([[4, 0, 0], [1, 2, 1]], 1.0),
        ([[4, 4, 0], [1, 0, 0]], 1.2),
    ],
)
def test_lambda_follows_the_sparsity_of_all_layers(active_LE, factor):
    """Four tokens, E = 3, k = 1: the target is 8 cells of the 24 of two layers; here 13, 7, 8 and 9 are active."""
    router, sums = ReMoE(3, 1), routing_sums(route(ReMoE(3, 1), valid=4), jnp.arange(5) < 4, 1)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), sums).replace(own={"active_E": jnp.asarray(active_LE, jnp.int32)})
    over = (1 - 1 / 3) - (1 - np.sum(active_LE) / 24)  # the target sparsity less the sparsity there is
    assert factor == pytest.approx(1.2 ** np.sign(np.round(over, 9)))
    moved = router.update({"l1_coefficient_1": jnp.full((2, 1), 0.01, jnp.float32)}, stacked)["l1_coefficient_1"]
    assert moved.dtype == jnp.float32
    assert_close(moved, np.full((2, 1), 0.01 * factor))


def test_lambda_never_sticks_at_zero():
    sums = routing_sums(route(ReMoE(3, 1), x_TD=np.zeros((5, 2))), jnp.ones(5, bool), 1)  # nobody runs
    state = {"l1_coefficient_1": jnp.full(1, 1.2e-38, jnp.float32)}
    for _ in range(30):
        state = ReMoE(3, 1).update(state, sums)
    assert state["l1_coefficient_1"][0] > 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_choices": 1}, "max_choices = 1"),
        ({"max_choices": 4}, "max_choices = 4"),
        ({"max_choices": -1}, "max_choices = -1"),
        ({"l1_start": 0.0}, "l1_start"),
        ({"l1_multiplier": 0.9}, "l1_multiplier"),
    ],
)
def test_refusals(options, name):
    with pytest.raises(ConfigError, match=f"model.moe.router.remoe.{name}"):
        make_router(RouterConfig("remoe", 2, options), 3)
    make_router(RouterConfig("remoe", 2, {"max_choices": 2}), 3)


@pytest.mark.slow
def test_training_reaches_the_target_sparsity():
    """From half of 8 experts a token (normal W) to about 2, in two layers with one lambda; and the first step moves it by its factor."""
    router = RouterConfig("remoe", 2, {"l1_start": 1e-3, "l1_multiplier": 1.3})
    config = tiny.config("mixtral", "data 2 expert 4", accumulation=2, balance_loss_weight=0.0, z_loss_weight=0.0)
    model = dataclasses.replace(config.model, moe=dataclasses.replace(config.model.moe, router=router))
    optimizer = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_steps=0, weight_decay=0.0)
    config = dataclasses.replace(config, model=model, optimizer=optimizer)
    mesh = make_mesh(config, jax.devices())
    with jax.set_mesh(mesh):
        graphdef, transformation, state = create(config)
        step, batch = make_train_step(config, graphdef, transformation), shard_batch(mesh, tiny.batch())
        runs, coefficients = [], []
        for _ in range(60):
            state, metrics = step(state, batch, jax.random.key(0))
            runs.append(float(jnp.mean(metrics["router/experts_per_token"])))
            coefficients.append(np.asarray(metrics["router/l1_coefficient"]))
        assert step._cache_size() == 1
    assert 3 < runs[0] < 5
    assert_close(coefficients[0], np.full((2, 1), 1.3e-3))
    assert 1.5 < np.mean(runs[-10:]) < 2.5
