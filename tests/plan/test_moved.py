"""Bytes of small functions, by hand: arrays of 4,096 bytes, N of them a pass."""

import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax.plan import moved
from moe_jax.plan.program import Step
from tests import tiny

N = 4 * 32 * 32


def moves(function, arguments):
    """Bytes of all that moves in `function` of so many arrays [32, 32], in arrays."""
    arrays = [jax.ShapeDtypeStruct((32, 32), jnp.float32)] * arguments
    mesh = types.SimpleNamespace(shape={})
    step = Step(tiny.config(), mesh, None, {}, jax.jit(function).trace(*arrays))
    return sum(move.bytes for move in moved.moves(step)) / N


def moment(param, mean, gradient):
    mean = 0.9 * mean + gradient
    return param - 0.1 * jnp.sqrt(jnp.square(mean) + 1), mean


def looped(x):
    return jax.lax.scan(lambda carry, _: (jnp.sin(carry) + 1, None), x, length=5)[0]


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (moment, 3, 3 + 2),  # one pass for both results
        (lambda x, y: jnp.tanh(x + y) * 2, 2, 2 + 1),
        (lambda x, w: jnp.tanh(x) @ w, 2, 1 + 1),  # what the product reads has to be written; the product counts its own
        (lambda x, w: jnp.tanh(x @ w), 2, 1 + 1),
        (lambda x, y: jnp.sum(x * y), 2, 2 + 1 / 1024),
        (lambda x: x.reshape(1024)[None], 1, 0),  # the same bytes
        (lambda x: x.T.reshape(1024), 1, 1 + 1),
        (lambda x: jax.lax.dynamic_slice(x, (4, 4), (8, 32)), 1, 2 / 4),
        (lambda x: jax.lax.dynamic_update_slice(x, jnp.zeros((8, 32)), (0, 0)), 1, (3 + 1) / 4),  # the zeros are written first
        (jax.lax.cumsum, 1, 1 + 1),
        (looped, 1, 5 * (1 + 1)),
        (jax.checkpoint(lambda x: jnp.sin(jax.jit(jnp.cos)(x))), 1, 1 + 1),  # calls do not part a pass
        (lambda x: (jnp.sin(x), jnp.cumsum(x.at[0].set(0.0)))[0], 1, 1 + 1),  # what nobody needs does not run
    ],
)
def test_passes(function, arguments, expected):
    assert moves(function, arguments) == pytest.approx(expected)
