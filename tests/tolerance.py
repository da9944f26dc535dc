"""The one place that says how close is equal."""

import jax.numpy as jnp
import numpy as np

RELATIVE_TO_RMS = {"float32": 1e-5, "bfloat16": 2e-2}


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
