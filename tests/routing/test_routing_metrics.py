"""MaxVio, its noise floor, dead experts, entropy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from moe_jax.routing.metrics import dead_experts, max_violation, mean_entropy, noise_floor


def test_max_violation_by_hand():
    # Loads 6, 2, 1: mean 3, the fullest has twice that. Balance is 0, collapse onto one of E is E - 1, nothing routed is 0.
    load_LE = jnp.array([[6, 2, 1], [4, 4, 4], [9, 0, 0], [0, 0, 0]])
    assert_close(max_violation(load_LE), np.array([1.0, 0.0, 2.0, 0.0]))
    assert dead_experts(load_LE).tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize(("num_experts", "per_expert"), [(64, 512), (8, 1024), (16, 256)])
def test_noise_floor_is_about_the_max_violation_of_fair_dice(num_experts, per_expert):
    """Leading order in E: the mean over 200 fair routers stands a little below it."""
    rng = np.random.default_rng(0)
    load_NE = rng.multinomial(num_experts * per_expert, np.full(num_experts, 1 / num_experts), size=200)
    ratio = float(max_violation(jnp.asarray(load_NE)).mean()) / noise_floor(num_experts, per_expert)
    assert 0.6 < ratio < 1.0


def test_mean_entropy_is_a_fraction_of_ln_e():
    assert_close(mean_entropy(jnp.float32(5 * math.log(8)), jnp.int32(5), 8), 1.0)
    assert_close(mean_entropy(jnp.float32(5 * math.log(2)), jnp.int32(5), 8), 1 / 3)
    assert mean_entropy(jnp.float32(0), jnp.int32(0), 8) == 0
    assert mean_entropy(jnp.float32(0), jnp.int32(5), 1) == 1
