"""The communication ledger: both readings against arithmetic and each other, and the syntax of three compilers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topology
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.analysis import hlo
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


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y','x'}", [(0, 4, 1, 5, 2, 6, 3, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", [(0, 2), (1, 3)]),
    ],
)
def test_every_syntax_of_groups(text, groups):
    instruction = hlo.Instruction("i", "f32[4]", "all-to-all", (), f", channel_id=1, {text}, dimensions={{0}}")
    assert hlo.device_groups(instruction, 8) == groups


def test_without_global_ids_the_groups_are_of_replicas():
    text = ", channel_id=1, replica_groups={{0}}, to_apply=%add"
    assert hlo.device_groups(hlo.Instruction("i", "f32[4]", "all-reduce", (), text), 4) == [(0, 1, 2, 3)]


PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=8

FileNames
1 "/f (x) -> y {"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%gather (p.0: bf16[8,128]) -> bf16[32,128] {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %ag = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, \
use_global_device_ids=true
}, execution_thread="sparsecore"

%less (i: s32[], n: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%condition (state: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %fusion = pred[] fusion(%i.1, %limit), kind=kLoop, calls=%less
}

%body (state.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state.1 = (s32[], /*index=1*/bf16[8,128]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.1), index=0
  %x.1 = bf16[8,128]{1,0} get-tuple-element(%state.1), index=1
  %start = ((bf16[8,128]{1,0}, token[]), bf16[32,128]{1,0}) call-start(%x.1), to_apply=%gather
  %done = bf16[32,128]{1,0} call-done(%start), metadata={op_name="a string
}
  %fake.1 = f32[4] all-reduce(%nothing)
" stack_frame_id=1}
  %kernel = f32[4] custom-call(%x.1), frontend_attributes={kernel_metadata={
  "note": "}",
  %fake.2 = f32[4] all-reduce(%nothing)
}}
  ROOT %next = (s32[], bf16[8,128]{1,0}) tuple(%i.2, %x.1)
}

%yes (a.1: f32[4]) -> f32[4] {
  %a.1 = f32[4]{0} parameter(0)
  ROOT %ar.1 = f32[4]{0} all-reduce(%a.1), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
use_global_device_ids=true, to_apply=%add
}

%no (a.2: f32[4]) -> f32[4] {
  %a.2 = f32[4]{0} parameter(0)
  ROOT %copy = f32[4]{0} copy(%a.2)
}

%scatter (q: f32[8,4]) -> f32[2,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%q), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, \
use_global_device_ids=true, dimensions={0}, to_apply=%add
}

ENTRY %main (x.2: bf16[8,128], y.2: f32[4], z.2: f32[8,4], c: pred[]) -> f32[4] {
  %x.2 = bf16[8,128]{1,0} parameter(0)
  %y.2 = f32[4]{0} parameter(1)
  %z.2 = f32[8,4]{1,0} parameter(2)
  %c = pred[] parameter(3)
  %two = s32[] constant(2)
  %first = s32[]{:T(128)} copy(%two)
  %init = (s32[], bf16[8,128]{1,0}) tuple(%first, %x.2)
  %while = (s32[], bf16[8,128]{1,0}) while(%init), condition=%condition, body=%body
  %async = ((f32[8,4]{1,0}), f32[2,4]{1,0}, u32[]) async-start(%z.2), calls=%scatter
  %async.1 = f32[2,4]{1,0} async-done(%async), calls=%scatter
  %ags = (f32[4]{0}, f32[8]{0}) all-gather-start(%y.2), channel_id=4, replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
dimensions={0}, use_global_device_ids=true
  %agd = f32[8]{0} all-gather-done(%ags)
  %pair = (f32[4]{0}, s32[]) all-reduce(%y.2, %two), channel_id=5, replica_groups={}, use_global_device_ids=true, to_apply=%add
  %ragged = f32[16,4] ragged-all-to-all(%z.2, %z.2, %two, %two, %two, %two), channel_id=6, replica_groups=[2,4]<=[8]
  ROOT %if = f32[4]{0} conditional(%c, %y.2, %y.2), true_computation=%yes, false_computation=%no
}
"""


def test_the_idioms_of_gpu_and_tpu_programs():
    """Loops without trip counts, asynchronous wrappers, threads, variadic operands, layouts, comments, strings over lines."""
    branch = (Branch("if#0", 1),)
    assert ledger(PROGRAM, SIZES) == [
        Entry("all-gather", ("c",), "bfloat16", 3 * 8 * 128 * 2, (5,)),  # i from 2 to 7
        Entry("reduce-scatter", ("c",), "float32", 3 * 8 * 4 * 4 // 4),
        Entry("all-gather", ("a",), "float32", 16),
        Entry("all-reduce", ("a", "c"), "float32", math.ceil(2 * 7 * 16 / 8)),
        Entry("all-reduce", ("a", "c"), "int32", math.ceil(2 * 7 * 4 / 8)),
        Entry("ragged-all-to-all", ("c",), "float32", 8 * 4 * 4, upper_bound=True),
        Entry("all-reduce", ("a",), "float32", 16, branch=branch),
    ]


ASYNC_PART = """  %ag.{0} = f32[8]{{0}} all-gather(%p.{0}), channel_id={1}, replica_groups={{}}, dimensions={{0}}, \
use_global_device_ids=true, backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  ROOT %r.{0} = f32[8]{{0}} custom-call(%ag.{0}), custom_call_target="AsyncCollective{2}"
}}
"""


def tpu_fusions(done_channel):
    """What XLA:TPU writes for an all-gather that runs beside other work, and for a reduce-scatter."""
    parts = [f"%part.{i} (p.{i}: f32[1]) -> f32[8] {{\n  %p.{i} = f32[1]{{0}} parameter(0)\n" for i in (0, 1)]
    return (
        parts[0]
        + ASYNC_PART.format(0, 6, "Start")
        + parts[1]
        + ASYNC_PART.format(1, done_channel, "Done")
        + """%all-reduce-scatter.1 (p.2: f32[8]) -> f32[1] {
  %p.2 = f32[8]{0} parameter(0)
  %ar = f32[8]{0} all-reduce(%p.2), channel_id=3, replica_groups={}, use_global_device_ids=true, to_apply=%add
  ROOT %slice = f32[1]{0} dynamic-slice(%ar, %p.2), dynamic_slice_sizes={1}
}
ENTRY %main (x: f32[1]) -> f32[1] {
  %x = f32[1]{0} parameter(0)
  %start = f32[8]{0} fusion(%x), kind=kCustom, calls=%part.0
  %end = f32[8]{0} fusion(%x), kind=kCustom, calls=%part.1
  ROOT %rs = f32[1]{0} fusion(%end), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    )


def test_the_fusions_of_the_tpu_compiler():
    gathered, scattered = ledger(tpu_fusions(done_channel=6), {"x": 8})
    assert (gathered.kind, gathered.bytes) == ("all-gather", 7 * 4)
    assert (scattered.kind, scattered.bytes) == ("reduce-scatter", 7 * 4)
    with pytest.raises(ValueError, match=r"ag\.1 is a part .* whose start is nowhere"):
        ledger(tpu_fusions(done_channel=9), {"x": 8})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", "{{0,5},{1,4},{2,6},{3,7}}", r"ags is over groups .* no axes of the mesh"),
        ("direction=LT", "direction=NE", "while is a loop .* cannot be read"),
        ("false_computation=%no", "false_computation=%add", None),
        ("calls=%scatter", "calls=%less", "rs of scatter is a collective that nothing seems to run"),
        ("ragged-all-to-all(", "collective-broadcast(", "ragged is a collective-broadcast"),
        ("ENTRY ", "", "no ENTRY"),
    ],
)
def test_what_cannot_be_counted_is_refused(old, new, message):
    text = PROGRAM.replace(old, new)
    assert text != PROGRAM
    if message is None:
        assert ledger(text, SIZES) == ledger(PROGRAM, SIZES)
        return
    with pytest.raises(ValueError, match=message):
        ledger(text, SIZES)


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
    mesh = mesh_of(topology.tpu_devices(name)[:8])
    traced = lower(every_kind, mesh, shape=(8 * 512, 512))
    scale = 512 * 512 / (ROWS * WIDTH)
    for entries in (ledger(traced.lower().compile(), mesh), ledger_of_jaxpr(traced.jaxpr, mesh)):
        assert {(e.kind, e.axes): e.bytes / scale for e in entries} == EVERY_KIND
        assert {e.loops for e in entries} == {(STEPS,)}
        assert len(entries) == len(EVERY_KIND)
