"""Bytes counted from the text of a program: by hand of programs of a few lines, and of one that JAX compiled."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.analysis.program_bytes import program_bytes, traffic

FUSIONS = """HloModule fusions

%looked_up (p0: f32[100,8], p1: s32[], p2: f32[1,8]) -> f32[1,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
  ROOT %sum = f32[1,8]{1,0} add(%row, %p2)
}

%put (p0: f32[100,8], p1: s32[], p2: f32[1,8]) -> f32[800] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %new = f32[100,8]{1,0} dynamic-update-slice(%p0, %p2, %p1, %zero)
  ROOT %flat = f32[800]{0} bitcast(%new)
}

ENTRY %main (x: f32[100,8], i: s32[]) -> f32[800] {
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %ones = f32[1,8]{1,0} constant({...})
  %a = f32[1,8]{1,0} fusion(%x, %i, %ones), kind=kLoop, calls=%looked_up
  ROOT %b = f32[800]{0} fusion(%x, %i, %a), kind=kLoop, calls=%put
}
"""

LOOP = """HloModule loop

%small (p: (f32[4,4], f32[4])) -> f32[4] {
  %p = (f32[4,4]{1,0}, f32[4]{0}) parameter(0)
  %w = f32[4,4]{1,0} get-tuple-element(%p), index=0
  %v = f32[4]{0} get-tuple-element(%p), index=1
  ROOT %d = f32[4]{0} dot(%w, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%nothing (q: (f32[4,4], f32[4])) -> f32[4] {
  %q = (f32[4,4]{1,0}, f32[4]{0}) parameter(0)
  ROOT %v2 = f32[4]{0} get-tuple-element(%q), index=1
}

%body (s: (s32[], s32[], f32[4,4], f32[4])) -> (s32[], s32[], f32[4,4], f32[4]) {
  %s = (s32[], s32[], f32[4,4]{1,0}, f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %m = f32[4,4]{1,0} get-tuple-element(%s), index=2
  %y = f32[4]{0} get-tuple-element(%s), index=3
  %pair = (f32[4,4]{1,0}, f32[4]{0}) tuple(%m, %y)
  %z = f32[4]{0} conditional(%j, %pair, %pair), branch_computations={%small, %nothing}
  ROOT %t = (s32[], s32[], f32[4,4]{1,0}, f32[4]{0}) tuple(%j, %n, %m, %z)
}

%condition (s3: (s32[], s32[], f32[4,4], f32[4])) -> pred[] {
  %s3 = (s32[], s32[], f32[4,4]{1,0}, f32[4]{0}) parameter(0)
  %j3 = s32[] get-tuple-element(%s3), index=0
  %n3 = s32[] get-tuple-element(%s3), index=1
  ROOT %less = pred[] compare(%j3, %n3), direction=LT
}

ENTRY %main (state: (s32[], s32[], f32[4,4], f32[4])) -> (s32[], s32[], f32[4,4], f32[4]) {
  %state = (s32[], s32[], f32[4,4]{1,0}, f32[4]{0}) parameter(0)
  ROOT %loop = (s32[], s32[], f32[4,4]{1,0}, f32[4]{0}) while(%state), condition=%condition, body=%body
}
"""

KERNEL = """HloModule kernel

ENTRY %main (x: bf16[6,4], w: bf16[8,4,16], g: s32[8]) -> bf16[6,16] {
  %x = bf16[6,4]{1,0} parameter(0)
  %w = bf16[8,4,16]{2,1,0} parameter(1)
  %g = s32[8]{0} parameter(2)
  %k = bf16[6,16]{1,0} custom-call(%x, %w, %g), custom_call_target="a_kernel"
  %c = (bf16[6,16]{1,0}, s8[1000]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  ROOT %r = bf16[6,16]{1,0} copy(%k)
}
"""


def test_of_what_is_looked_up_or_replaced_only_the_part_counts():
    (a, b) = traffic(FUSIONS)
    assert (a.read, a.written) == (32 + 4 + 32, 32)
    assert (b.read, b.written) == (4 + 32, 32)
    assert program_bytes(FUSIONS) == a.bytes + b.bytes == 168


def test_loops_and_branches():
    """A trip is half of a dot of 64 + 16 + 16 bytes; the condition reads two integers and writes a truth value, once more than the body."""
    assert program_bytes(LOOP, loop_trips=2.5) == 2.5 * 96 / 2 + 3.5 * 9
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"4"}}')
    assert program_bytes(known) == program_bytes(known, loop_trips=9) == 4 * 48 + 5 * 9
    with pytest.raises(ValueError, match="how often loop runs cannot be read; give loop_trips"):
        program_bytes(LOOP)


@pytest.mark.parametrize(("share", "stack"), [((8, 0.25), 256), ((16, 0.25), 1024)])
def test_of_a_stack_of_experts_a_kernel_reads_a_share(share, stack):
    kernel, product, copy = traffic(KERNEL, stack_share=share)
    assert (kernel.read, kernel.written) == (48 + stack + 32, 192)
    assert (product.read, product.written) == (96, 192)  # not the room to work in
    assert copy.bytes == 384


def test_a_product_that_was_compiled():
    text = jax.jit(lambda w, x: x @ w).lower(jnp.ones((64, 48)), jnp.ones((3, 64))).compile().as_text()
    assert program_bytes(text) == 4 * (64 * 48 + 3 * 64 + 3 * 48)
