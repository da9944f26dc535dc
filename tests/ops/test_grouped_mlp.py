"""The fused loop against dense networks, expert by expert, and against the three grouped products."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tolerance import assert_close

from moe_jax.layers.mlp import activate
from moe_jax.ops.grouped_mlp import grouped_mlp

D, F = 8, 12
ACTIVATIONS = {
    "swiglu": lambda up, gate: activate("swiglu", up, gate),
    "geglu": lambda up, gate: activate("geglu", up, gate),
    "gelu": lambda up: activate("gelu", up, None),
}
BIASED = ACTIVATIONS | {"swiglu_clamped": lambda up, gate: activate("swiglu_clamped", up, gate, 0.8)}


def _inputs(rows, sizes, activation, dtype="float32"):
    rng = np.random.default_rng(rows)
    matrices = 1 if activation == "gelu" else 2
    shapes = ((rows, D), *((len(sizes), D, F),) * matrices, (len(sizes), F, D), (rows, D))
    scales = (1, *(D**-0.5,) * matrices, F**-0.5, 1)  # pre-activations and answers near 1
    arrays = (scale * rng.standard_normal(shape) for scale, shape in zip(scales, shapes, strict=True))
    x_AD, *w_in, w_out_EFD, g_AD = (jnp.asarray(array, dtype) for array in arrays)
    return x_AD, tuple(w_in), w_out_EFD, g_AD, jnp.asarray(sizes, jnp.int32)


@partial(jax.jit, static_argnums=(0, 1))
def _values_and_gradients(activation, backend, x_AD, w_in, w_out_EFD, g_AD, sizes_E):
    def run(x, w_in, w_out):
        return grouped_mlp(x, w_in, w_out, sizes_E, ACTIVATIONS[activation], backend)

    y_AD, pullback = jax.vjp(run, x_AD, w_in, w_out_EFD)
    return y_AD, *pullback(g_AD)


def _expert_by_expert(activation, x_AD, w_in, w_out_EFD, g_AD, sizes):
    """The dense network of each expert on its own rows: products in float32, all that is kept between them in x's dtype."""

    def multiply(a, b):
        return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")

    def run(x, w_in, w_out):
        parts, start = [], 0
        for e, size in enumerate(sizes):
            own = x[start : start + size]
            h = ACTIVATIONS[activation](*(multiply(own, w[e]).astype(x.dtype) for w in w_in))
            parts.append(multiply(h, w_out[e]))
            start += size
        return jnp.concatenate([*parts, jnp.zeros((len(x) - start, D))]).astype(x.dtype)

    y_AD, pullback = jax.vjp(run, x_AD, w_in, w_out_EFD)
    return y_AD, *pullback(g_AD)


def _assert_same(actual, expected, dtype):
    """Equality up to the tolerance, which in bfloat16, whose error grows with the element, is of the element where above the RMS."""
    actual, expected = (jax.tree.leaves_with_path(tree) for tree in (actual, expected))
    for (path, a), (_, e) in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = np.maximum(np.abs(e), np.sqrt(np.mean(e**2)) + 1e-30) if dtype == "bfloat16" else 1.0
        assert_close(a / scale, e / scale, dtype, what=jax.tree_util.keystr(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(60, 0, 71, 0), (1, 97, 3, 20), (0, 0, 0, 0)])
def test_values_and_gradients(activation, sizes, dtype):
    inputs = _inputs(131, sizes, activation, dtype)
    actual = _values_and_gradients(activation, "cpu", *inputs)
    _assert_same(actual, _expert_by_expert(activation, *inputs[:-1], sizes), dtype)
    end, (y_AD, dx_AD, dw_in, dw_out_EFD) = sum(sizes), actual
    assert y_AD.dtype == dx_AD.dtype == dw_out_EFD.dtype == dw_in[0].dtype == dtype
    empty = np.flatnonzero(np.asarray(sizes) == 0)
    for zeros in (y_AD[end:], dx_AD[end:], dw_out_EFD[empty], *(dw[empty] for dw in dw_in)):
        assert np.all(np.asarray(zeros) == 0)


def test_other_backends_are_three_products():
    inputs = _inputs(131, (5, 90, 0, 7), "swiglu")
    actual, expected = (_values_and_gradients("swiglu", backend, *inputs) for backend in ("reference", "cpu"))
    _assert_same(actual, expected, "float32")


def _biased(backend, activation, dtype):
    """What `_values_and_gradients` gives with the gradients of biases, by `backend`, or expert by expert where that is None."""
    sizes = (5, 90, 0, 7)
    x_AD, w_in, w_out_EFD, g_AD, sizes_E = _inputs(131, sizes, activation, dtype)
    rng = np.random.default_rng(1)
    biases = tuple(jnp.asarray(rng.standard_normal((len(sizes), n)), dtype) for n in (*(F,) * len(w_in), D))

    def multiply(a, w, b):
        return jnp.matmul(*(array.astype(jnp.float32) for array in (a, w)), precision="highest") + b.astype(jnp.float32)

    def run(x, w_in, w_out, biases):
        if backend is not None:
            return grouped_mlp(x, w_in, w_out, sizes_E, BIASED[activation], backend, biases)
        parts, start = [], 0
        for e, size in enumerate(sizes):
            own = x[start : start + size]
            pre = [multiply(own, w[e], b[e]).astype(x.dtype) for w, b in zip(w_in, biases[:-1], strict=True)]
            parts.append(multiply(BIASED[activation](*pre), w_out[e], biases[-1][e]))
            start += size
        return jnp.concatenate([*parts, jnp.zeros((len(x) - start, D))]).astype(x.dtype)

    y_AD, pullback = jax.vjp(jax.jit(run), x_AD, w_in, w_out_EFD, biases)
    return y_AD, *pullback(g_AD)


@pytest.mark.parametrize(
    ("backend", "activation", "dtype"),
    [
        ("cpu", "swiglu", "float32"),
        ("cpu", "swiglu_clamped", "float32"),
        ("cpu", "gelu", "bfloat16"),
        ("reference", "swiglu_clamped", "float32"),
    ],
)
def test_biases_are_those_of_the_row_s_expert(backend, activation, dtype):
    actual = _biased(backend, activation, dtype)
    _assert_same(actual, _biased(None, activation, dtype), dtype)
    y_AD, dx_AD, *_, db = actual
    assert np.all(np.asarray(y_AD[102:]) == 0)
    assert np.all(np.asarray(dx_AD[102:]) == 0)
    assert all(np.all(b[2] == 0) and np.all(np.abs(b[[0, 1, 3]]).max(1) > 0) for b in map(np.asarray, db))


def test_garbage_past_the_end_does_not_leak():
    x_AD, w_in, w_out_EFD, g_AD, sizes_E = _inputs(131, (5, 0, 8, 40), "swiglu")
    x_AD, g_AD = x_AD.at[53:].set(jnp.nan), g_AD.at[53:].set(jnp.nan)
    y_AD, dx_AD, dw_in, dw_out_EFD = _values_and_gradients("swiglu", "cpu", x_AD, w_in, w_out_EFD, g_AD, sizes_E)
    for array in (y_AD, dx_AD, *dw_in, dw_out_EFD):
        assert np.all(np.isfinite(array))
    assert np.all(np.asarray(y_AD[53:]) == 0)
    assert np.all(np.asarray(dx_AD[53:]) == 0)


def test_inside_shard_map_gradients_are_summed_over_the_axes_an_argument_lacks():
    x_AD, w_in, w_out_EFD, g_AD, _ = _inputs(40, (3, 9, 0), "swiglu")
    sizes = ((3, 9, 0), (0, 2, 11))

    def run(x, w_in, w_out):
        return grouped_mlp(x, w_in, w_out, sizes_XE[jax.lax.axis_index("data")], ACTIVATIONS["swiglu"], "cpu")

    sizes_XE = jnp.asarray(sizes, jnp.int32)
    halves = [
        _expert_by_expert("swiglu", x_AD[h], w_in, w_out_EFD, g_AD[h], s)
        for h, s in zip((slice(0, 20), slice(20, 40)), sizes, strict=True)
    ]
    expected = (
        *(jnp.concatenate(pair) for pair in zip(*(half[:2] for half in halves), strict=True)),
        *jax.tree.map(jnp.add, halves[0][2:], halves[1][2:]),
    )
    with jax.set_mesh(mesh_of(data=2)):
        rows = P("data", None)
        island = jax.shard_map(run, in_specs=(rows, P(), P()), out_specs=rows)
        arguments = jax.reshard(x_AD, rows), jax.reshard(w_in, P()), jax.reshard(w_out_EFD, P())
        y_AD, pullback = jax.vjp(jax.jit(island), *arguments)
        actual = (y_AD, *pullback(jax.reshard(g_AD, rows)))
    _assert_same(actual, expected, "float32")


def test_nothing_is_copied_whole_and_no_product_runs_outside_the_loop_that_decides_on_it():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), _inputs(300, (100, 90, 110), "swiglu"))
    text = _values_and_gradients.lower("swiglu", "cpu", *shapes).compile().as_text()
    loops = text[: text.index("\nENTRY")]  # before them two buffers of zeros may start as copies of one
    assert not re.findall(r"= f32\[(?:300|3),.* copy\(", loops), "a whole buffer is copied in a loop"
    # an expert's body holds the loops over its blocks; a product that XLA moved there out of a loop would run for every size
    expert_bodies = [c for c in text.split("\n\n") if c.count(" while(") > 1]
    assert expert_bodies
    assert not any(re.search(r" dot\(|ynn_fusion|onednn", body) for body in expert_bodies)


def test_bad_arguments_are_refused_in_a_sentence():
    x_AD, w_in, w_out_EFD, _, sizes_E = _inputs(10, (5, 5), "swiglu")
    with pytest.raises(ValueError, match="make D, E and F agree"):
        grouped_mlp(x_AD, w_in, w_out_EFD, sizes_E[:1], ACTIVATIONS["swiglu"])
    with pytest.raises(ValueError, match=r"takes no biases or one \[E, F\] of each of w_in and one \[E, D\]"):
        grouped_mlp(x_AD, w_in, w_out_EFD, sizes_E, ACTIVATIONS["swiglu"], "cpu", (w_in[0][:, 0], w_out_EFD[:, 0]))
    with pytest.raises(ValueError, match="cast them to one dtype"):
        grouped_mlp(x_AD.astype(jnp.bfloat16), w_in, w_out_EFD, sizes_E, ACTIVATIONS["swiglu"])
