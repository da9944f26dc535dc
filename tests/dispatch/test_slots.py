"""The rows' way in and out: sums in float32, and gathers both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.slots import combine_rows, fill_rows, sort_slots, sum_rows
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


@pytest.mark.parametrize("num_rows", [None, 25])
@pytest.mark.parametrize("ties", [False, True])
def test_sorted_rows_of_a_list(num_rows, ties):
    """By group, then by the keys, the first array first, then by place in the list; then empty rows."""
    rng = np.random.default_rng(1)
    group_A = rng.integers(0, E + 1, 30)
    group_A[:5] = E  # nowhere
    keys = (rng.choice([0.5, 0.25], 30), rng.integers(0, 3, 30)) if ties else ()
    wanted = [a for a in range(30) if group_A[a] < E]
    assert len(wanted) <= 25
    order = sorted(wanted, key=lambda a: (group_A[a], *(key_A[a] for key_A in keys), a))
    slots, size_E = sort_slots(jnp.asarray(group_A), E, num_rows, tuple(map(jnp.asarray, keys)))
    rows = num_rows or 30
    np.testing.assert_array_equal(slots.source_R, order + [30] * (rows - len(order)))
    np.testing.assert_array_equal(slots.slot_A, [order.index(a) if a in wanted else rows for a in range(30)])
    np.testing.assert_array_equal(size_E, np.bincount(group_A, minlength=E + 1)[:E])
    assert int(slots.dropped) == 0


def test_sums_of_rows_and_their_gradient():
    """A token's rows without weights: the sum over those of its assignments that have one, in float32."""
    routing = routing_of(K)
    nowhere_A = np.random.default_rng(2).random(T * K) < 0.4
    slots, _ = sort_slots(jnp.where(nowhere_A, E, routing.expert_A), E)
    rng = np.random.default_rng(3)
    rows_RD, g_TD = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((T * K, D), (T, D)))
    y_TD, pullback = jax.vjp(lambda rows_RD: sum_rows(rows_RD, K, slots), rows_RD)
    want_TD, want_g_RD = np.zeros((T, D)), np.zeros((T * K, D))
    for row, source in enumerate(slots.source_R.tolist()):
        if source < T * K:
            want_TD[source % T] += rows_RD[row]
            want_g_RD[row] = g_TD[source % T]
    np.testing.assert_allclose(y_TD, want_TD, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pullback(g_TD)[0], want_g_RD.astype(np.float32))
    exact = sum_rows(
        jnp.broadcast_to(jnp.asarray([1, 2**-8, 2**-8], jnp.bfloat16)[slots.source_R % K][:, None], (T * K, D)), K, slots
    )
    assert exact.dtype == jnp.float32
