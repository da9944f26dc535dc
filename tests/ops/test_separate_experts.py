"""Experts run one at a time, against every expert on every row in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from moe_jax.ops.separate_experts import block_rows, grouped_rows, touched_sum

D, E = 6, 5
W_EDD = np.random.default_rng(0).normal(size=(E, D, D)).astype(np.float32)
NETWORKS = [lambda x_RD, w_DD=w_DD: jnp.tanh(x_RD @ w_DD) for w_DD in W_EDD]


def rows(count):
    return np.random.default_rng(1).normal(size=(count, D)).astype(np.float32)


@pytest.mark.parametrize("chosen", [[], [3], [0, 4, 2], list(range(E))])
def test_touched_sum(chosen):
    x_TD, weight_TE = rows(4), np.zeros((4, E), np.float32)
    for t, e in enumerate(chosen):
        weight_TE[t % 4, e] = 0.5 + t
    answers_ETD = np.tanh(np.einsum("TD,EDF->ETF", x_TD, W_EDD))
    y_TD = jax.jit(lambda *a: touched_sum(*a, NETWORKS, frozenset()))(x_TD, weight_TE)
    assert_close(y_TD, np.einsum("TE,ETD->TD", weight_TE, answers_ETD))


def test_untouched_experts_are_not_read():
    """An expert that nobody chose may be anything, and so may its weights' bytes."""
    poison = [NETWORKS[0], *[lambda x_RD: x_RD * jnp.nan] * (E - 1)]
    weight_TE = np.zeros((4, E), np.float32)
    weight_TE[1, 0] = 1
    assert np.isfinite(np.asarray(touched_sum(rows(4), weight_TE, poison, frozenset()))).all()


@pytest.mark.parametrize("sizes", [(0, 0, 0, 0, 0), (3, 0, 20, 1, 9), (40, 0, 0, 0, 0), (8, 8, 8, 8, 8), (17, 16, 0, 0, 7)])
def test_grouped_rows(sizes):
    x_AD, expert_A = rows(40), np.repeat(np.arange(E), sizes)
    expected_AD = np.zeros_like(x_AD)
    for row, e in enumerate(expert_A):
        expected_AD[row] = np.tanh(x_AD[row] @ W_EDD[e])
    y_AD = jax.jit(lambda *a: grouped_rows(*a, NETWORKS, frozenset()))(x_AD, np.array(sizes, np.int32))
    assert_close(y_AD, expected_AD)


def test_blocks_are_half_a_group():
    assert [block_rows(*a) for a in ((8, 4), (1024, 8), (100_000, 8), (100, 2), (3, 8))] == [8, 64, 256, 16, 3]
