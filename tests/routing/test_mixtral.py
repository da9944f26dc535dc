"""The bias of the logits (gpt-oss), by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from tolerance import assert_close

from moe_jax.config import RouterConfig
from moe_jax.routing import make_router
from moe_jax.routing.contract import Tokens

T, D, E, K = 9, 5, 6, 2


def test_the_bias_is_part_of_the_choice_and_of_the_weights():
    rng = np.random.default_rng(0)
    x_TD, w_DE, b_E, g_TK = rng.normal(size=(T, D)), rng.normal(size=(D, E)), rng.normal(size=E), rng.normal(size=(T, K))
    router = make_router(RouterConfig("mixtral", K, {"bias": True}), E)
    assert {name: spec.shape for name, spec in router.params(D).items()} == {"w_router_DE": (D, E), "b_router_E": (E,)}
    assert router.params(D)["b_router_E"].value == 0.0
    assert "b_router_E" not in make_router(RouterConfig("mixtral", K), E).params(D)
    tokens = Tokens(jnp.asarray(x_TD, jnp.float32), jnp.ones(T, bool))

    def route(b_E):
        routing = router(tokens, {"w_router_DE": jnp.asarray(w_DE, jnp.float32), "b_router_E": b_E}, {})
        return jnp.sum(routing.weight_A.reshape(K, T).T * g_TK), routing

    (_, routing), grad_E = jax.value_and_grad(route, has_aux=True)(jnp.asarray(b_E, jnp.float32))
    logits_TE = x_TD @ w_DE + b_E
    expert_TK = np.argsort(-logits_TE, axis=1)[:, :K]
    assert np.any(expert_TK != np.argsort(-(logits_TE - b_E), axis=1)[:, :K])
    power_TK = np.exp(np.take_along_axis(logits_TE, expert_TK, axis=1))
    weight_TK = power_TK / power_TK.sum(1, keepdims=True)
    np.testing.assert_array_equal(routing.expert_A.reshape(K, T).T, expert_TK)
    assert_close(routing.weight_A.reshape(K, T).T, weight_TK)
    assert_close(routing.logits_TE, logits_TE)
    expected_E = np.zeros(E)
    np.add.at(expected_E, expert_TK, weight_TK * (g_TK - np.sum(weight_TK * g_TK, axis=1, keepdims=True)))
    assert_close(grad_E, expected_E)
