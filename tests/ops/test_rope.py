from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from moe_jax.config import RopeConfig
from moe_jax.ops.rope import amplitude, apply_rope, frequencies

THETA = 100.0
ROPE = RopeConfig(theta=THETA)
POSITIONS_BS = np.array([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
# of a head of 8: (rope, first width that rotates)
LAYOUTS = {
    "all": (ROPE, 0),
    "partial": (replace(ROPE, dim=4), 0),
    "interleaved": (replace(ROPE, interleaved=True), 0),
    "partial, interleaved": (replace(ROPE, dim=6, interleaved=True), 0),
    "the last": (ROPE, 2),
    "in the middle": (replace(ROPE, dim=4), 2),
    "the last, interleaved": (replace(ROPE, interleaved=True), 2),
    "yarn": (replace(ROPE, dim=6, scaling="yarn", factor=4.0, original_length=32), 0),
}
YARN = RopeConfig(theta=10000.0, scaling="yarn", factor=8.0, original_length=1024, beta_fast=32.0, beta_slow=1.0)


def _x(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (2, 5, 3, 8), dtype)


def _complex_rotation(x, positions, rope, first, back=False):
    width = rope.dim or x.shape[-1] - first
    x, part = np.asarray(x, np.float64).copy(), np.asarray(x, np.float64)[..., first : first + width]
    slices = (slice(0, None, 2), slice(1, None, 2)) if rope.interleaved else (slice(width // 2), slice(width // 2, None))
    angle = positions[:, :, None, None] * np.asarray(frequencies(rope, width), np.float64)
    turned = (part[..., slices[0]] + 1j * part[..., slices[1]]) * amplitude(rope) * np.exp((-1j if back else 1j) * angle)
    joined = np.empty_like(part)
    joined[..., slices[0]], joined[..., slices[1]] = turned.real, turned.imag
    x[..., first : first + width] = joined
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_complex_rotation_with_gradient(layout):
    rope, first = LAYOUTS[layout]
    x_BSHN, g_BSHN = _x(), jnp.cos(_x())
    actual, pullback = jax.vjp(lambda x: apply_rope(x, jnp.asarray(POSITIONS_BS), rope, first), x_BSHN)
    assert_close(actual, _complex_rotation(x_BSHN, POSITIONS_BS, rope, first))
    assert_close(*pullback(g_BSHN), _complex_rotation(g_BSHN, POSITIONS_BS, rope, first, back=True))
    width = rope.dim or 8 - first
    passing = [i for i in range(8) if not first <= i < first + width]
    np.testing.assert_array_equal(actual[..., passing], x_BSHN[..., passing])


def test_far_out():
    x_BSHN = _x()
    positions_BS = POSITIONS_BS + 700
    expected = _complex_rotation(x_BSHN, positions_BS, ROPE, 0)
    # an angle of 700 radians is good to 6e-5 in float32
    np.testing.assert_allclose(apply_rope(x_BSHN, jnp.asarray(positions_BS), ROPE), expected, atol=2e-4)


def test_dot_products_depend_on_distance_only():
    q, k = _x()[:, :1], _x()[:, 1:2]

    def dot(i, j):
        rotated = (apply_rope(a, jnp.full((2, 1), p), ROPE) for a, p in ((q, i), (k, j)))
        return jnp.einsum("BSHN,BSHN->BH", *rotated)

    assert_close(dot(9, 4), dot(5, 0))
    assert np.max(np.abs(dot(9, 4) - dot(9, 5))) > 0.1


def test_bfloat16_in_and_out_with_float32_inside():
    x_BSHN = _x(jnp.bfloat16)
    positions_BS = jnp.full((2, 5), 1001)  # not a bfloat16: 1001 would be 1000
    actual = apply_rope(x_BSHN, positions_BS, ROPE)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, apply_rope(x_BSHN.astype(jnp.float32), positions_BS, ROPE))


def test_linear_stretches_every_pair():
    plain = 10000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(frequencies(RopeConfig(), 16), plain, rtol=1e-6)
    np.testing.assert_allclose(frequencies(RopeConfig(scaling="linear", factor=4.0), 16), plain / 4, rtol=1e-6)


def test_wavelength_stretches_long_waves_and_half_of_the_one_half_way():
    # waves of 2 pi theta^(i/4) tokens; of an original context that holds 2.5 of the second: half way between 1 and 4
    rope = RopeConfig(theta=10000.0, scaling="wavelength", factor=8.0, original_length=157)
    share = frequencies(rope, 8) / frequencies(RopeConfig(), 8)
    np.testing.assert_allclose(share, [1, 0.5 + 0.5 / 8, 1 / 8, 1 / 8], rtol=1e-3)


@pytest.mark.parametrize(
    ("truncate", "middle"),
    # Pair i of 16 turns 1024 theta^(-i/16) / (2 pi) times: 32 times at i = 2.828, once at i = 8.848, rounded to 2 and 9.
    [
        (False, [0, 0, 0, 0.0286, 0.1947, 0.3608, 0.5269, 0.6930, 0.8591, 1]),
        (True, [0, 0, 0, 1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1]),
    ],
)
def test_yarn_stretches_the_pairs_that_turn_seldom(truncate, middle):
    share = frequencies(replace(YARN, truncate=truncate), 32) / frequencies(RopeConfig(), 32)
    stretched = (1 - share) / (1 - 1 / 8)
    np.testing.assert_allclose(stretched, middle + [1] * 6, atol=1e-4)


def test_amplitude_is_yarns_alone():
    assert amplitude(YARN) == pytest.approx(0.1 * np.log(8) + 1)
    assert amplitude(replace(YARN, amplitude=1.25)) == 1.25
    assert amplitude(replace(YARN, factor=0.5)) == 1.0
    assert amplitude(replace(YARN, scaling="linear", amplitude=1.25)) == 1.0
