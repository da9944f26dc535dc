"""The ledger reads what three compilers write: groups of devices, loops, asynchronous pairs, fusions, strings over lines."""

import math

import pytest

from moe_jax.analysis import hlo
from moe_jax.analysis.ledger import Branch, Entry, ledger

SIZES = {"a": 2, "b": 1, "c": 4}


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
