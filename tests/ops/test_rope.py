import jax
import jax.numpy as jnp
import numpy as np
from tolerance import assert_close

from moe_jax.ops.rope import apply_rope

THETA = 100.0


def _x(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (2, 5, 3, 8), dtype)


def test_against_complex_rotation():
    x_BSHN = _x()
    positions_BS = np.array([[0, 1, 2, 0, 1], [3, 4, 5, 6, 700]])
    pairs = np.asarray(x_BSHN[..., :4], np.float64) + 1j * np.asarray(x_BSHN[..., 4:], np.float64)
    angle = positions_BS[:, :, None, None] * np.array([THETA ** (-2 * i / 8) for i in range(4)])
    turned = pairs * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], -1)
    actual = apply_rope(x_BSHN, jnp.asarray(positions_BS), THETA)
    np.testing.assert_allclose(actual, expected, atol=2e-4)  # an angle of 700 radians is good to 6e-5 in float32
    assert_close(actual[:, :4], expected[:, :4])


def test_dot_products_depend_on_distance_only():
    q, k = _x()[:, :1], _x()[:, 1:2]

    def dot(i, j):
        rotated = (apply_rope(a, jnp.full((2, 1), p), THETA) for a, p in ((q, i), (k, j)))
        return jnp.einsum("BSHN,BSHN->BH", *rotated)

    assert_close(dot(9, 4), dot(5, 0))
    assert np.max(np.abs(dot(9, 4) - dot(9, 5))) > 0.1


def test_bfloat16_in_and_out_with_float32_inside():
    x_BSHN = _x(jnp.bfloat16)
    positions_BS = jnp.full((2, 5), 1001)  # not a bfloat16: 1001 would be 1000
    actual = apply_rope(x_BSHN, positions_BS, THETA)
    assert actual.dtype == jnp.bfloat16
    assert_close(actual, apply_rope(x_BSHN.astype(jnp.float32), positions_BS, THETA))
