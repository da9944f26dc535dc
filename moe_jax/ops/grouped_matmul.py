"""One matrix product per group of rows, behind one signature, and the test that every implementation must pass."""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ConfigError
from moe_jax.ops.grouped_matmul_cpu import grouped_matmul_cpu
from moe_jax.ops.varying import vary_alike

_LOG = logging.getLogger(__name__)


def grouped_matmul_reference(x_AD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Every row by every expert's weight, masked: E times the work, and obviously right."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_A = jnp.arange(x_AD.shape[0])
    own_EA = (row_A >= (ends_E - group_sizes_E)[:, None]) & (row_A < ends_E[:, None])
    x_EAD = jnp.where(own_EA[:, :, None], x_AD, 0)
    return jnp.einsum("EAD,EDF->AF", x_EAD, w_EDF, preferred_element_type=jnp.float32).astype(x_AD.dtype)


BACKENDS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "reference": grouped_matmul_reference,
    "cpu": grouped_matmul_cpu,
}


def grouped_matmul(x_AD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, backend: str = "auto") -> jax.Array:
    """Multiplies the rows of each group by that group's matrix.

    Inside `shard_map` the arguments may vary over different mesh axes; gradients are summed over the axes an argument lacks.

    Args:
      x_AD: float32 or bfloat16; the first `group_sizes_E[0]` rows belong to expert 0, the next to expert 1, ...
      w_EDF: one matrix for each expert, of x's dtype.
      group_sizes_E: int32, any sizes from 0, with a sum of at most A.
      backend: a key of `BACKENDS`, or "auto".

    Returns:
      y_AF in x's dtype, summed in float32. Rows past the sum of the sizes are zero, and so is their gradient, as is the gradient of
      an empty group's matrix.

    Raises:
      ConfigError: an unknown backend.
      ValueError: shapes or dtypes that do not fit.
    """
    name = choose_backend(backend)
    _check(x_AD, w_EDF, group_sizes_E)
    return BACKENDS[name](*vary_alike(x_AD, w_EDF, group_sizes_E))


def choose_backend(backend: str) -> str:
    """The key of `BACKENDS` that `backend` ("auto" or a key) stands for; "auto" logs its choice once a process."""
    if backend == "auto":
        return _auto(jax.default_backend())
    if backend not in BACKENDS:
        raise ConfigError(
            f"model.moe.grouped_matmul = {backend!r} is unknown; choose 'auto' or one of {', '.join(map(repr, BACKENDS))}."
        )
    return backend


@functools.cache
def _auto(platform: str) -> str:
    why = (
        "made for it" if platform == "cpu" else "the only fast backend that runs everywhere; it has no kernel for this platform"
    )
    _LOG.info("grouped_matmul: backend 'cpu' on platform '%s': row blocks of plain JAX, %s.", platform, why)
    return "cpu"


def _check(x_AD, w_EDF, group_sizes_E):
    if x_AD.ndim != 2 or w_EDF.ndim != 3 or group_sizes_E.shape != w_EDF.shape[:1] or x_AD.shape[1] != w_EDF.shape[1]:
        raise ValueError(
            f"grouped_matmul takes x [A, D], w [E, D, F] and group_sizes [E], and was given {x_AD.shape}, {w_EDF.shape} and"
            f" {group_sizes_E.shape}; make D and E agree."
        )
    if x_AD.dtype != w_EDF.dtype:
        raise ValueError(f"grouped_matmul was given x in {x_AD.dtype} and w in {w_EDF.dtype}; cast one to the other's dtype.")


SELF_TEST_CASES = {  # name: (rows, sizes); few distinct shapes, since each is a compilation
    "even groups": (131, (32, 32, 32, 32)),
    "odd sizes": (131, (1, 67, 18, 45)),
    "empty groups": (131, (0, 80, 0, 51)),
    "one hot expert": (131, (0, 0, 131, 0)),
    "rows past the end": (131, (7, 0, 33, 10)),
    "nothing to do": (131, (0, 0, 0, 0)),
    "fewer rows than a block": (3, (1, 0, 2, 0)),
    "a large hot expert, rows past the end": (1101, (3, 0, 859, 17)),
}
# Of the root mean square of the expected array, or of the element where that is greater (bfloat16 rounds to 4e-3 of it).
SELF_TEST_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def self_test(backend: str) -> None:
    """Compares a backend's values and gradients with NumPy in float64, in float32 and bfloat16.

    Raises:
      ValueError: a result differs; the sentence names the backend, the case, the array and the size of the error.
    """
    run = jax.jit(functools.partial(_values_and_gradients, choose_backend(backend)))
    for dtype, tolerance in SELF_TEST_TOLERANCE.items():
        for case, (rows, sizes) in SELF_TEST_CASES.items():
            if dtype == "bfloat16" and rows != 131:
                continue
            x, w, g = _self_test_inputs(rows, len(sizes), dtype)
            actual = run(x, w, jnp.asarray(sizes, jnp.int32), g)
            for name, a, e in zip(("y", "dx", "dw"), actual, _expected(x, w, sizes, g), strict=True):
                error = np.abs(np.asarray(a, np.float64) - e)
                scale = np.maximum(np.abs(e), max(np.sqrt(np.mean(e**2)), 1e-8))
                if not np.all(error <= tolerance * scale):  # false for nan too
                    worst = f"{np.max(error):.3g}"
                    raise ValueError(f"grouped_matmul backend {backend!r} is wrong by {worst} in {name} ({case}, {dtype}).")


def _self_test_inputs(rows, experts, dtype, d_in=24, d_out=40):
    rng = np.random.default_rng(rows)
    shapes = ((rows, d_in), (experts, d_in, d_out), (rows, d_out))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _values_and_gradients(backend, x_AD, w_EDF, group_sizes_E, g_AF):
    y_AF, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes_E, backend), x_AD, w_EDF)
    return y_AF, *pullback(g_AF)


def _expected(x_AD, w_EDF, sizes, g_AF):
    x_AD, w_EDF, g_AF = (np.asarray(a, np.float64) for a in (x_AD, w_EDF, g_AF))
    y_AF, dx_AD, dw_EDF = np.zeros_like(g_AF), np.zeros_like(x_AD), np.zeros_like(w_EDF)
    start = 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        y_AF[own], dx_AD[own], dw_EDF[e] = x_AD[own] @ w_EDF[e], g_AF[own] @ w_EDF[e].T, x_AD[own].T @ g_AF[own]
        start += size
    return y_AF, dx_AD, dw_EDF
