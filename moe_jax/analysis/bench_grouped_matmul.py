"""How much slower a grouped matrix product is than one dense product of the same FLOPs.

`rows()` gives, for each backend, shape and skew of the group sizes, the ratio of its time to the dense one's: forward (x w), and
backward (dx = g w^T and dw = x^T g together). Each repeat measures all rivals in turn.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.timing import interleaved, ratio
from moe_jax.ops.grouped_matmul import grouped_matmul


class Shape(NamedTuple):
    """A grouped product: rows, widths, experts and how the rows spread over them."""

    tokens: int
    d_in: int
    d_out: int
    experts: int
    sizes: str = "uniform"  # or "zipf": expert i is chosen in proportion to 1 / (i + 1)


SHAPES = (
    Shape(8192, 512, 1024, 8),
    Shape(8192, 512, 1024, 8, "zipf"),
    Shape(32768, 512, 256, 64),
    Shape(32768, 512, 256, 64, "zipf"),
)


def rows(
    shapes: Sequence[Shape] | None = None,
    repeats: int = 9,
    backends: Sequence[str] = ("cpu",),
    dtype: str = "float32",
) -> list[dict]:
    """One dict for each shape and backend.

    Keys: backend, experts, tokens, d_in, d_out, sizes, dtype, dense_forward_ms, dense_backward_ms (medians), forward_ratio and
    backward_ratio (medians over the repeats of grouped / dense), and each ratio's `_min` and `_max`.
    """
    return [row for shape in (SHAPES if shapes is None else shapes) for row in _measure(shape, repeats, backends, dtype)]


def group_sizes(shape: Shape, seed: int = 0) -> np.ndarray:
    """int32 [E] that sum to `shape.tokens`: a multinomial draw, so that no size is a multiple of a block."""
    share_E = np.ones(shape.experts) if shape.sizes == "uniform" else 1 / np.arange(1, shape.experts + 1)
    return np.random.default_rng(seed).multinomial(shape.tokens, share_E / share_E.sum()).astype(np.int32)


def _measure(shape, repeats, backends, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x_AD = jax.random.normal(keys[0], (shape.tokens, shape.d_in), dtype)
    w_EDF = jax.random.normal(keys[1], (shape.experts, shape.d_in, shape.d_out), dtype)
    g_AF = jax.random.normal(keys[2], (shape.tokens, shape.d_out), dtype)
    sizes_E = jnp.asarray(group_sizes(shape))

    functions = {
        "dense forward": functools.partial(jax.jit(_dense), x_AD, w_EDF[0]),
        "dense backward": functools.partial(jax.jit(_dense_backward), x_AD, w_EDF[0], g_AF),
    }
    for backend in backends:
        product = functools.partial(grouped_matmul, group_sizes_E=sizes_E, backend=backend)
        functions[f"{backend} forward"] = functools.partial(jax.jit(product), x_AD, w_EDF)
        functions[f"{backend} backward"] = functools.partial(jax.jit(jax.vjp(product, x_AD, w_EDF)[1]), g_AF)
    seconds = interleaved(functions, repeats)
    return [_row(shape, backend, dtype, seconds) for backend in backends]


def _row(shape, backend, dtype, seconds):
    row = {"backend": backend, **shape._asdict(), "dtype": dtype}
    for direction in ("forward", "backward"):
        dense = seconds[f"dense {direction}"]
        row[f"dense_{direction}_ms"] = 1e3 * float(np.median(dense))
        median, least, greatest = ratio(seconds[f"{backend} {direction}"], dense)
        row |= {f"{direction}_ratio": median, f"{direction}_ratio_min": least, f"{direction}_ratio_max": greatest}
    return row


def _dense(x_AD, w_DF):
    return x_AD @ w_DF


def _dense_backward(x_AD, w_DF, g_AF):
    return g_AF @ w_DF.T, x_AD.T @ g_AF
