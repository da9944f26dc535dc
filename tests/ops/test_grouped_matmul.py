import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tolerance import assert_close

from moe_jax.config import ConfigError
from moe_jax.mesh import AXES
from moe_jax.ops import grouped_matmul as gm
from moe_jax.ops import grouped_matmul_cpu as cpu


def _inputs(rows, sizes, d_in=8, d_out=12):
    rng = np.random.default_rng(0)
    shapes = ((rows, d_in), (len(sizes), d_in, d_out), (rows, d_out))
    return (*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes), jnp.asarray(sizes, jnp.int32))


@pytest.mark.parametrize("backend", gm.BACKENDS)
def test_every_backend_passes_the_self_test(backend):
    gm.self_test(backend)


def _no_mask(x, w, sizes):
    expert_A = jnp.clip(jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right"), 0, len(w) - 1)
    return jnp.einsum("AD,ADF->AF", x, w[expert_A], preferred_element_type=jnp.float32).astype(x.dtype)


def _no_weight_gradient(x, w, sizes):
    return gm.grouped_matmul_reference(x, jax.lax.stop_gradient(w), sizes)


def _half_precision(x, w, sizes):
    return gm.grouped_matmul_reference(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), sizes).astype(x.dtype)


@pytest.mark.parametrize(("broken", "where"), [(_no_mask, "in y"), (_no_weight_gradient, "dw"), (_half_precision, "float32")])
def test_self_test_fails_a_broken_backend(monkeypatch, broken, where):
    monkeypatch.setitem(gm.BACKENDS, "broken", broken)
    with pytest.raises(ValueError, match=rf"'broken' is wrong by .*{where}"):
        gm.self_test("broken")


@pytest.mark.parametrize("backend", gm.BACKENDS)
def test_inside_shard_map_with_arguments_that_vary_over_different_axes(backend):
    # x differs over data, w over tensor, sizes over data; the gradient of w is summed over data and that of x over tensor.
    x_AD, w_EDF, g_AF, sizes_E = _inputs(40, (3, 9, 0))
    sizes_XE = jnp.stack([sizes_E, jnp.asarray([0, 2, 11], jnp.int32)])

    def product(x, w, sizes):
        return gm.grouped_matmul(x, w, sizes[0], backend)

    def oracle(x, w):
        return jnp.concatenate([gm.grouped_matmul_reference(x[i * 20 : (i + 1) * 20], w, sizes_XE[i]) for i in range(2)])

    expected_y, expected_pullback = jax.vjp(oracle, x_AD, w_EDF)
    expected = (expected_y, *expected_pullback(g_AF))

    mesh = jax.make_mesh((2, 1, 1, 2), AXES, axis_types=(AxisType.Explicit,) * 4, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        specs = P("data", None), P(None, None, "tensor"), P("data", None)
        x, w, sizes = (jax.reshard(a, s) for a, s in zip((x_AD, w_EDF, sizes_XE), specs, strict=True))
        island = jax.shard_map(product, in_specs=specs, out_specs=P("data", "tensor"))
        y, pullback = jax.vjp(jax.jit(lambda x, w: island(x, w, sizes)), x, w)
        actual = (y, *pullback(jax.reshard(g_AF, P("data", "tensor"))))
    for name, a, e in zip(("y", "dx", "dw"), actual, expected, strict=True):
        assert_close(a, e, what=name)


@pytest.mark.parametrize("backend", [name for name in gm.BACKENDS if name != "reference"])
def test_garbage_past_the_end_does_not_leak(backend):
    x_AD, w_EDF, g_AF, sizes_E = _inputs(30, (5, 0, 8))
    x_AD, g_AF = x_AD.at[13:].set(jnp.nan), g_AF.at[13:].set(jnp.nan)
    y_AF, dx_AD, dw_EDF = jax.jit(functools.partial(gm._values_and_gradients, backend))(x_AD, w_EDF, sizes_E, g_AF)
    for zeros in (y_AF[13:], dx_AD[13:], dw_EDF[1]):
        assert np.all(np.asarray(zeros) == 0)
    for array in (y_AF, dx_AD, dw_EDF):
        assert np.all(np.isfinite(array))


@pytest.mark.parametrize("num_rows", [5, 64, 300])
def test_blocks_cover_each_group_once(num_rows):
    rng = np.random.default_rng(num_rows)
    for _ in range(5):
        start, end = sorted(rng.integers(0, num_rows + 1, 2).tolist())
        sizes = cpu.block_sizes(num_rows, 4)
        assert list(sizes) == sorted(set(sizes), reverse=True)

        def block(covered, rows, first, at, whole):
            row = at + jnp.arange(rows)
            own = (row >= first) & (row < end)  # noqa: B023  called before the loop goes on
            return covered.at[row].add(own.astype(jnp.int32), mode="drop") + (whole & ~own.all())

        covered = cpu._for_each_block(block, jnp.zeros(num_rows, jnp.int32), start, end, num_rows, 4)
        np.testing.assert_array_equal(covered, (np.arange(num_rows) >= start) & (np.arange(num_rows) < end))


def test_the_loops_update_their_buffers_in_place():
    x_AD, w_EDF, g_AF, sizes_E = _inputs(300, (100, 90, 110))
    run = functools.partial(gm._values_and_gradients, "cpu")
    text = jax.jit(run).lower(x_AD, w_EDF, sizes_E, g_AF).compile().as_text()
    assert "while(" in text
    assert not re.findall(r"= f32\[(?:300|3),.* copy\(", text), "a whole buffer is copied"


def test_auto_logs_its_choice_once(monkeypatch):
    lines = []
    monkeypatch.setattr(gm._LOG, "info", lambda text, *args: lines.append(text % args))
    gm._auto.cache_clear()
    assert [gm.choose_backend("auto"), gm.choose_backend("auto")] == ["cpu", "cpu"]
    assert len(lines) == 1
    assert "'cpu'" in lines[0]


def test_bad_arguments_are_refused_in_a_sentence():
    x_AD, w_EDF, _, sizes_E = _inputs(10, (5, 5))
    with pytest.raises(ConfigError, match=r"grouped_matmul = 'gpu' is unknown; choose"):
        gm.grouped_matmul(x_AD, w_EDF, sizes_E, "gpu")
    with pytest.raises(ValueError, match="make D and E agree"):
        gm.grouped_matmul(x_AD, w_EDF, sizes_E[:1])
    with pytest.raises(ValueError, match="cast one"):
        gm.grouped_matmul(x_AD, w_EDF.astype(jnp.bfloat16), sizes_E)
