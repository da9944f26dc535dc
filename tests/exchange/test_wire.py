"""What a row loses on the wire, format by format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.exchange.wire import SCALED, Wire, decode, encode, row_bytes


def rows(dtype=jnp.float32):
    """Rows of every size that a float32 has, one that is zero, one with a single element, and an outlier among small ones."""
    rng = np.random.default_rng(0)
    x_RD = rng.normal(size=(200, 16)) * 10.0 ** rng.uniform(-30, 30, (200, 1))
    x_RD[0] = 0
    x_RD[1] = [0] * 15 + [-3]
    x_RD[2, 1:] *= 1e-4
    return jnp.asarray(x_RD, dtype)


def over_the_wire(x_RD, wire):
    return jax.jit(lambda x_RD: decode(*encode(x_RD, wire), x_RD.dtype))(x_RD)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wire", SCALED)
def test_error_of_an_element(wire, dtype):
    """int8: half a step of largest / 127. float8_e4m3fn: 2^-4 of itself, and half of 2^-9 steps of scale where it is subnormal."""
    x_RD = rows(dtype)
    y_RD = over_the_wire(x_RD, wire)
    assert y_RD.dtype == dtype
    x_RD, y_RD = (np.asarray(array, np.float64) for array in (x_RD, y_RD))
    largest_R1 = np.abs(x_RD).max(1, keepdims=True)
    bound_RD = largest_R1 / 254 if wire == "int8" else np.maximum(np.abs(x_RD) / 16, largest_R1 / 448 * 2**-10)
    rounding = {"float32": 2**-22, "bfloat16": 2**-8}[dtype]  # of the scale and of what comes back
    assert np.all(np.abs(y_RD - x_RD) <= bound_RD + rounding * np.abs(x_RD))
    assert np.max(np.abs(y_RD - x_RD)[3:] / largest_R1[3:]) > 1e-3  # it does round
    np.testing.assert_array_equal(y_RD[0], 0)
    np.testing.assert_allclose(y_RD[1], x_RD[1], rtol=1e-6)  # the largest survives


@pytest.mark.parametrize("wire", SCALED)
def test_a_row_has_a_scale_of_its_own(wire):
    x_RD = rows()
    payload_RD, scale_R1 = encode(x_RD, wire)
    assert (payload_RD.dtype, payload_RD.shape) == (jnp.dtype(wire), x_RD.shape)
    assert (scale_R1.dtype, scale_R1.shape) == (jnp.float32, (x_RD.shape[0], 1))
    assert payload_RD.dtype.itemsize == 1
    largest = np.abs(np.asarray(payload_RD, np.float32)).max(1)
    np.testing.assert_array_equal(largest[1:], SCALED[wire])  # all of the format's range
    alone_RD = over_the_wire(x_RD[5:6], wire)
    np.testing.assert_array_equal(alone_RD, over_the_wire(x_RD, wire)[5:6])


@pytest.mark.parametrize("wire", SCALED)
def test_a_second_crossing_costs_nothing(wire):
    """Two levels round once: what has come off a wire goes through the next one, up to the rounding of the scale."""
    once_RD = over_the_wire(rows(), wire)
    np.testing.assert_allclose(over_the_wire(once_RD, wire), once_RD, rtol=1e-6)


@pytest.mark.parametrize("wire", SCALED)
def test_numbers_too_small_or_not_finite(wire):
    """A row near the smallest float32 gives no NaN; a row with one keeps it."""
    tiny_RD = jnp.asarray([[1e-37, -3e-37], [1e-38, 0.0], [1e-45, 1e-44]], jnp.float32)
    y_RD = over_the_wire(tiny_RD, wire)
    assert np.all(np.isfinite(y_RD))
    assert np.all(np.abs(y_RD - tiny_RD) <= 2e-37 / 16 + jnp.finfo(jnp.float32).tiny)
    for bad in (np.nan, np.inf):
        y_RD = over_the_wire(jnp.asarray([[bad, 1.0, 2.0], [1.0, 2.0, 3.0]]), wire)
        assert not np.all(np.isfinite(y_RD[0]))
        assert np.all(np.isfinite(y_RD[1]))


def test_bfloat16_has_no_scale_and_loses_what_the_cast_loses():
    x_RD = rows()
    payload_RD, scale_R1 = encode(x_RD, "bfloat16")
    assert (payload_RD.dtype, scale_R1.shape) == (jnp.bfloat16, (200, 0))
    np.testing.assert_array_equal(decode(payload_RD, scale_R1, jnp.float32), x_RD.astype(jnp.bfloat16).astype(jnp.float32))
    narrow_RD = rows(jnp.bfloat16)
    for wire in ("bfloat16", "float32"):
        np.testing.assert_array_equal(over_the_wire(narrow_RD, wire), narrow_RD)
    np.testing.assert_array_equal(over_the_wire(x_RD, "float32"), x_RD)


def test_compute_is_the_dtype_of_the_activations():
    moe = MoEConfig(dispatch_wire="int8", combine_wire="compute")
    assert Wire.of(moe, jnp.bfloat16) == ("int8", "bfloat16")
    assert Wire.of(MoEConfig(), jnp.float32) == ("float32", "float32")
    assert Wire.of(moe, jnp.float32).is_scaled
    assert not Wire.of(MoEConfig(dispatch_wire="bfloat16"), jnp.float32).is_scaled


def test_bytes_of_a_row():
    """Out: the token and its words, four bytes each, a scale being one more; home: the answer."""
    assert row_bytes(Wire("float32", "float32"), 128, 5) == 128 * 4 + 5 * 4 + 128 * 4
    assert row_bytes(Wire("int8", "bfloat16"), 128, 5) == 128 + 5 * 4 + 4 + 128 * 2
    assert row_bytes(Wire("bfloat16", "float32"), 128, 0) == 128 * 2 + 128 * 4
