"""The ragged collective and its plan against a model that moves one row at a time; the real primitive, as far as no TPU shows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topology as topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerance import assert_close
from topology import described_mesh

from moe_jax.exchange.ragged_all_to_all import RaggedPlan, plan_ragged, ragged_all_to_all, reverse

D = 3
AXES = {1: ("expert",), 4: ("expert",), 8: ("expert",), "2x4": ("expert_outer", "expert")}
SHAPES = {
    1: (1, 1),
    4: (2, 4),
    8: (1, 8),
    "2x4": (2, 4),
}  # of (expert_outer, expert); with 4, the outer two know nothing of each other


def make_mesh(name):
    return jax.make_mesh(SHAPES[name], ("expert_outer", "expert"), axis_types=(AxisType.Explicit,) * 2)


def per_device(mesh, body, names):
    """`body` on each device, every argument and result with a leading axis of one part a device of `names`."""
    part = P(names)

    def inner(*arguments):
        return jax.tree.map(lambda array: array[None], body(*(array[0] for array in arguments)))

    mapped = jax.jit(lambda *arguments: jax.shard_map(inner, in_specs=(part,) * len(arguments), out_specs=part)(*arguments))

    def run(*arguments):
        with jax.set_mesh(mesh):
            return jax.tree.map(np.asarray, mapped(*(jax.device_put(x, NamedSharding(mesh, part)) for x in arguments)))

    return run


def ring_plan(wanted_nn, receive_rows):
    """Lists of (sender, row there, receiver, row here) of accepted rows, by a queue at every receiver."""
    n, moves = len(wanted_nn), []
    for receiver in range(n):
        accepted, room = {}, receive_rows
        for turn in range(n):
            sender = (receiver + turn) % n
            first = sum(wanted_nn[sender][:receiver])
            accepted[sender] = []
            for row in range(first, first + wanted_nn[sender][receiver]):
                if room:
                    accepted[sender].append(row)
                    room -= 1
        here = 0
        for sender in range(n):
            for row in accepted[sender]:
                moves.append((sender, row, receiver, here))
                here += 1
    return moves


def wanted_cases(n, seed=0):
    rng = np.random.default_rng(seed)
    ragged_nn = rng.integers(0, 5, (n, n))
    silent_nn = ragged_nn * (np.arange(n) % 2 == 1)[:, None]  # every other device sends nothing
    one_nn = np.zeros((n, n), int)
    one_nn[:, n // 2] = rng.integers(2, 4 * n, n)
    deaf_nn = ragged_nn * (np.arange(n) % 3 == 0)  # most devices receive nothing
    cases = dict(uniform=np.full((n, n), 3), ragged=ragged_nn, all_to_one=one_nn, silent=silent_nn, deaf=deaf_nn)
    return {name: case.astype(np.int32) for name, case in (cases | dict(nothing=np.zeros((n, n)))).items()}


@pytest.mark.parametrize("bounded", [False, True], ids=["exact", "bounded"])
@pytest.mark.parametrize("name", AXES)
def test_plan_rows_and_gradients(name, bounded):
    names, n = AXES[name], {"2x4": 8}.get(name, name)
    rows = 4 * n + 2  # of an operand: the longest sender, and some that nobody wants
    receive_rows = 2 * n + 1 if bounded else None
    buffer_rows = receive_rows or 4 * n * n + 3
    axis_name = names if len(names) > 1 else names[0]

    def body(wanted_n, x_AD, buffer_RD, home_AD, g_RD, g_AD):
        plan = plan_ragged(wanted_n, receive_rows, axis_name=axis_name)
        exchange = functools.partial(ragged_all_to_all, axis_name=axis_name)
        y_RD, pull = jax.vjp(lambda x, buffer: exchange(x, buffer, *plan.arguments), x_AD, buffer_RD)
        back = reverse(plan)
        z_AD, pull_back = jax.vjp(lambda y, home: exchange(y, home, *back.arguments), y_RD, home_AD)
        return plan, y_RD, pull(g_RD), z_AD, pull_back(g_AD)

    run = per_device(make_mesh(name), body, names)
    rng = np.random.default_rng(1)
    normal = lambda rows: rng.normal(size=(n, rows, D)).astype(np.float32)  # noqa: E731
    data = normal(rows), normal(buffer_rows), normal(rows), normal(buffer_rows), normal(rows)
    refused_somewhere = False
    for case, wanted_nn in wanted_cases(n).items():
        x, buffer, home, g_buffer, g_home = data
        plan, y, (dx, dbuffer), z, (dy, dhome) = run(wanted_nn, *data)
        moves = ring_plan(wanted_nn.tolist(), buffer_rows)
        accepted_nn = np.zeros((n, n), int)
        want_y, want_dx, want_dbuffer = buffer.copy(), np.zeros_like(x), g_buffer.copy()
        want_z, want_dy, want_dhome = home.copy(), np.zeros_like(y), g_home.copy()
        for sender, there, receiver, here in moves:
            accepted_nn[sender, receiver] += 1
            want_y[receiver, here] = want_z[sender, there] = x[sender, there]
            want_dx[sender, there], want_dbuffer[receiver, here] = g_buffer[receiver, here], 0
            want_dy[receiver, here], want_dhome[sender, there] = g_home[sender, there], 0
        np.testing.assert_array_equal(plan.send_sizes, accepted_nn, case)
        np.testing.assert_array_equal(plan.recv_sizes, accepted_nn.T, case)
        np.testing.assert_array_equal(plan.refused_n, wanted_nn - accepted_nn, case)
        np.testing.assert_array_equal(plan.recv_offsets, np.cumsum(accepted_nn.T, 1) - accepted_nn.T, case)
        for got, want in ((y, want_y), (dx, want_dx), (dbuffer, want_dbuffer), (z, want_z), (dy, want_dy), (dhome, want_dhome)):
            np.testing.assert_array_equal(got, want, case)
        refused_somewhere |= bool(plan.refused_n.any())
        if receive_rows is None:  # home again is the identity on every row that was sent
            sent = np.arange(rows) < wanted_nn.sum(1)[:, None]
            np.testing.assert_array_equal(z, np.where(sent[..., None], x, home), case)
    assert refused_somewhere == bounded


def test_the_example_of_jax():
    """The two devices of the documentation of `jax.lax.ragged_all_to_all`."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    run = per_device(mesh, functools.partial(ragged_all_to_all, axis_name="expert"), ("expert",))
    operand, output = np.array([[1, 2, 2], [3, 4, 0]], np.int32), np.zeros((2, 4), np.int32)
    indices = np.array([[[0, 1], [1, 2], [0, 0], [1, 1]], [[0, 1], [1, 1], [1, 2], [2, 1]]], np.int32)
    np.testing.assert_array_equal(run(operand, output, *indices.swapaxes(0, 1)), [[1, 3, 0, 0], [2, 2, 4, 0]])


def test_several_slices_a_peer_in_any_order():
    n, per_peer, rows = 4, 3, 60
    rng = np.random.default_rng(2)
    k = n * per_peer
    sizes = rng.integers(0, 4, (n, n, per_peer)) * (rng.random((n, n, per_peer)) < 0.8)  # [from, to, slice]

    def scatter(sizes_nk):
        """Offsets of slices that lie in a random order with gaps between them."""
        offsets = np.zeros_like(sizes_nk)
        for device in range(n):
            place = 0
            for index in rng.permutation(k):
                place += rng.integers(0, 3)
                offsets[device, index] = place
                place += sizes_nk[device, index]
            assert place <= rows
        return offsets

    send_sizes, recv_sizes = sizes.reshape(n, k), sizes.swapaxes(0, 1).reshape(n, k)
    input_offsets, recv_offsets = scatter(send_sizes), scatter(recv_sizes)
    output_offsets = recv_offsets.reshape(n, n, per_peer).swapaxes(0, 1).reshape(n, k)
    x, buffer, g = (rng.normal(size=(n, rows, 2, 2)).astype(np.float32) for _ in range(3))

    def body(x, buffer, g, *indices):
        y, pull = jax.vjp(lambda x, buffer: ragged_all_to_all(x, buffer, *indices, axis_name="expert"), x, buffer)
        return y, *pull(g)

    mesh = jax.make_mesh((n,), ("expert",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:n])
    indices = [array.astype(np.int32) for array in (input_offsets, send_sizes, output_offsets, recv_sizes)]
    y, dx, dbuffer = per_device(mesh, body, ("expert",))(x, buffer, g, *indices)
    want_y, want_dx, want_dbuffer = buffer.copy(), np.zeros_like(x), g.copy()
    for sender in range(n):
        for index in range(k):
            receiver = index // per_peer
            for row in range(send_sizes[sender, index]):
                there, here = input_offsets[sender, index] + row, output_offsets[sender, index] + row
                want_y[receiver, here], want_dx[sender, there] = x[sender, there], g[receiver, here]
                want_dbuffer[receiver, here] = 0
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(dx, want_dx)
    np.testing.assert_array_equal(dbuffer, want_dbuffer)


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "int8", "float8_e4m3fn"])
def test_dtypes_travel_unchanged(dtype):
    n, rows = 4, 8
    rng = np.random.default_rng(3)
    x = rng.integers(-128, 128, (n, rows, D)).astype(np.int8)
    x = x.view(jnp.float8_e4m3fn) if dtype == "float8_e4m3fn" else x.astype(dtype)  # every bit pattern, NaNs too

    def body(x_AD):
        plan = plan_ragged(jnp.full(n, 2), rows, axis_name="expert")

        def exchange(x_AD):
            return ragged_all_to_all(x_AD, jnp.zeros_like(x_AD), *plan.arguments, axis_name="expert")

        if jnp.issubdtype(x_AD.dtype, jnp.integer):
            return exchange(x_AD), x_AD  # no gradient to look at
        y_RD, pull = jax.vjp(exchange, x_AD)
        return y_RD, *pull(y_RD)

    mesh = jax.make_mesh((n,), ("expert",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:n])
    y, g = per_device(mesh, body, ("expert",))(x)
    assert y.dtype == g.dtype == x.dtype
    want = x.reshape(n, n, 2, D).swapaxes(0, 1).reshape(x.shape)
    np.testing.assert_array_equal(y.view(np.uint8), want.view(np.uint8))
    np.testing.assert_array_equal(g.view(np.uint8), x.view(np.uint8))


def test_an_operand_that_is_one_for_all_devices_gets_the_sum_of_their_gradients():
    mesh, n = make_mesh("2x4"), 4

    def body(x_AD, scale):
        plan = plan_ragged(jnp.full(n, 2), None, axis_name="expert")
        y_RD = ragged_all_to_all(x_AD, jnp.zeros((8, D)), *plan.arguments, axis_name="expert")
        return y_RD * scale[0]

    with jax.set_mesh(mesh):
        split = P(("expert_outer", "expert"))
        x_AD = jax.device_put(np.random.default_rng(4).normal(size=(8, D)).astype(np.float32), NamedSharding(mesh, P()))
        scale = jax.device_put(np.arange(1.0, 9.0, dtype=np.float32), NamedSharding(mesh, split))
        exchange = jax.shard_map(body, in_specs=(P(), split), out_specs=split)
        g_AD = jax.jit(jax.grad(lambda x: exchange(x, scale).sum()))(x_AD)
    for_peer = np.repeat([1 + 5, 2 + 6, 3 + 7, 4 + 8], 2)  # 2 rows for each, from 4 senders
    assert_close(g_AD, 4.0 * for_peer[:, None] * np.ones(D), "float32")


def abstract(mesh, shape, dtype, names):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(names)))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_result_never_passes_for_one_that_all_devices_share(platform):
    seen = []

    def body(x_AD):
        fours = (jnp.zeros(4, jnp.int32),) * 4
        for operand in (x_AD, jnp.zeros((8, D))):
            y_RD = ragged_all_to_all(operand, jnp.zeros((8, D)), *fours, axis_name="expert")
            seen.append(set(jax.typeof(y_RD).manual_axis_type.varying))
        return x_AD

    mesh, part = described_mesh(platform, platform, expert_outer=2, expert=4), ("expert_outer",)
    with jax.sharding.use_abstract_mesh(mesh):
        mapped = jax.shard_map(body, in_specs=P(part), out_specs=P(part))
        jax.eval_shape(mapped, abstract(mesh, (16, D), jnp.float32, part))
    assert seen == [{"expert_outer", "expert"}, {"expert"}]


@pytest.mark.parametrize(
    ("output", "sizes", "message"),
    [
        (jnp.zeros((4, D)), [0] * 3, "multiple of the 4 devices"),
        (jnp.zeros((4, D + 1)), [0] * 4, "one dtype and row shape"),
        (jnp.zeros((4, D), jnp.bfloat16), [0] * 4, "one dtype and row shape"),
    ],
)
def test_refusals(output, sizes, message):
    def body(x):
        return ragged_all_to_all(x, output, *(jnp.array(sizes),) * 4, axis_name="expert")

    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.shard_map(body, in_specs=P(), out_specs=P("expert")), jnp.zeros((4, D)))


def exchange_and_gradient(x_ND, sizes, *, names):
    """Rows of every device in one array, sent and brought home: what the lowering tests lower."""
    part, axis_name = P(names), names if len(names) > 1 else names[0]

    def body(x_AD, sizes_n):
        plan = plan_ragged(sizes_n, 2 * x_AD.shape[0], axis_name=axis_name)
        buffer_RD = jnp.zeros((2 * x_AD.shape[0], x_AD.shape[1]), x_AD.dtype)
        y_RD = ragged_all_to_all(x_AD, buffer_RD, *plan.arguments, axis_name=axis_name)
        return ragged_all_to_all(y_RD, jnp.zeros_like(x_AD), *reverse(plan).arguments, axis_name=axis_name)

    def loss(x_ND):
        y_ND = jax.shard_map(body, in_specs=(part, part), out_specs=part)(x_ND, sizes)
        return jnp.sum(y_ND.astype(jnp.float32) ** 2), y_ND

    if jnp.issubdtype(x_ND.dtype, jnp.integer):
        return loss(x_ND)
    return jax.value_and_grad(loss, has_aux=True)(x_ND)


@pytest.mark.parametrize("names", [("expert",), ("expert_outer", "expert")], ids=["one axis", "two axes"])
@pytest.mark.parametrize(("platform", "calls"), [("tpu", 4), ("cuda", 4), ("cpu", 0)])
def test_lowers_to_the_primitive(platform, calls, names):
    mesh = described_mesh(platform, platform, expert_outer=2, expert=4)
    n = {1: 4, 2: 8}[len(names)]
    arguments = abstract(mesh, (8 * n, 128), jnp.bfloat16, names), abstract(mesh, (n * n,), jnp.int32, names)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(functools.partial(exchange_and_gradient, names=names)).trace(*arguments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if "@ragged_all_to_all" in line]
    assert len(lines) == calls  # there and home, and the gradient of each
    groups = {1: "[[0, 1, 2, 3], [4, 5, 6, 7]]", 2: "[[0, 1, 2, 3, 4, 5, 6, 7]]"}[len(names)]
    assert all(groups in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x4", "v5e:2x4"])
def test_compiles_for_a_tpu(topology, dtype):
    devices = topologies.devices(topology)
    shape = (2, len(devices) // 2)
    mesh = jax.make_mesh(shape, ("expert_outer", "expert"), axis_types=(AxisType.Explicit,) * 2, devices=devices)
    names, n = ("expert_outer", "expert"), len(devices)
    with jax.set_mesh(mesh):
        arguments = abstract(mesh, (64 * n, 512), dtype, names), abstract(mesh, (n * n,), jnp.int32, names)
        text = jax.jit(functools.partial(exchange_and_gradient, names=names)).lower(*arguments).compile().as_text()
    assert text.count(" ragged-all-to-all(") == (2 if dtype == "int8" else 4)


def test_a_plan_reversed_twice_is_the_plan():
    plan = RaggedPlan(*jnp.arange(7 * 4, dtype=jnp.int32).reshape(7, 4))
    for field in RaggedPlan._fields[:-1]:
        np.testing.assert_array_equal(getattr(reverse(reverse(plan)), field), getattr(plan, field))
