"""The bias rule against exact rational arithmetic, with counts that float32 cannot hold."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from moe_jax.config import RouterConfig
from moe_jax.routing import make_router
from moe_jax.routing.bias_update import update_bias
from moe_jax.routing.losses import count_load
from moe_jax.routing.metrics import max_violation

LOADS = {
    "three_by_hand": [5, 1, 0],  # mean 2: down, up, up
    "balanced": [7, 7, 7],
    "above_2_24": [2**24 + 1, 2**24],  # the same number in float32; mean 2^24 + 1/2: down, up
    "mean_not_whole": [2**24, 2**24, 2**24 + 1],  # mean 2^24 + 1/3: up, up, down
    "largest": [2**31 - 1, 2**31 - 1, 2**31 - 2, 2**31 - 1],  # their sum and E times one do not fit int32
    "collapsed": [2**31 - 1, 0, 0, 0],
    "one": [0, 0, 0, 0, 1],
}


def relative_errors(load):
    mean = Fraction(sum(load), len(load))
    return [(mean - n) / mean for n in load]


@pytest.mark.parametrize("name", LOADS)
def test_agrees_with_rational_arithmetic(name):
    load_E, errors = jnp.array(LOADS[name], jnp.int32), relative_errors(LOADS[name])
    sign_E = update_bias(jnp.zeros(len(errors)), load_E, "sign", 1.0)
    np.testing.assert_array_equal(sign_E, [(e > 0) - (e < 0) for e in errors])
    proportional_E = update_bias(jnp.zeros(len(errors)), load_E, "proportional", 1.0)
    assert_close(proportional_E, np.array([float(e) for e in errors]))


def test_speed_and_old_bias():
    bias_E, load_E = jnp.array([0.5, -0.5, 0.0]), jnp.array([5, 1, 0])  # errors -3/2, 1/2, 1 of the mean 2
    assert_close(update_bias(bias_E, load_E, "sign", 0.001), np.array([0.499, -0.499, 0.001]))
    assert_close(update_bias(bias_E, load_E, "proportional", 0.01), np.array([0.485, -0.495, 0.01]))


@pytest.mark.parametrize("rule", ["sign", "proportional", "none"])
def test_layers_are_apart_and_one_without_load_keeps_its_bias(rule):
    rng = np.random.default_rng(0)
    bias_LE = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    load_LE = jnp.asarray(rng.integers(0, 100, size=(3, 4)), jnp.int32).at[1].set(0)
    new_LE = update_bias(bias_LE, load_LE, rule, 0.1)
    assert new_LE.dtype == jnp.float32
    np.testing.assert_array_equal(new_LE[1], bias_LE[1])
    for layer in (0, 2):
        np.testing.assert_array_equal(new_LE[layer], update_bias(bias_LE[layer], load_LE[layer], rule, 0.1))
        assert np.array_equal(new_LE[layer], bias_LE[layer]) == (rule == "none")


def test_repeated_updates_balance_a_skewed_router():
    """The loop it is for: 512 fixed tokens whose affinities favour some; MaxVio falls from over 0.9 to less than 0.1."""
    router = make_router(RouterConfig("deepseek", 2, {"bias_speed": 0.002}), 8)
    rng = np.random.default_rng(0)
    x_TD = jnp.asarray(rng.normal(size=(512, 4)), jnp.float32).at[:, 0].set(1.0)
    w_DE = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)

    def step(bias_E, _):
        load_E = count_load(router(x_TD, w_DE, bias_E, jnp.ones(512, bool)))
        return router.update_bias(bias_E, load_E), load_E

    _, load_NE = jax.jit(lambda bias_E: jax.lax.scan(step, bias_E, length=500))(jnp.zeros(8))
    violation_N = max_violation(load_NE)
    assert violation_N[0] > 0.9
    assert violation_N[-1] < 0.1


@pytest.mark.parametrize("family", ["switch", "mixtral"])
def test_routers_without_a_bias_leave_it(family):
    router = make_router(RouterConfig(family, 1, {"normalize": "before"} if family == "mixtral" else {}), 2)
    assert not router.has_bias
    assert router.update_bias(jnp.zeros((1, 2)), jnp.array([[3, 1]])).tolist() == [[0, 0]]


def test_deepseek_uses_its_own_rule_and_speed():
    bias_LE, load_LE = jnp.zeros((1, 2)), jnp.array([[3, 1]])
    for rule, expected in (("sign", [-0.5, 0.5]), ("proportional", [-0.25, 0.25]), ("none", [0, 0])):
        router = make_router(RouterConfig("deepseek", 2, {"bias_update": rule, "bias_speed": 0.5}), 2)
        assert router.has_bias
        assert router.update_bias(bias_LE, load_LE).tolist() == [expected]


@pytest.mark.parametrize(
    ("bias", "load", "rule", "match"),
    [
        (np.zeros(2, np.float32), np.ones(2, np.float32), "sign", "load_LE has dtype float32"),
        (np.zeros(2, jnp.bfloat16), np.ones(2, np.int32), "sign", "bias_LE has dtype bfloat16"),
        (np.zeros(2, np.float32), np.ones(2, np.int32), "quantile", "rule = 'quantile' is unknown"),
    ],
)
def test_refusals(bias, load, rule, match):
    with pytest.raises(ValueError, match=match):
        update_bias(jnp.asarray(bias), jnp.asarray(load), rule, 0.1)
