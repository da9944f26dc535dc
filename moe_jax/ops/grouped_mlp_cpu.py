"""The experts' whole feed-forward network in one loop over blocks of rows, forward, and one backward: plain JAX, fast on CPU.

Beside three calls of `grouped_matmul_cpu`, a block's rows are read once for gate and up, whose product is one; the activation is
applied, and undone, while the block is in cache; and the backward pass makes every gradient of an expert from one read of its
weights. The pre-activations are kept for it, [A, 2F], and nothing else but the arguments.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.ops.grouped_matmul_cpu import for_each_block
from moe_jax.ops.varying import vary_over, varying_axes

Weights = tuple[jax.Array, ...]
_ROWS_BY_WEIGHT, _ROWS_BY_WEIGHT_T, _COLUMNS = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_mlp_cpu(
    activate: Callable[..., jax.Array],
    x_AD: jax.Array,
    w_in: Weights,
    w_out_EFD: jax.Array,
    group_sizes_E: jax.Array,
    biases: Weights = (),
) -> jax.Array:
    """`activate(x w_in[0], x w_in[1], ...) w_out`, [A, D] in x's dtype, sums in float32; rows past the groups are zero.

    `biases` are none, or [E, F] of each of `w_in`, then [E, D].

    The arguments must vary over the same mesh axes (`moe_jax.ops.varying.vary_alike`). Use `moe_jax.ops.grouped_mlp`.
    """
    return _run(activate, x_AD, w_in, w_out_EFD, group_sizes_E, biases, keep=False)[0]


def _forward(activate, x_AD, w_in, w_out_EFD, group_sizes_E, biases):
    y_AD, pre_AF = _run(activate, x_AD, w_in, w_out_EFD, group_sizes_E, biases, keep=True)
    return y_AD, (x_AD, w_in, w_out_EFD, group_sizes_E, biases, pre_AF)


def _run(activate, x_AD, w_in, w_out_EFD, group_sizes_E, biases, keep):
    """The answers, and with `keep` the pre-activations side by side, [A, len(w_in) * F] in x's dtype."""
    ends_E = jnp.cumsum(group_sizes_E)
    num_rows, dtype = x_AD.shape[0], x_AD.dtype

    def expert(e, carry):
        w_in_DF, w_out_FD = _of_expert(w_in, e), lax.dynamic_index_in_dim(w_out_EFD, e, keepdims=False)
        b_in_F, b_out_D = (_of_expert(biases[:-1], e), _of_expert(biases[-1:], e)) if biases else (None, None)

        def block(carry, rows, at, own_R1):
            pre_RF = _dot(lax.dynamic_slice_in_dim(x_AD, at, rows), w_in_DF, _ROWS_BY_WEIGHT, b_in_F)
            h_RF = activate(*jnp.split(pre_RF.astype(dtype), len(w_in), axis=1))
            written = (_dot(h_RF, w_out_FD, _ROWS_BY_WEIGHT, b_out_D), pre_RF)[: len(carry)]
            return tuple(_write(to, value, at, own_R1) for to, value in zip(carry, written, strict=True))

        return for_each_block(block, carry, ends_E[e] - group_sizes_E[e], ends_E[e], num_rows, len(group_sizes_E))

    widths = (x_AD.shape[1], len(w_in) * w_out_EFD.shape[1])[: 1 + keep]
    # Carries are float32 whatever the dtype: XLA:CPU converts a whole bfloat16 buffer back and forth at every update.
    carry = _zeros([(num_rows, width) for width in widths], x_AD, *w_in, w_out_EFD, group_sizes_E, *biases)
    y_AD, *pre = lax.fori_loop(0, len(group_sizes_E), expert, carry)
    return y_AD.astype(dtype), pre[0].astype(dtype) if keep else None


def _backward(activate, residuals, g_AD):
    x_AD, w_in, w_out_EFD, group_sizes_E, biases, pre_AF = residuals
    n = len(w_in)
    ends_E = jnp.cumsum(group_sizes_E)
    num_rows, dtype = x_AD.shape[0], x_AD.dtype

    def expert(e, carry):
        w_in_DF, w_out_FD = _of_expert(w_in, e), lax.dynamic_index_in_dim(w_out_EFD, e, keepdims=False)

        def block(carry, rows, at, own_R1):
            dx_AD, dw_out_EFD, dw_in, db = carry
            x_RD, g_RD, pre_RF = (lax.dynamic_slice_in_dim(array, at, rows) for array in (x_AD, g_AD, pre_AF))
            if own_R1 is not None:  # with g = 0 other rows' gradients are 0; what lies in x past the end may be anything
                x_RD, g_RD = jnp.where(own_R1, x_RD, 0), jnp.where(own_R1, g_RD, 0)
            h_RF, pullback = jax.vjp(activate, *jnp.split(pre_RF, n, axis=1))
            dh_RF = _dot(g_RD, w_out_FD, _ROWS_BY_WEIGHT_T).astype(dtype)
            dpre_RF = jnp.concatenate(pullback(dh_RF), axis=1)
            dx_AD = _write(dx_AD, _dot(dpre_RF, w_in_DF, _ROWS_BY_WEIGHT_T), at, own_R1)
            dw_in_DF = jnp.split(_dot(x_RD, dpre_RF, _COLUMNS), n, axis=1)
            of_biases = (*jnp.split(dpre_RF, n, axis=1), g_RD) if db else ()
            db_F = [jnp.sum(g, axis=0, dtype=jnp.float32) for g in of_biases]
            add = partial(_add, e=e, is_first=own_R1 is not None)  # the masked block comes first
            dw_out_EFD = add(dw_out_EFD, _dot(h_RF, g_RD, _COLUMNS))
            return dx_AD, dw_out_EFD, tuple(map(add, dw_in, dw_in_DF)), tuple(map(add, db, db_F))

        return for_each_block(block, carry, ends_E[e] - group_sizes_E[e], ends_E[e], num_rows, len(group_sizes_E))

    shapes = [array.shape for array in (x_AD, w_out_EFD, *w_in, *biases)]
    dx_AD, dw_out_EFD, *rest = _zeros(shapes, x_AD, g_AD, *w_in, w_out_EFD, group_sizes_E, *biases)
    carry = dx_AD, dw_out_EFD, tuple(rest[:n]), tuple(rest[n:])
    dx_AD, dw_out_EFD, dw_in, db = jax.tree.map(lambda d: d.astype(dtype), lax.fori_loop(0, len(group_sizes_E), expert, carry))
    return dx_AD, dw_in, dw_out_EFD, None, db


grouped_mlp_cpu.defvjp(_forward, _backward)


def _dot(a, b, dims, bias=None):
    product = lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    return product if bias is None else product + bias


def _of_expert(arrays, e):
    """The expert's matrices [D, F] or biases [F] side by side: [D, len(arrays) * F] or [len(arrays) * F]."""
    return jnp.concatenate([lax.dynamic_index_in_dim(array, e, keepdims=False) for array in arrays], axis=-1)


def _write(to_AX, value_RX, at, own_R1):
    """Puts the block's own rows into the buffer; rows of other experts keep what they have."""
    if own_R1 is not None:
        value_RX = jnp.where(own_R1, value_RX, lax.dynamic_slice_in_dim(to_AX, at, value_RX.shape[0]))
    return lax.dynamic_update_slice_in_dim(to_AX, value_RX, at, axis=0)


def _add(to_EDF, dw_DF, e, is_first):
    """Adds to the expert's gradient, or starts it: then what is there need not be read."""
    dw_DF = dw_DF if is_first else lax.dynamic_index_in_dim(to_EDF, e, keepdims=False) + dw_DF
    return lax.dynamic_update_index_in_dim(to_EDF, dw_DF, e, axis=0)


def _zeros(shapes, *arguments):
    axes = varying_axes(*arguments)
    return tuple(vary_over(jnp.zeros(shape, jnp.float32), axes) for shape in shapes)
