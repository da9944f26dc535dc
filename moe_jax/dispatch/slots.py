"""Who sits in which row of a set of buffers, and the rows' way in and out: sorted rows, expert buffers, buffers to the peers.

Rows move by gathers, forward and backward. Token choice makes the list `tile(arange(T), K)`, so a token finds its K rows by
itself and nothing needs the scatter-add that a gather transposes to; other lists (expert choice) fall back on it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.ops.sort import sort_by_expert
from moe_jax.ops.varying import vary_alike
from moe_jax.routing.contract import Routing


class Slots(NamedTuple):
    """Which assignment sits in which of R rows (G buffers of C rows, or A sorted rows).

    Attributes:
      slot_A: int32 in [0, R]: the row of the assignment; R for none.
      source_R: int32 in [0, A]: the assignment in the row; A for an empty row.
      dropped: int32, assignments with a buffer to go to and no row left in it.
    """

    slot_A: jax.Array
    source_R: jax.Array
    dropped: jax.Array


@jax.named_scope("dispatch")
def claim_slots(group_A: jax.Array, num_groups: int, capacity: int, keys: tuple[jax.Array, ...] = ()) -> Slots:
    """Gives each group's `capacity` rows to its first assignments.

    Args:
      group_A: int32 in [0, G]; G wants no row.
      num_groups: G, buffers.
      capacity: C, rows a buffer.
      keys: [A] arrays; the smallest claims first, the first array counts most, ties go by the order of the list.
    """
    order_A, inverse_A, size_G = _sort(group_A, num_groups, keys)
    start_G = jnp.cumsum(size_G) - size_G
    place_A = inverse_A - start_G.at[group_A].get(mode="clip")
    has_row_A = (group_A < num_groups) & (place_A < capacity)
    slot_A = jnp.where(has_row_A, group_A * capacity + place_A, num_groups * capacity)
    place_C = jnp.arange(capacity, dtype=jnp.int32)
    source_GC = order_A.at[start_G[:, None] + place_C].get(mode="clip")
    source_GC = jnp.where(place_C < size_G[:, None], source_GC, group_A.shape[0])
    return Slots(slot_A, source_GC.reshape(-1), jnp.sum(jnp.maximum(size_G - capacity, 0), dtype=jnp.int32))


@jax.named_scope("dispatch")
def sort_slots(
    group_A: jax.Array, num_groups: int, num_rows: int | None = None, keys: tuple[jax.Array, ...] = ()
) -> tuple[Slots, jax.Array]:
    """A row for everybody: rows sorted by group, by `keys` and then list order within it, then empty rows.

    Args:
      group_A: int32 in [0, G]; G wants no row.
      num_groups: G.
      num_rows: R <= A, at least the assignments that want a row; by default A.
      keys: as in `claim_slots`.

    Returns: the slots, and int32 rows a group, [G].
    """
    num_assignments = group_A.shape[0]
    num_rows = num_rows or num_assignments
    order_A, inverse_A, size_G = _sort(group_A, num_groups, keys)
    slot_A = jnp.where(group_A < num_groups, inverse_A, num_rows)
    source_R = jnp.where(jnp.arange(num_rows) < size_G.sum(), order_A[:num_rows], num_assignments)
    return Slots(slot_A, source_R, jnp.zeros((), jnp.int32)), size_G


def _sort(group_A, num_groups, keys):
    """`sort_by_expert`, with keys that decide within a group before the order of the list does."""
    if not keys:
        return sort_by_expert(group_A, num_groups)
    index_A = jnp.arange(group_A.shape[0], dtype=jnp.int32)
    *_, order_A = jax.lax.sort((group_A, *keys, index_A), num_keys=1 + len(keys), is_stable=True)
    inverse_A = jnp.zeros_like(order_A).at[order_A].set(index_A, unique_indices=True)
    return order_A, inverse_A, jnp.bincount(group_A, length=num_groups + 1)[:-1].astype(jnp.int32)


def claim_keys(routing: Routing, priority: str) -> tuple[jax.Array, ...]:
    """Sort keys of a rule, complete enough to merge the lists of several peers, where equal keys go by peer, then by place.

    Within one list the last key, the choice, is the order of the list already: `claim_keys(...)[:-1]` is enough.

    "position": choice-major (GShard, 2006.16668, section 3.2). "probability": the largest weight first, so that the tokens
    that a router is sure of survive (batch-prioritised routing, V-MoE, 2106.05974, section 3.4); equal weights go choice-major.
    """
    num_tokens = routing.probs_TE.shape[0]
    place_A = jnp.arange(routing.expert_A.shape[0], dtype=jnp.int32)
    choice_A = place_A // num_tokens if routing.choices else jnp.zeros_like(place_A)
    if priority == "probability":
        priority_A = routing.weight_A if routing.priority_A is None else routing.priority_A
        return (-jax.lax.stop_gradient(priority_A), choice_A)
    return (choice_A,)


@jax.named_scope("dispatch")
def fill_rows(x_TD: jax.Array, routing: Routing, slots: Slots) -> jax.Array:
    """The token of each buffer row, [R, D] in x's dtype; zeros in empty rows. Gradients reach x."""
    token_R = routing.token_A.at[slots.source_R].get(mode="fill", fill_value=x_TD.shape[0])
    if routing.choices is None:
        return _take(x_TD, token_R)
    return _fill(routing.choices, *vary_alike(x_TD, token_R, slots.slot_A))


@jax.named_scope("combine")
def combine_rows(rows_RD: jax.Array, routing: Routing, slots: Slots, num_tokens: int) -> jax.Array:
    """Sums each token's rows times their weights, float32 [T, D]. Gradients reach the rows and the weights."""
    if routing.choices is None:
        answers_AD = routing.weight_A[:, None] * _take(rows_RD, slots.slot_A).astype(jnp.float32)
        return jnp.zeros((num_tokens, rows_RD.shape[-1]), jnp.float32).at[routing.token_A].add(answers_AD)
    return _combine(routing.choices, *vary_alike(rows_RD, routing.weight_A, slots.slot_A, slots.source_R))


@jax.named_scope("combine")
def sum_rows(rows_RD: jax.Array, choices: int, slots: Slots) -> jax.Array:
    """Sums each token's rows, float32 [T, D], for a list of `choices` times all tokens. Gradients reach the rows."""
    return _sum(choices, *vary_alike(rows_RD, slots.slot_A, slots.source_R))


def _take(rows_RD, index):
    """rows_RD[index], zeros where the index is R."""
    return rows_RD.at[index].get(mode="fill", fill_value=0)


def _take_choices(choices, rows_RD, slot_A):
    """float32 [T, D] answers of the first choices, then of the second, ...: on CPU many times faster than one [K, T, D]."""
    return [_take(rows_RD, slot_T).astype(jnp.float32) for slot_T in jnp.split(slot_A, choices)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fill(choices, x_TD, token_R, slot_A):
    return _take(x_TD, token_R)


def _fill_forward(choices, x_TD, token_R, slot_A):
    return _take(x_TD, token_R), slot_A


def _fill_backward(choices, slot_A, g_RD):
    return sum(_take_choices(choices, g_RD, slot_A)).astype(g_RD.dtype), None, None


_fill.defvjp(_fill_forward, _fill_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(choices, rows_RD, slot_A, source_R):
    return sum(_take_choices(choices, rows_RD, slot_A))


def _sum_forward(choices, rows_RD, slot_A, source_R):
    return _sum(choices, rows_RD, slot_A, source_R), (source_R, slot_A, rows_RD[:0])


def _sum_backward(choices, residuals, g_TD):
    source_R, slot_A, like = residuals
    token_R = jnp.where(source_R < slot_A.shape[0], source_R % g_TD.shape[0], g_TD.shape[0])
    return _take(g_TD, token_R).astype(like.dtype), None, None


_sum.defvjp(_sum_forward, _sum_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(choices, rows_RD, weight_A, slot_A, source_R):
    weights = jnp.split(weight_A[:, None], choices)
    return sum(w_T1 * y_TD for w_T1, y_TD in zip(weights, _take_choices(choices, rows_RD, slot_A), strict=True))


def _combine_forward(choices, rows_RD, weight_A, slot_A, source_R):
    return _combine(choices, rows_RD, weight_A, slot_A, source_R), (rows_RD, weight_A, slot_A, source_R)


def _combine_backward(choices, residuals, g_TD):
    rows_RD, weight_A, slot_A, source_R = residuals
    weight_R = _take(weight_A, source_R)  # 0 for an empty row, which therefore takes any token
    g_answer_RD = g_TD[source_R % g_TD.shape[0]]
    g_weight_R = jnp.sum(rows_RD.astype(jnp.float32) * g_answer_RD, axis=-1)
    return (weight_R[:, None] * g_answer_RD).astype(rows_RD.dtype), _take(g_weight_R, slot_A), None, None


_combine.defvjp(_combine_forward, _combine_backward)
