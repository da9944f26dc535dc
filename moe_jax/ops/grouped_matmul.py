"""One matrix product per group of rows, behind one signature, and the test that every implementation must pass.

The plain JAX backends ("cpu", "reference") are the same program everywhere, and the test suite holds them to `self_test`. The kernels
("gpu", "tpu") depend on the chip and its compiler: each must pass `self_test` on the device itself, once a process and dtype, before
its first use. Where a program is only compiled, for hardware that is not there, that is not possible, and is logged.
"""

import concurrent.futures
import functools
import importlib
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ConfigError
from moe_jax.mesh import target_platform
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


def _kernel(platform, x_AD, w_EDF, group_sizes_E):
    """The Pallas kernel for a platform; imported late, since Pallas takes half a second and most runs need none."""
    name = f"grouped_matmul_{platform}"
    try:
        kernel = getattr(importlib.import_module(f"moe_jax.ops.{name}"), name)
    except ImportError as error:
        raise ConfigError(
            f"model.moe.grouped_matmul = {platform!r} needs Pallas for it, which this jax does not have ({error}); choose 'cpu', plain"
            " JAX that is right everywhere and slow there, or another jax."
        ) from error
    return kernel(x_AD, w_EDF, group_sizes_E)


BACKENDS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "reference": grouped_matmul_reference,
    "cpu": grouped_matmul_cpu,
    "gpu": functools.partial(_kernel, "gpu"),
    "tpu": functools.partial(_kernel, "tpu"),
}
KERNELS = {"gpu": "gpu", "tpu": "tpu"}  # backends that run on one platform only, and that platform


def grouped_matmul(x_AD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, backend: str = "auto") -> jax.Array:
    """Multiplies the rows of each group by that group's matrix.

    Inside `shard_map` the arguments may vary over different mesh axes; gradients are summed over the axes an argument lacks.

    Args:
      x_AD: float32 or bfloat16; the first `group_sizes_E[0]` rows belong to expert 0, the next to expert 1, ...
      w_EDF: one matrix for each expert, of x's dtype.
      group_sizes_E: int32, any sizes from 0, with a sum of at most A.
      backend: a key of `BACKENDS`, or "auto" for the one made for the ambient mesh's platform.

    Returns:
      y_AF in x's dtype, summed in float32. Rows past the sum of the sizes are zero, and so is their gradient, as is the gradient of
      an empty group's matrix.

    Raises:
      ConfigError: an unknown backend, one that cannot run here, or one that fails its self-test on this device.
      ValueError: shapes or dtypes that do not fit.
    """
    _check(x_AD, w_EDF, group_sizes_E)
    return _product(choose_backend(backend, x_AD.dtype), x_AD, w_EDF, group_sizes_E)


def _product(name, x_AD, w_EDF, group_sizes_E):
    return BACKENDS[name](*vary_alike(x_AD, w_EDF, group_sizes_E))


def choose_backend(backend: str, dtype: jax.typing.DTypeLike) -> str:
    """The key of `BACKENDS` that `backend` ("auto" or a key) stands for on the ambient mesh's platform.

    Logs each choice and its reason once a process, and the first time lets a kernel prove itself for `dtype` on the device.

    Raises:
      ConfigError: as `grouped_matmul` does.
    """
    platform = target_platform()
    name = platform if backend == "auto" else backend
    if name not in BACKENDS:
        problem = f"has no kernel for platform {platform!r}" if backend == "auto" else "is unknown"
        choices = ", ".join(map(repr, BACKENDS))
        raise ConfigError(f"model.moe.grouped_matmul = {backend!r} {problem}; choose 'auto' or one of {choices}.")
    if name in KERNELS:
        _check_can_run(backend, name, platform)
        _prove(name, platform, jnp.dtype(dtype).name)
    _log_choice(name, platform, "made for it" if backend == "auto" else "the one that model.moe.grouped_matmul names")
    return name


def _check_can_run(backend, name, platform):
    if platform != KERNELS[name]:
        raise ConfigError(
            f"model.moe.grouped_matmul = {name!r} is a kernel for platform {KERNELS[name]!r} and cannot run on {platform!r};"
            " choose 'auto'.",
        )
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    if device.platform == "rocm" or device.device_kind.lower().startswith(("amd", "gfx")):
        raise ConfigError(
            f"model.moe.grouped_matmul = {backend!r} has no kernel for AMD's GPUs ({device.device_kind}): the one for NVIDIA's was never"
            " tried there; choose 'cpu', plain JAX that is right everywhere and slow on a GPU.",
        )


@functools.cache
def _log_choice(name, platform, why):
    _LOG.info("grouped_matmul: backend '%s' on platform '%s': %s.", name, platform, why)


@functools.cache
def _prove(name, platform, dtype):
    """Runs the self-test of a kernel unless the platform's hardware is not there.

    On a thread of its own: what is being traced, the ambient mesh and manual axes are a thread's own, and must not reach the test.
    """
    if jax.default_backend() != platform:
        _LOG.info("grouped_matmul: backend '%s' compiles for a '%s' that is not here, so it is not tested.", name, platform)
        return
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(self_test, name, (dtype,)).result()
        except SelfTestError as error:
            raise ConfigError(
                f"model.moe.grouped_matmul = {name!r} cannot be used on this device: {error} Choose 'cpu'."
            ) from error
    _LOG.info("grouped_matmul: backend '%s' passed its self-test in %s on %s.", name, dtype, jax.local_devices()[0].device_kind)


def _check(x_AD, w_EDF, group_sizes_E):
    if x_AD.ndim != 2 or w_EDF.ndim != 3 or group_sizes_E.shape != w_EDF.shape[:1] or x_AD.shape[1] != w_EDF.shape[1]:
        raise ValueError(
            f"grouped_matmul takes x [A, D], w [E, D, F] and group_sizes [E], and was given {x_AD.shape}, {w_EDF.shape} and"
            f" {group_sizes_E.shape}; make D and E agree.",
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
# D and F by rows; the largest fills the default blocks of a kernel
SELF_TEST_WIDTHS = {131: (24, 40), 3: (24, 40), 1101: (136, 200)}
# Of the root mean square of the expected array, or of the element where that is greater (bfloat16 rounds to 4e-3 of it).
SELF_TEST_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class SelfTestError(ValueError):
    """A backend's result is wrong."""


def self_test(backend: str, dtypes: tuple[str, ...] = tuple(SELF_TEST_TOLERANCE)) -> None:
    """Compares a backend's values and gradients with NumPy in float64. Runs it wherever JAX runs, be it made for that or not.

    Args:
      backend: a key of `BACKENDS`.
      dtypes: keys of `SELF_TEST_TOLERANCE`.

    Raises:
      SelfTestError: a result differs; the sentence names the backend, the case, the array and the size of the error.
    """
    run = jax.jit(functools.partial(_values_and_gradients, backend))
    for dtype in dtypes:
        for case, (rows, sizes) in SELF_TEST_CASES.items():
            if dtype == "bfloat16" and rows == 3:
                continue
            x, w, g = _self_test_inputs(rows, len(sizes), dtype)
            actual = run(x, w, jnp.asarray(sizes, jnp.int32), g)
            for name, a, e in zip(("y", "dx", "dw"), actual, _expected(x, w, sizes, g), strict=True):
                error = np.abs(np.asarray(a, np.float64) - e)
                scale = np.maximum(np.abs(e), max(np.sqrt(np.mean(e**2)), 1e-8))
                if not np.all(error <= SELF_TEST_TOLERANCE[dtype] * scale):  # false for nan too
                    worst = f"{np.max(error):.3g}"
                    raise SelfTestError(f"grouped_matmul backend {backend!r} is wrong by {worst} in {name} ({case}, {dtype}).")


def _self_test_inputs(rows, experts, dtype):
    rng = np.random.default_rng(rows)
    d_in, d_out = SELF_TEST_WIDTHS[rows]
    shapes = ((rows, d_in), (experts, d_in, d_out), (rows, d_out))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _values_and_gradients(backend, x_AD, w_EDF, group_sizes_E, g_AF):
    y_AF, pullback = jax.vjp(lambda x, w: _product(backend, x, w, group_sizes_E), x_AD, w_EDF)
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
