"""Causal softmax attention in blocks of queries, in plain JAX: what lies ahead of a block, or behind its window, is never computed.

Nothing of size S x S outlives a block, forward or backward: the backward pass computes the weights anew from each row's normaliser
(FlashAttention, 2205.14135, algorithm 4). Autodiff would keep them, do twice the work for half of the scores, and have XLA:CPU copy
them to transpose them; here the smaller operand is transposed. At most `BLOCKS` blocks, unrolled.
"""

from functools import partial

import jax
import jax.numpy as jnp

BLOCKS, SMALLEST = 8, 64  # blocks at most; queries a block at least


def blocks(length: int, window: int) -> list[tuple[slice, slice]]:
    """(queries, the keys any of them may see) of each block of a sequence; `window` as in `moe_jax.ops.attention`."""
    rows = max(SMALLEST, -(-length // BLOCKS))
    cuts = [(first, min(first + rows, length)) for first in range(0, length, rows)]
    return [(slice(first, end), slice(max(first - window + 1, 0) if window else 0, end)) for first, end in cuts]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend_in_blocks(
    q_XRSN: jax.Array,
    k_XTN: jax.Array,
    v_XTM: jax.Array,
    sees_BST: jax.Array,
    sink_XR11: jax.Array | None,
    window: int,
    scale: float,
    softcap: float,
) -> jax.Array:
    """softmax(q k^T scale) v over what `sees_BST` shows, in q's dtype; scores, softmax and sums in float32.

    Args:
      q_XRSN: queries; X = B G counts sequences and their key/value heads, R is the query heads of each.
      k_XTN: keys; T = S.
      v_XTM: values, of a width of their own.
      sees_BST: bool, whether token s sees token t: nothing ahead of s nor further back than the window, and something.
      sink_XR11: float32, one more score of every row, for nothing; or None.
      window: how many tokens a token sees at most, itself included; 0 means all before it.
      scale: of the scores.
      softcap: c of c tanh(score / c), before the softmax; 0 means no cap.
    """
    return _forward(q_XRSN, k_XTN, v_XTM, sees_BST, sink_XR11, window, scale, softcap)[0]


def _forward(q_XRSN, k_XTN, v_XTM, sees_BST, sink_XR11, window, scale, softcap):
    answers, log_totals = [], []
    for rows, keys in blocks(q_XRSN.shape[2], window):
        q = q_XRSN[:, :, rows]
        score = _masked(_scores(_flat(q), k_XTN[:, keys], scale, softcap), sees_BST[:, rows, keys])
        highest, sink = jnp.max(score, axis=-1, keepdims=True), _of_rows(sink_XR11, q)
        highest = highest if sink is None else jnp.maximum(highest, sink)
        weight = jnp.exp(score - highest)
        total = jnp.sum(weight, axis=-1, keepdims=True) + (0 if sink is None else jnp.exp(sink - highest))
        answer = (
            _product("XQT,XTM->XQM", weight.astype(v_XTM.dtype), v_XTM[:, keys]) / total
        )  # divided last: on [Q, M], not [Q, T]
        answers.append(_apart(answer, q_XRSN))
        log_totals.append(_apart(highest + jnp.log(total), q_XRSN))
    y_XRSM = jnp.concatenate(answers, axis=2).astype(q_XRSN.dtype)
    return y_XRSM, (q_XRSN, k_XTN, v_XTM, sees_BST, sink_XR11, y_XRSM, jnp.concatenate(log_totals, axis=2))


def _backward(window, scale, softcap, residuals, g_XRSM):
    q_XRSN, k_XTN, v_XTM, sees_BST, sink_XR11, y_XRSM, log_total_XRS1 = residuals
    dtype = q_XRSN.dtype
    along_y_XRS1 = jnp.einsum("XRSM,XRSM->XRS", g_XRSM, y_XRSM, preferred_element_type=jnp.float32)[..., None]
    d_q, d_k_XNT, d_v_XMT = [], *(jnp.zeros_like(jnp.swapaxes(x, 1, 2), jnp.float32) for x in (k_XTN, v_XTM))
    for rows, keys in blocks(q_XRSN.shape[2], window):
        q, g, log_total, along_y = (_flat(array[:, :, rows]) for array in (q_XRSN, g_XRSM, log_total_XRS1, along_y_XRS1))
        score = _scores(q, k_XTN[:, keys], scale, softcap)
        weight = jnp.exp(_masked(score, sees_BST[:, rows, keys]) - log_total)
        d_weight = _product("XQM,XTM->XQT", g, v_XTM[:, keys])
        d_score = weight * (d_weight - along_y) * scale
        d_score = (d_score * (1 - jnp.square(score / softcap)) if softcap else d_score).astype(dtype)
        d_q.append(_apart(_product("XQT,XTN->XQN", d_score, k_XTN[:, keys]), q_XRSN))
        d_k_XNT = d_k_XNT.at[:, :, keys].add(_product("XQN,XQT->XNT", q, d_score))
        d_v_XMT = d_v_XMT.at[:, :, keys].add(_product("XQM,XQT->XMT", g, weight.astype(dtype)))
    d_k, d_v = (jnp.swapaxes(d, 1, 2).astype(dtype) for d in (d_k_XNT, d_v_XMT))
    d_sink = None
    if sink_XR11 is not None:  # its value is 0, so that its weight moves y towards -y
        d_sink = -jnp.sum(jnp.exp(sink_XR11 - log_total_XRS1) * along_y_XRS1, axis=2, keepdims=True)
    return jnp.concatenate(d_q, axis=2).astype(dtype), d_k, d_v, None, d_sink


attend_in_blocks.defvjp(_forward, _backward)


def _scores(q_XQN, k_XTN, scale, softcap):
    """Scores of a block's Q queries, of all its R heads, in float32."""
    score_XQT = _product("XQN,XTN->XQT", q_XQN, k_XTN) * scale
    return softcap * jnp.tanh(score_XQT / softcap) if softcap else score_XQT


def _masked(score_XQT, sees_BCT):
    """Scores of a block's C queries of all R heads, Q = R C, with the smallest number for what they do not see."""
    (B, C, T), (X, Q) = sees_BCT.shape, score_XQT.shape[:2]
    sees_XQT = jnp.broadcast_to(sees_BCT[:, None, None], (B, X // B, Q // C, C, T)).reshape(X, Q, T)
    return jnp.where(sees_XQT, score_XQT, jnp.finfo(jnp.float32).min)


def _of_rows(sink_XR11, q_XRCN):
    """The sink of each of a block's rows, [X, R C, 1]; None without one."""
    return None if sink_XR11 is None else _flat(jnp.broadcast_to(sink_XR11, (*q_XRCN.shape[:3], 1)))


def _flat(block_XRCN):
    """[X, R C, N]: XLA:CPU copies what it multiplies where there are more axes."""
    X, R, C, N = block_XRCN.shape
    return block_XRCN.reshape(X, R * C, N)


def _apart(block_XQN, q_XRSN):
    X, R = q_XRSN.shape[:2]
    return block_XQN.reshape(X, R, -1, block_XQN.shape[-1])


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
