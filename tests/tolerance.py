"""The one place that says how close is equal."""

import jax.numpy as jnp
import numpy as np

RELATIVE_TO_RMS = {"float32": 1e-5, "bfloat16": 2e-2}

# What rounding on the wire may cost, RMS of the error over RMS of what is right, where the experts are smooth and tokens' errors
# independent. An element moves, in bfloat16, by 2^-9 of itself each time it crosses (out, home, and both ways again as a gradient);
# in int8 by 1/254 of its row's largest, which is at most twice the RMS of a row of four; in float8_e4m3fn by 2^-4 of itself.
WIRE_RMS = {"bfloat16": 2**-7, "int8": 2 / 254, "float8_e4m3fn": 2**-4}


def assert_close(actual, expected, dtype=None, what=""):
    """Asserts equality up to the dtype's tolerance times the root mean square of `expected`.

    `dtype` is the precision of the computation ("float32" or "bfloat16"); by default that of `actual`.
    """
    name = jnp.dtype(dtype or actual.dtype).name
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what} shapes differ: {actual.shape} and {expected.shape}"
    assert np.all(np.isfinite(actual)), f"{what} is not finite"
    rms = np.sqrt(np.mean(expected**2)) if expected.size else 0.0
    error = np.max(np.abs(actual - expected), initial=0.0)
    assert error <= RELATIVE_TO_RMS[name] * max(rms, 1e-8), f"{what} differs by {error:.3g} with RMS {rms:.3g} ({name})"


def assert_close_over_wire(actual, expected, wire, what=""):
    """Asserts that the root mean square of the error, relative to that of `expected`, is what the wire dtype may cost."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what} shapes differ: {actual.shape} and {expected.shape}"
    error, rms = (np.sqrt(np.mean(array**2)) for array in (actual - expected, expected))
    assert error <= WIRE_RMS[wire] * max(rms, 1e-8), f"{what} differs by RMS {error:.3g} with RMS {rms:.3g} ({wire} wire)"
