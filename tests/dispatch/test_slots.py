"""The rows' way in and out: sums in float32, and gathers both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.slots import combine_rows, fill_rows, sort_slots
from moe_jax.routing.contract import Routing

T, K, E, D = 7, 3, 4, 5


def routing_of(choices):
    expert_A = jnp.asarray(np.random.default_rng(0).integers(0, E, T * K), jnp.int32)
    token_A = jnp.tile(jnp.arange(T, dtype=jnp.int32), K)
    unused_TE = jnp.zeros((T, E))
    return Routing(token_A, expert_A, jnp.ones(T * K), unused_TE, unused_TE, choices)


@pytest.mark.parametrize("choices", [K, None])
def test_sums_of_bfloat16_rows_are_float32(choices):
    # 1 + 2^-8 + 2^-8 in bfloat16, one addition at a time, is 1; summed in float32 it is 1 + 2^-7.
    routing = routing_of(choices)
    slots, _ = sort_slots(routing.expert_A, E)
    value_A = jnp.repeat(jnp.asarray([1, 2**-8, 2**-8], jnp.float32), T)
    y_AD = jnp.broadcast_to(value_A[slots.source_R][:, None], (T * K, D)).astype(jnp.bfloat16)
    y_TD = combine_rows(y_AD, routing, slots, T)
    assert y_TD.dtype == jnp.float32
    np.testing.assert_array_equal(y_TD, 1 + 2**-7)


def test_gradient_of_filling_is_summed_in_float32():
    routing = routing_of(K)
    slots, _ = sort_slots(routing.expert_A, E)
    value_A = jnp.repeat(jnp.asarray([1, 2**-8, 2**-8], jnp.float32), T)
    g_AD = jnp.broadcast_to(value_A[slots.source_R][:, None], (T * K, D)).astype(jnp.bfloat16)
    _, pullback = jax.vjp(lambda x: fill_rows(x, routing, slots), jnp.zeros((T, D), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(pullback(g_AD)[0], np.float32), 1 + 2**-7)


def test_no_scatter_of_rows_in_either_direction_when_choices_is_known():
    def jaxpr(choices):
        routing = routing_of(choices)
        slots, _ = sort_slots(routing.expert_A, E)

        def loss(x_TD, weight_A):
            return jnp.sum(
                combine_rows(fill_rows(x_TD, routing, slots) ** 2, routing.replace(weight_A=weight_A), slots, T) ** 2
            )

        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((T, D)), jnp.ones(T * K)))

    assert "scatter" not in jaxpr(K)
    assert "scatter" in jaxpr(None)
