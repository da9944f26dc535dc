import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tolerance import assert_close
from topology import described_mesh

from moe_jax.config import ConfigError
from moe_jax.ops import grouped_matmul as gm
from moe_jax.ops import grouped_matmul_cpu as cpu
from moe_jax.ops import grouped_matmul_gpu as gpu
from moe_jax.ops import grouped_matmul_tpu as tpu


def _interpreted(kernel, tiles):
    """A kernel as plain JAX operations; in the self-test's small cases every axis then has several blocks, the last of them partial."""
    return lambda x, w, sizes: kernel(x, w, sizes, tiles=tiles if len(x) <= 131 else None, interpret=True)


PLAIN = {"reference": gm.grouped_matmul_reference, "cpu": cpu.grouped_matmul_cpu}
BACKENDS = {
    **PLAIN,
    "gpu interpreted": _interpreted(gpu.grouped_matmul_gpu, gpu.Tiles(32, 16, 16, num_warps=4, num_stages=3)),
    "tpu interpreted": _interpreted(tpu.grouped_matmul_tpu, tpu.Tiles(32, 16, 32)),
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setitem(gm.BACKENDS, request.param, BACKENDS[request.param])
    return request.param


def _inputs(rows, sizes, d_in=8, d_out=12):
    rng = np.random.default_rng(0)
    shapes = ((rows, d_in), (len(sizes), d_in, d_out), (rows, d_out))
    return (*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes), jnp.asarray(sizes, jnp.int32))


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
    with pytest.raises(gm.SelfTestError, match=rf"'broken' is wrong by .*{where}"):
        gm.self_test("broken")


@pytest.mark.parametrize("backend", PLAIN)  # JAX cannot interpret a kernel there; that they lower there is tested beside each
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

    mesh = mesh_of(data=2, tensor=2)
    with jax.set_mesh(mesh):
        specs = P("data", None), P(None, None, "tensor"), P("data", None)
        x, w, sizes = (jax.reshard(a, s) for a, s in zip((x_AD, w_EDF, sizes_XE), specs, strict=True))
        island = jax.shard_map(product, in_specs=specs, out_specs=P("data", "tensor"))
        y, pullback = jax.vjp(jax.jit(lambda x, w: island(x, w, sizes)), x, w)
        actual = (y, *pullback(jax.reshard(g_AF, P("data", "tensor"))))
    for name, a, e in zip(("y", "dx", "dw"), actual, expected, strict=True):
        assert_close(a, e, what=name)


def test_garbage_past_the_end_does_not_leak(backend):
    if backend == "reference":
        return  # its gradients are products with zeros, which nan survives
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

        def block(covered, rows, at, own_R1):
            before = covered.sum()
            own = jnp.ones(rows, jnp.int32) if own_R1 is None else own_R1[:, 0].astype(jnp.int32)
            covered = covered.at[at + jnp.arange(rows)].add(own, mode="drop")
            return covered + (0 if own_R1 is None else 100 * before)  # only the first block is masked

        covered = cpu.for_each_block(block, jnp.zeros(num_rows, jnp.int32), start, end, num_rows, 4)
        np.testing.assert_array_equal(covered, (np.arange(num_rows) >= start) & (np.arange(num_rows) < end))


def test_the_loops_update_their_buffers_in_place():
    x_AD, w_EDF, g_AF, sizes_E = _inputs(300, (100, 90, 110))
    run = functools.partial(gm._values_and_gradients, "cpu")
    text = jax.jit(run).lower(x_AD, w_EDF, sizes_E, g_AF).compile().as_text()
    assert "while(" in text
    assert not re.findall(r"= f32\[(?:300|3),.* copy\(", text), "a whole buffer is copied"


@pytest.fixture
def lines(monkeypatch):
    """What is logged, from a process in which nothing was chosen yet."""
    lines = []
    monkeypatch.setattr(gm._LOG, "info", lambda text, *args: lines.append(text % args))
    gm._log_choice.cache_clear()
    gm._prove.cache_clear()
    yield lines
    gm._prove.cache_clear()


def described(device_kind, platform):
    return jax.sharding.use_abstract_mesh(described_mesh(device_kind, platform, data=1))


def test_auto_logs_its_choice_once(lines):
    assert [gm.choose_backend("auto", "float32"), gm.choose_backend("auto", "bfloat16")] == ["cpu", "cpu"]
    assert lines == ["grouped_matmul: backend 'cpu' on platform 'cpu': made for it."]


@pytest.mark.parametrize(("kind", "platform", "name"), [("NVIDIA H200", "cuda", "gpu"), ("TPU v5", "tpu", "tpu")])
def test_auto_follows_the_mesh_and_says_that_absent_hardware_cannot_be_tested(lines, kind, platform, name):
    with described(kind, platform):
        assert [gm.choose_backend("auto", "bfloat16"), gm.choose_backend(name, "bfloat16")] == [name, name]
    assert len(lines) == 3
    assert "not here, so it is not tested" in lines[0]
    assert "made for it" in lines[1]
    assert "model.moe.grouped_matmul names" in lines[2]


def _first_use_while_tracing(product):
    """Traces the backend "kernel", made for the platform of the tests, inside a `shard_map` on a mesh with Explicit axes."""
    x_AD, w_EDF, _, sizes_E = _inputs(16, (3, 4))
    with jax.set_mesh(mesh_of(data=4, tensor=2)):
        island = jax.shard_map(
            lambda x, w, s: gm.grouped_matmul(x, w, s, "kernel"), in_specs=(P("data"), P(), P()), out_specs=P("data")
        )
        args = [jax.reshard(a, P(*s)) for a, s in ((x_AD, ("data",)), (w_EDF, ()), (sizes_E, ()))]
        return jax.jit(island).trace(*args)


def test_a_kernel_proves_itself_on_its_first_use_even_while_tracing(monkeypatch, lines):
    tested = []

    def kernel(x, w, sizes):
        tested.append(x.shape)
        return gm.grouped_matmul_reference(x, w, sizes)

    monkeypatch.setitem(gm.BACKENDS, "kernel", kernel)
    monkeypatch.setitem(gm.KERNELS, "kernel", "cpu")
    _first_use_while_tracing(kernel)
    of_the_test = {(rows, d_in) for rows, (d_in, _) in gm.SELF_TEST_WIDTHS.items()}
    assert {*tested} == {(4, 8), *of_the_test}
    assert "passed its self-test in float32" in lines[0]
    tested.clear()
    _first_use_while_tracing(kernel)
    assert tested == [(4, 8)]


def test_a_kernel_that_fails_its_self_test_is_refused(monkeypatch, lines):
    monkeypatch.setitem(gm.BACKENDS, "kernel", _no_mask)
    monkeypatch.setitem(gm.KERNELS, "kernel", "cpu")
    with pytest.raises(ConfigError, match=r"'kernel' cannot be used on this device: .* is wrong by .* Choose 'cpu'"):
        _first_use_while_tracing(_no_mask)
    assert not any("passed" in line for line in lines)


def test_a_backend_that_cannot_run_here_is_refused_in_a_sentence():
    x_AD, w_EDF, _, sizes_E = _inputs(10, (5, 5))
    for name in gm.KERNELS:
        with pytest.raises(
            ConfigError, match=rf"'{name}' is a kernel for platform '{name}' and cannot run on 'cpu'; choose 'auto'"
        ):
            gm.grouped_matmul(x_AD, w_EDF, sizes_E, name)
    with (
        described("AMD Instinct MI300X", "rocm"),
        pytest.raises(ConfigError, match=r"no kernel for AMD's GPUs .* choose 'cpu'"),
    ):
        gm.choose_backend("auto", "bfloat16")
    with described("some chip", "some"), pytest.raises(ConfigError, match="'auto' has no kernel for platform 'some'; choose"):
        gm.choose_backend("auto", "bfloat16")


@pytest.mark.parametrize("name", gm.KERNELS)
def test_a_kernel_whose_compiler_is_missing_is_refused_in_a_sentence(monkeypatch, name):
    monkeypatch.setitem(sys.modules, f"moe_jax.ops.grouped_matmul_{name}", None)
    x_AD, w_EDF, _, sizes_E = _inputs(10, (5, 5))
    with pytest.raises(ConfigError, match=rf"grouped_matmul = '{name}' needs Pallas for it, .* choose 'cpu'"):
        gm.BACKENDS[name](x_AD, w_EDF, sizes_E)


def test_bad_arguments_are_refused_in_a_sentence():
    x_AD, w_EDF, _, sizes_E = _inputs(10, (5, 5))
    with pytest.raises(ConfigError, match=r"grouped_matmul = 'fast' is unknown; choose"):
        gm.grouped_matmul(x_AD, w_EDF, sizes_E, "fast")
    with pytest.raises(ValueError, match="make D and E agree"):
        gm.grouped_matmul(x_AD, w_EDF, sizes_E[:1])
    with pytest.raises(ValueError, match="cast one"):
        gm.grouped_matmul(x_AD, w_EDF.astype(jnp.bfloat16), sizes_E)
