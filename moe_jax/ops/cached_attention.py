"""Attention of one token of each text to all that its text has kept: one step of decoding."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax.ops.stored_vectors import StoredVectors, dot_queries, slot_positions, weigh


def attend_to_stored(
    queries: Sequence[jax.Array],
    keys: Sequence[StoredVectors],
    values: StoredVectors,
    at_B: jax.Array,
    sink_H: jax.Array | None = None,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """Softmax attention as `moe_jax.ops.attention` of the token at `at_B`, which is stored already; scores and softmax in float32.

    Args:
      queries: arrays [B, H, N], each for one of `keys`; their products are added up (a key in parts that are stored apart).
      keys: of G heads; H is a multiple of G, and query head h reads the head `h // (H / G)`.
      values: of the same G heads and slots.
      at_B: int32, the token's position in its text.
      sink_H, window, scale, softcap: as there, but that the scale is given.

    Returns: [B, H, M] in the queries' dtype.
    """
    (B, H, _), (_, G, T, _) = queries[0].shape, values.values_BGTN.shape
    dtype = queries[0].dtype
    grouped = [q_BHN.reshape(B, G, H // G, q_BHN.shape[-1]) for q_BHN in queries]
    score_BGRT = scale * sum(dot_queries(q_BGRN, key) for q_BGRN, key in zip(grouped, keys, strict=True))
    score_BGRT = softcap * jnp.tanh(score_BGRT / softcap) if softcap else score_BGRT
    position_BT = slot_positions(at_B, T)
    sees_BT = (position_BT >= 0) & (position_BT > at_B[:, None] - window) if window else position_BT >= 0
    score_BGRT = jnp.where(sees_BT[:, None, None], score_BGRT, -jnp.inf)
    highest_BGR1 = jnp.max(score_BGRT, axis=-1, keepdims=True)
    sink_GR1 = None if sink_H is None else sink_H.astype(jnp.float32).reshape(G, H // G, 1)
    highest_BGR1 = highest_BGR1 if sink_GR1 is None else jnp.maximum(highest_BGR1, sink_GR1)
    weight_BGRT = jnp.exp(score_BGRT - highest_BGR1)
    total_BGR1 = jnp.sum(weight_BGRT, axis=-1, keepdims=True) + (0 if sink_GR1 is None else jnp.exp(sink_GR1 - highest_BGR1))
    return (weigh(weight_BGRT, values, dtype) / total_BGR1).astype(dtype).reshape(B, H, -1)
