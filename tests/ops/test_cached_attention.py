"""Vectors kept in rings of slots, and attention over them beside the attention that sees the whole text."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from moe_jax.ops.attention import attention
from moe_jax.ops.cached_attention import attend_to_stored
from moe_jax.ops.stored_vectors import append, decoded, encode, fill, no_vectors, slot_positions

B, S, H, G, N, M = 3, 11, 4, 2, 8, 6


@pytest.mark.parametrize("num_slots", [4, 11])
def test_slots_hold_the_last_tokens(num_slots):
    """Against a ring written token by token in NumPy."""
    for at in range(S):
        ring = np.full(num_slots, -1)
        for position in range(at + 1):
            ring[position % num_slots] = position
        found = np.asarray(slot_positions(jnp.array([at]), num_slots))[0]
        np.testing.assert_array_equal(np.where(found < 0, -1, found), ring)


@pytest.mark.parametrize(("window", "num_slots"), [(0, S), (4, 4), (4, 7)])
def test_the_last_row_of_attention(window, num_slots):
    """Prompts of different lengths are filled in, the next token is appended, and every row sees what it would in the whole text."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, S, h, n)), jnp.float32) for h, n in ((H, N), (G, N), (G, M)))
    sink_H, settings = jnp.asarray(rng.normal(size=H), jnp.float32), {"window": window, "scale": 0.3, "softcap": 1.5}
    expected = attention(q, k, v, jnp.ones((B, S), jnp.int32), sink_H, **settings)
    at_B, row_P = jnp.array([2, 10, 6]), jnp.array([2, -1, 0])
    key, value = (no_vectors((B, G, num_slots, n), jnp.float32) for n in (N, M))
    for stored in (key, value):
        assert stored.scale_BGT is None
    key, value = (
        fill(fill(stored, jnp.swapaxes(x, 1, 2), at_B, jnp.arange(B)), jnp.swapaxes(x, 1, 2)[::-1] * 0, at_B * 0, row_P * 0 - 1)
        for stored, x in ((key, k), (value, v))
    )
    last = [x[jnp.arange(B), at_B] for x in (q, k, v)]
    key, value = append(key, last[1], at_B), append(value, last[2], at_B)
    assert_close(attend_to_stored([last[0]], [key], value, at_B, sink_H, **settings), expected[jnp.arange(B), at_B])
    halves = [StoredHalf(key, slice(0, 5)), StoredHalf(key, slice(5, N))]
    queries = [last[0][..., :5], last[0][..., 5:]]
    assert_close(attend_to_stored(queries, halves, value, at_B, sink_H, **settings), expected[jnp.arange(B), at_B])


def StoredHalf(stored, widths):
    return stored.replace(values_BGTN=stored.values_BGTN[..., widths])


def test_int8_rounds_to_the_nearest_step_of_each_vector():
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(2, 3, 5, 8)) * 10.0 ** rng.integers(-3, 3, (2, 3, 5, 1))).astype(np.float32)
    x[0, 0, 0] = 0
    stored = encode(jnp.asarray(x), jnp.int8)
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert stored.values_BGTN.dtype == jnp.int8
    assert np.all(np.abs(np.asarray(decoded(stored, jnp.float32)) - x) <= step * 0.501)
    np.testing.assert_array_equal(np.abs(np.asarray(stored.values_BGTN)).max(-1)[np.abs(x).max(-1) > 0], 127)


def test_int8_attention_is_attention_over_what_is_decoded():
    rng = np.random.default_rng(2)
    q_BHN, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, H, N), (B, G, S, N), (B, G, S, M)))
    at_B = jnp.array([2, 10, 6])
    int8 = [encode(x, jnp.int8) for x in (k, v)]
    plain = [encode(decoded(stored, jnp.float32), jnp.float32) for stored in int8]
    answers = [attend_to_stored([q_BHN], [key], value, at_B, scale=0.5) for key, value in (int8, plain)]
    assert_close(*answers)


@pytest.mark.parametrize("rows", [1, B])
def test_writes_go_in_place(rows):
    """A donated cache is neither copied nor read whole by a step of decoding."""
    stored, at_B = no_vectors((rows, G, 64, N), jnp.float32), jnp.arange(rows) + 5
    step = jax.jit(append, donate_argnums=0).lower(stored, jnp.ones((rows, G, N)), at_B).compile()
    assert step.memory_analysis().temp_size_in_bytes < stored.values_BGTN.nbytes / 4
    assert step.memory_analysis().alias_size_in_bytes == stored.values_BGTN.nbytes
    assert not re.search(r"\[(\d+,)*64,.* copy\(", step.as_text())
    written = np.asarray(step(stored, jnp.ones((rows, G, N)), at_B).values_BGTN).sum(axis=(1, 3))
    np.testing.assert_array_equal(written, G * N * (np.arange(64) == np.asarray(at_B)[:, None]))
