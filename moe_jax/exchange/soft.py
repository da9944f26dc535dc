"""Experts on mixes of tokens (Soft MoE, 2308.00951, algorithm 1): dense weights, einsums, and slots that travel to their expert."""

import math

import jax
import jax.numpy as jnp

from moe_jax.dispatch.contract import ExpertFn, Stats, make_stats
from moe_jax.mesh import axis_size
from moe_jax.routing.contract import SoftRouting

_FULL = jax.lax.Precision.HIGHEST


def run_soft(x_BSD: jax.Array, routing: SoftRouting, expert_fn: ExpertFn, axes: tuple[str, ...]) -> tuple[jax.Array, Stats]:
    """Fills the slots of every expert, runs the experts, mixes the answers: y_BSD float32, and counts. Nothing is ever dropped.

    Args:
      x_BSD: this device's sequences, in the compute dtype.
      routing: dense weights, P = E * slots.
      expert_fn: this device's E / n experts.
      axes: the n devices of the expert axes; () for none.
    """
    B, _, D = x_BSD.shape
    E = routing.num_experts
    n = math.prod(map(axis_size, axes))
    with jax.named_scope("dispatch"):
        x32_BSD = x_BSD.astype(jnp.float32)
        x_BPD = jnp.einsum("BSP,BSD->BPD", routing.dispatch_BSP, x32_BSD, precision=_FULL).astype(x_BSD.dtype)
    x_ECD = x_BPD.reshape(B, E, -1, D).swapaxes(0, 1).reshape(E, -1, D)
    answer_ECD = _home(expert_fn(_out(x_ECD, axes)), axes)
    answer_BPD = answer_ECD.reshape(E, B, -1, D).swapaxes(0, 1).reshape(B, -1, D).astype(jnp.float32)
    with jax.named_scope("combine"):
        y_BSD = jnp.einsum("BSP,BPD->BSD", routing.combine_BSP, answer_BPD, precision=_FULL)
    sent = 2 * x_BPD.size * x_BPD.dtype.itemsize * (n - 1) / n
    return y_BSD, make_stats(routing, bytes_sent=jnp.full((), sent, jnp.float32))


@jax.named_scope("exchange")
def _out(x_ECD, axes):
    """[E, C, D] of this device's slots to [E / n, n * C, D] of this device's experts."""
    return jax.lax.all_to_all(x_ECD, axes, 0, 1, tiled=True) if axes else x_ECD


@jax.named_scope("exchange")
def _home(x_ECD, axes):
    return jax.lax.all_to_all(x_ECD, axes, 1, 0, tiled=True) if axes else x_ECD
