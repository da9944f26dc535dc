"""Feed-forward networks over groups of rows, one network a group: on CPU as one fused loop, elsewhere as grouped products."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from moe_jax.ops.grouped_matmul import choose_backend, grouped_matmul
from moe_jax.ops.grouped_mlp_cpu import grouped_mlp_cpu
from moe_jax.ops.varying import vary_alike


def grouped_mlp(
    x_AD: jax.Array,
    w_in: Sequence[jax.Array],
    w_out_EFD: jax.Array,
    group_sizes_E: jax.Array,
    activate: Callable[..., jax.Array],
    backend: str = "auto",
    biases: Sequence[jax.Array] = (),
) -> jax.Array:
    """`activate(x w_in[0], x w_in[1], ...) w_out` for the rows of each group with that group's matrices, and maybe biases.

    Args:
      x_AD: float32 or bfloat16; the first `group_sizes_E[0]` rows belong to expert 0, the next to expert 1, ...
      w_in: matrices [E, D, F] of x's dtype, in the order of the activation's arguments.
      w_out_EFD: of x's dtype.
      group_sizes_E: int32, any sizes from 0, with a sum of at most A.
      activate: from as many arrays as `w_in` has to one of the same shape, element by element; 0 for zeros.
      backend: of `grouped_matmul`. "cpu" is the fused loop, any other its products one after another.
      biases: none, or one of each product, of x's dtype: [E, F] of each of `w_in`, then [E, D].

    Returns:
      [A, D] in x's dtype. Rows past the sum of the sizes are zero, and so is their gradient, as is that of an empty group's matrices
      and biases.

    Raises:
      ConfigError: as `grouped_matmul` does.
      ValueError: shapes or dtypes that do not fit.
    """
    _check(x_AD, w_in, w_out_EFD, group_sizes_E, biases)
    if choose_backend(backend, x_AD.dtype) == "cpu":
        x_AD, w_out_EFD, group_sizes_E, *others = vary_alike(x_AD, w_out_EFD, group_sizes_E, *w_in, *biases)
        w_in, biases = tuple(others[: len(w_in)]), tuple(others[len(w_in) :])
        return grouped_mlp_cpu(activate, x_AD, w_in, w_out_EFD, group_sizes_E, biases)
    own_AE = _one_hot(group_sizes_E, x_AD) if biases else None

    def multiply(x_AX, w, bias):
        y = grouped_matmul(x_AX, w, group_sizes_E, backend)
        return y if bias is None else y + jnp.einsum("AE,EF->AF", own_AE, bias, precision=jax.lax.Precision.HIGHEST)

    *b_in, b_out_ED = biases or (None,) * (len(w_in) + 1)
    h_AF = activate(*(multiply(x_AD, w_EDF, b_EF) for w_EDF, b_EF in zip(w_in, b_in, strict=True)))
    return multiply(h_AF, w_out_EFD, b_out_ED)


def _one_hot(group_sizes_E, x_AD):
    """Whose row it is, [A, E] in x's dtype, 0 past the groups: with it the biases' gradient is a product, not a scatter-add."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_A1 = jnp.arange(x_AD.shape[0], dtype=jnp.int32)[:, None]
    return ((row_A1 >= ends_E - group_sizes_E) & (row_A1 < ends_E)).astype(x_AD.dtype)


def _check(x_AD, w_in, w_out_EFD, group_sizes_E, biases):
    E, F, D = w_out_EFD.shape
    if x_AD.shape[1:] != (D,) or group_sizes_E.shape != (E,) or any(w.shape != (E, D, F) for w in w_in):
        raise ValueError(
            f"grouped_mlp takes x [A, D], w_in [E, D, F], w_out [E, F, D] and group_sizes [E], and was given {x_AD.shape},"
            f" {[w.shape for w in w_in]}, {w_out_EFD.shape} and {group_sizes_E.shape}; make D, E and F agree."
        )
    if biases and [b.shape for b in biases] != [(E, F)] * len(w_in) + [(E, D)]:
        raise ValueError(
            f"grouped_mlp takes no biases or one [E, F] of each of w_in and one [E, D], and was given {[b.shape for b in biases]} with"
            f" E = {E}, F = {F}, D = {D} and {len(w_in)} w_in; make them agree."
        )
    if any(w.dtype != x_AD.dtype for w in (*w_in, w_out_EFD, *biases)):
        dtypes = ", ".join(w.dtype.name for w in (*w_in, w_out_EFD, *biases))
        raise ValueError(f"grouped_mlp was given x in {x_AD.dtype} and weights in {dtypes}; cast them to one dtype.")
