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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_in_blocks(q_XRSN: jax.Array, k_XTN: jax.Array, v_XTN: jax.Array, sees_BST: jax.Array, window: int) -> jax.Array:
    """softmax(q k^T N^-1/2) v over what `sees_BST` shows, in q's dtype; scores, softmax and sums in float32.

    Args:
      q_XRSN: queries; X = B G counts sequences and their key/value heads, R is the query heads of each.
      k_XTN: keys; T = S.
      v_XTN: values.
      sees_BST: bool, whether token s sees token t: nothing ahead of s nor further back than the window, and something.
      window: how many tokens a token sees at most, itself included; 0 means all before it.
    """
    return _forward(q_XRSN, k_XTN, v_XTN, sees_BST, window)[0]


def _forward(q_XRSN, k_XTN, v_XTN, sees_BST, window):
    answers, log_totals = [], []
    for rows, keys in blocks(q_XRSN.shape[2], window):
        score = _scores(_flat(q_XRSN[:, :, rows]), k_XTN[:, keys], sees_BST[:, rows, keys])
        highest = jnp.max(score, axis=-1, keepdims=True)
        weight = jnp.exp(score - highest)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        answer = (
            _product("XQT,XTN->XQN", weight.astype(v_XTN.dtype), v_XTN[:, keys]) / total
        )  # divided last: on [Q, N], not [Q, T]
        answers.append(_apart(answer, q_XRSN))
        log_totals.append(_apart(highest + jnp.log(total), q_XRSN))
    y_XRSN = jnp.concatenate(answers, axis=2).astype(q_XRSN.dtype)
    return y_XRSN, (q_XRSN, k_XTN, v_XTN, sees_BST, y_XRSN, jnp.concatenate(log_totals, axis=2))


def _backward(window, residuals, g_XRSN):
    q_XRSN, k_XTN, v_XTN, sees_BST, y_XRSN, log_total_XRS1 = residuals
    dtype, scale = q_XRSN.dtype, q_XRSN.shape[-1] ** -0.5
    along_y_XRS1 = jnp.einsum("XRSN,XRSN->XRS", g_XRSN, y_XRSN, preferred_element_type=jnp.float32)[..., None]
    d_q, d_k_XNT, d_v_XNT = [], *(jnp.zeros_like(jnp.swapaxes(x, 1, 2), jnp.float32) for x in (k_XTN, v_XTN))
    for rows, keys in blocks(q_XRSN.shape[2], window):
        q, g, log_total, along_y = (_flat(array[:, :, rows]) for array in (q_XRSN, g_XRSN, log_total_XRS1, along_y_XRS1))
        weight = jnp.exp(_scores(q, k_XTN[:, keys], sees_BST[:, rows, keys]) - log_total)
        d_weight = _product("XQN,XTN->XQT", g, v_XTN[:, keys])
        d_score = (scale * weight * (d_weight - along_y)).astype(dtype)
        d_q.append(_apart(_product("XQT,XTN->XQN", d_score, k_XTN[:, keys]), q_XRSN))
        d_k_XNT = d_k_XNT.at[:, :, keys].add(_product("XQN,XQT->XNT", q, d_score))
        d_v_XNT = d_v_XNT.at[:, :, keys].add(_product("XQN,XQT->XNT", g, weight.astype(dtype)))
    d_k, d_v = (jnp.swapaxes(d, 1, 2).astype(dtype) for d in (d_k_XNT, d_v_XNT))
    return jnp.concatenate(d_q, axis=2).astype(dtype), d_k, d_v, None


attend_in_blocks.defvjp(_forward, _backward)


def _scores(q_XQN, k_XTN, sees_BCT):
    """Scores of a block's C queries of all R heads, Q = R C, in float32."""
    B, C, T = sees_BCT.shape
    X, Q = q_XQN.shape[:2]
    sees_XQT = jnp.broadcast_to(sees_BCT[:, None, None], (B, X // B, Q // C, C, T)).reshape(X, Q, T)
    score_XQT = _product("XQN,XTN->XQT", q_XQN, k_XTN) * q_XQN.shape[-1] ** -0.5
    return jnp.where(sees_XQT, score_XQT, jnp.finfo(jnp.float32).min)


def _flat(block_XRCN):
    """[X, R C, N]: XLA:CPU copies what it multiplies where there are more axes."""
    X, R, C, N = block_XRCN.shape
    return block_XRCN.reshape(X, R * C, N)


def _apart(block_XQN, q_XRSN):
    X, R = q_XRSN.shape[:2]
    return block_XQN.reshape(X, R, -1, block_XQN.shape[-1])


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
