"""The communication ledger: both readings against arithmetic and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topology
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.analysis.jaxpr_ledger import ledger_of_jaxpr
from moe_jax.analysis.ledger import Branch, Entry, count, ledger, per_layer, total_bytes

SIZES = {"a": 2, "b": 1, "c": 4}
ALL = ("a", "b", "c")
STEPS = 5
ROWS, WIDTH = 16, 128  # of one device


def mesh_of(devices):
    return jax.sharding.Mesh(np.array(devices).reshape(*SIZES.values()), ALL, axis_types=(AxisType.Explicit,) * 3)


def every_kind(x_RD):
    """Each collective once in a scan of five steps, and an all-reduce in one branch of a conditional."""

    def step(carry_RD, _):
        def narrow(x):
            return jax.lax.psum(x, ("a", "c"))[:, :1] + x

        gathered = jax.lax.all_gather(carry_RD, "c", tiled=True)
        total = jax.lax.psum_scatter(jnp.sin(gathered), "c", tiled=True)
        total += jax.lax.psum(jnp.cos(carry_RD), "a")
        total += jax.lax.all_to_all(carry_RD, ALL, 0, 0, tiled=True)
        total += jax.lax.ppermute(carry_RD, "a", [(0, 1), (1, 0)])
        total += jax.lax.cond(jnp.sum(carry_RD) > 0, narrow, jnp.sin, carry_RD)
        return total + jax.lax.psum(carry_RD, "b"), None  # over one device: nothing

    return jax.lax.scan(step, x_RD, None, length=STEPS)[0]


OPERAND = 4 * ROWS * WIDTH
EVERY_KIND = {  # bytes of one execution, n = 2 over a, 4 over c
    ("all-gather", ("c",)): 3 * OPERAND,
    ("reduce-scatter", ("c",)): 3 * 4 * OPERAND // 4,
    ("all-reduce", ("a",)): 2 * OPERAND // 2,
    ("all-to-all", ("a", "c")): 7 * OPERAND // 8,
    ("collective-permute", ("a",)): OPERAND,
    ("all-reduce", ("a", "c")): 2 * 7 * OPERAND // 8,
}


def lower(function, mesh, dtype="float32", shape=(8 * ROWS, WIDTH)):
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(ALL)))
        return jax.jit(jax.shard_map(function, in_specs=P(ALL), out_specs=P(ALL))).trace(x)


def check_every_kind(entries, itemsize=4):
    assert {(e.kind, e.axes): e.bytes for e in entries} == {key: size * itemsize // 4 for key, size in EVERY_KIND.items()}
    assert {e.loops for e in entries} == {(STEPS,)}
    assert {(e.kind, e.axes) for e in entries if e.branch} == {("all-reduce", ("a", "c"))}
    assert [e.branch[0].index for e in entries if e.branch] == [1]
    assert len(entries) == len(EVERY_KIND)


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "devices reversed"])
def test_every_kind_is_counted_in_the_program_and_in_the_jaxpr(order):
    mesh = mesh_of(jax.devices()[::order])
    traced = lower(every_kind, mesh)
    compiled = ledger(traced.lower().compile(), mesh)
    check_every_kind(compiled)
    check_every_kind(ledger_of_jaxpr(traced.jaxpr, mesh))
    assert total_bytes(compiled) == STEPS * sum(EVERY_KIND.values())
    assert total_bytes(compiled, branch=0) == STEPS * (sum(EVERY_KIND.values()) - EVERY_KIND["all-reduce", ("a", "c")])
    assert all("shard_map" in e.name and "while" in e.name for e in compiled)


def test_the_cpu_compiler_doubles_bfloat16_and_the_jaxpr_tells():
    mesh = mesh_of(jax.devices())
    traced = lower(every_kind, mesh, "bfloat16")
    asked, sent = ledger_of_jaxpr(traced.jaxpr, mesh), ledger(traced.lower().compile(), mesh)
    check_every_kind(asked, itemsize=2)
    assert {e.dtype for e in asked} == {"bfloat16"}
    check_every_kind(sent, itemsize=4)
    assert {e.dtype for e in sent} == {"float32"}


def test_the_partitioner_s_collectives_are_in_the_program_only():
    mesh = mesh_of(jax.devices())

    def loss(w_DF, x_TD):
        return jnp.sum((x_TD @ jax.sharding.reshard(w_DF, P(None, None))) ** 2)

    with jax.set_mesh(mesh):
        w_DF = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=NamedSharding(mesh, P("a", None)))
        x_TD = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P(("a", "c"), None)))
        traced = jax.jit(jax.grad(loss)).trace(w_DF, x_TD)
        entries = ledger(traced.lower().compile(), mesh)
    assert ledger_of_jaxpr(traced.jaxpr, mesh) == []
    found = {(e.kind, e.axes): e.bytes for e in entries}
    assert found["all-gather", ("a",)] == 4 * 16 * 8
    assert any(kind in ("all-reduce", "reduce-scatter") and "c" in axes for kind, axes in found)


def test_totals_take_the_dearest_branch_of_each_conditional():
    def entry(size, *branch):
        return Entry("all-reduce", ("a",), "float32", size, (2,), branch=branch)

    one, other = (lambda i: Branch("one", i)), (lambda i: Branch("other", i))
    entries = [entry(1), entry(10, one(0)), entry(20, one(1)), entry(300, one(1), other(0)), entry(500, one(0), other(1))]
    assert total_bytes(entries) == 2 * (1 + max(10 + 500, 20 + 300))
    assert total_bytes(entries, branch=0) == 2 * (1 + 10)
    assert total_bytes(entries, branch=1) == 2 * (1 + 20)


def test_a_layer_is_one_iteration_of_the_loop_over_layers():
    entries = [Entry("all-reduce", ("a",), "float32", 8, loops) for loops in [(), (3,), (4, 3), (3, 5), (4,)]]
    assert [e.loops for e in per_layer(entries, 3)] == [(), (), (5,)]
    assert total_bytes(per_layer(entries, 3)) == 8 * (1 + 1 + 5)
    with pytest.raises(ValueError, match="num_layers = 6"):
        per_layer(entries, 6)


def test_a_jaxpr_is_read_through_checkpoints_and_custom_gradients():
    @jax.custom_vjp
    def double(x):
        return jax.lax.psum(x, "a") + x

    double.defvjp(lambda x: (double(x), None), lambda _, g: (jax.lax.all_gather(g, "c", tiled=True)[:ROWS],))

    @jax.checkpoint
    def block(x):
        return jnp.sin(double(jnp.sin(x)))

    def forward_and_backward(x):
        y, back = jax.vjp(block, x)
        return back(y)[0]

    mesh = mesh_of(jax.devices())
    counts = count(ledger_of_jaxpr(lower(forward_and_backward, mesh).jaxpr, mesh))
    assert counts == {("all-reduce", ("a",)): 2, ("all-gather", ("c",)): 1}  # the forward pass is done twice
    assert count(ledger_of_jaxpr(lower(double, mesh).jaxpr, mesh)) == {("all-reduce", ("a",)): 1}


def test_a_jaxpr_s_loop_without_a_count_is_refused():
    def loop(x):
        body = lambda x: jax.lax.pcast(jax.lax.psum(x, "a"), "a", to="varying")  # noqa: E731
        return jax.lax.while_loop(lambda x: jnp.sum(jax.lax.psum(x, ALL)) < 9, body, x)

    def quiet(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, jnp.sin, x)

    mesh = mesh_of(jax.devices())
    with pytest.raises(ValueError, match="does not say how often"):
        ledger_of_jaxpr(lower(loop, mesh).jaxpr, mesh)
    assert ledger_of_jaxpr(lower(quiet, mesh).jaxpr, mesh) == []


def test_the_ragged_exchange_is_a_bound():
    mesh = jax.sharding.AbstractMesh((8,), ("c",), axis_types=(AxisType.Explicit,))

    def send(x_RD):
        sizes = jax.lax.pcast(jnp.ones(8, jnp.int32), "c", to="varying")
        return jax.lax.ragged_all_to_all(x_RD, jnp.zeros_like(x_RD), sizes, sizes, sizes, sizes, axis_name="c")

    with jax.sharding.use_abstract_mesh(mesh):
        x_RD = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P("c")))
        jaxpr = jax.jit(jax.shard_map(send, in_specs=P("c"), out_specs=P("c"))).trace(x_RD).jaxpr
    (entry,) = ledger_of_jaxpr(jaxpr, mesh)
    assert (entry.kind, entry.bytes, entry.upper_bound) == ("ragged-all-to-all", OPERAND, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2", "tpu7x:2x2x1"])
def test_programs_for_tpus(name):
    """Three habits of XLA:TPU: synchronous and fused collectives, collectives on another thread, loops without trip counts."""
    mesh = mesh_of(topology.devices(name)[:8])
    traced = lower(every_kind, mesh, shape=(8 * 512, 512))
    scale = 512 * 512 / (ROWS * WIDTH)
    for entries in (ledger(traced.lower().compile(), mesh), ledger_of_jaxpr(traced.jaxpr, mesh)):
        assert {(e.kind, e.axes): e.bytes / scale for e in entries} == EVERY_KIND
        assert {e.loops for e in entries} == {(STEPS,)}
        assert len(entries) == len(EVERY_KIND)
