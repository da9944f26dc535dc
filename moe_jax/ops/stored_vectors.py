"""What attention keeps of a text: a vector for each of its tokens in a ring of slots, in any dtype down to int8.

The token at position p has the slot p modulo the number of slots, so that a ring as long as the window keeps what the window shows. The
position in a slot follows from how far the text has come (`slot_positions`): nothing need be cleared when a row changes its text.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

LARGEST_INT8 = 127
ONE_TURN = "one_turn"  # what a loop that turns once is called, for those who count


@struct.dataclass
class StoredVectors:
    """Vectors of B texts and G heads (1: the same for all heads) in T slots.

    Attributes:
      values_BGTN: float, or int8 with
      scale_BGT: float32, what a slot's integers are multiplied by; None with floats.
    """

    values_BGTN: jax.Array
    scale_BGT: jax.Array | None


def no_vectors(shape: tuple[int, int, int, int], dtype: DTypeLike) -> StoredVectors:
    """Empty slots, `shape` [B, G, T, N]."""
    scale_BGT = jnp.zeros(shape[:3], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
    return StoredVectors(jnp.zeros(shape, dtype), scale_BGT)


def slot_positions(at_B: jax.Array, num_slots: int) -> jax.Array:
    """The position in each slot when the text's last token is at `at_B`, int32 [B, T]; less than 0 where there is none yet."""
    slot_T = jnp.arange(num_slots, dtype=jnp.int32)
    return at_B[:, None] - (at_B[:, None] - slot_T) % num_slots


def append(stored: StoredVectors, x_BGN: jax.Array, at_B: jax.Array) -> StoredVectors:
    """Puts the vector of each text's token at `at_B` into its slot."""
    slot_B = at_B % stored.values_BGTN.shape[2]
    new = encode(x_BGN, stored.values_BGTN.dtype)
    return jax.tree.map(partial(_write, slot_B), stored, new)


def _write(slot_B, kept, one):
    if len(slot_B) > 1:
        return kept.at[jnp.arange(len(slot_B)), :, slot_B].set(one, mode="promise_in_bounds", unique_indices=True)
    # A scatter of one row becomes an update that XLA:CPU repeats for each reader, with copies of the whole buffer; a loop of one turn
    # (which the compiler must not know) updates in place.
    turns = (slot_B[0] >= 0).astype(jnp.int32)
    update = partial(jax.lax.dynamic_update_slice_in_dim, update=one[:, :, None], start_index=slot_B[0], axis=2)
    with jax.named_scope(ONE_TURN):
        return jax.lax.fori_loop(0, turns, lambda _, kept: update(kept), kept)


def fill(stored: StoredVectors, x_PGSN: jax.Array, length_P: jax.Array, row_P: jax.Array) -> StoredVectors:
    """Puts the first `length_P` of S tokens of P texts into the rows `row_P`; a row that is not in [0, B) is left out."""
    num_rows, _, T, _ = stored.values_BGTN.shape
    row_P = jnp.where(row_P < 0, num_rows, row_P)  # less than 0 would count from the end
    if x_PGSN.shape[2] > T:
        position_PT = jnp.maximum(slot_positions(length_P - 1, T), 0)
        x_PGSN = jnp.take_along_axis(x_PGSN, position_PT[:, None, :, None], axis=2)
    num_slots, new = x_PGSN.shape[2], encode(x_PGSN, stored.values_BGTN.dtype)
    return jax.tree.map(lambda kept, many: kept.at[row_P, :, :num_slots].set(many, mode="drop"), stored, new)


def encode(x: jax.Array, dtype: DTypeLike) -> StoredVectors:
    """The last axis as vectors in `dtype`; int8 rounds to the nearest 127th of the vector's largest size."""
    if jnp.dtype(dtype) != jnp.int8:
        return StoredVectors(x.astype(dtype), None)
    x32 = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x32), axis=-1) / LARGEST_INT8
    return StoredVectors(jnp.round(x32 / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale)


def decoded(stored: StoredVectors, dtype: DTypeLike) -> jax.Array:
    """The vectors as numbers, [B, G, T, N]."""
    if stored.scale_BGT is None:
        return stored.values_BGTN.astype(dtype)
    return (stored.values_BGTN * stored.scale_BGT[..., None]).astype(dtype)


def dot_queries(q_BGRN: jax.Array, stored: StoredVectors) -> jax.Array:
    """Queries times stored keys, float32 [B, G, R, T]; R query heads to each of G."""
    keys_BGTN = stored.values_BGTN.astype(q_BGRN.dtype)
    score_BGRT = jnp.einsum("BGRN,BGTN->BGRT", q_BGRN, keys_BGTN, preferred_element_type=jnp.float32)
    return score_BGRT if stored.scale_BGT is None else score_BGRT * stored.scale_BGT[:, :, None]


def weigh(weight_BGRT: jax.Array, stored: StoredVectors, dtype: DTypeLike) -> jax.Array:
    """Sums of stored values by float32 weights, float32 [B, G, R, N]; the factors are rounded to `dtype`."""
    if stored.scale_BGT is not None:
        weight_BGRT = weight_BGRT * stored.scale_BGT[:, :, None]
    values_BGTN = stored.values_BGTN.astype(dtype)
    return jnp.einsum("BGRT,BGTN->BGRN", weight_BGRT.astype(dtype), values_BGTN, preferred_element_type=jnp.float32)
