"""Rows to peers with no padding on the wire: `jax.lax.ragged_all_to_all` on every backend, and the plan that fills its arguments.

XLA:CPU has no such collective and runs an emulation. Both have one custom gradient: JAX's own transpose (0.10 and 0.12) returns
a wrong gradient of `output` when a peer sends nothing, and types a result by `output` alone, be it a constant.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.mesh import target_platform
from moe_jax.ops.varying import vary_over, varying_axes

AxisName = str | tuple[str, ...]


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: AxisName,
) -> jax.Array:
    """Sends slices of `operand` to the peers, who write them into their `output`; to be called inside `jax.shard_map`.

    Slice i is the rows `input_offsets[i] : input_offsets[i] + send_sizes[i]`. With s = k / n slices a peer it goes to peer
    i // s, who writes it from row `output_offsets[i]` of its own `output`. Slices must lie inside their arrays, those sent must
    not overlap (else their gradient is undefined), and neither must those received.

    Args:
      operand: [N, ...], rows to send.
      output: [M, ...] in the same dtype, what the rows are written into.
      input_offsets: integer [k], k a multiple of the n devices of the axis.
      send_sizes: integer [k], rows of each slice.
      output_offsets: integer [k], places in the peers' `output`.
      recv_sizes: integer [k], rows of the slices received; the peers' `send_sizes` for this device.
      axis_name: the mesh axis of the peers, or several, the first the slowest (as `jax.lax.axis_index` counts).

    Returns: `output` with the received rows. The gradient of `operand` is the exchange backwards, zero for rows not sent; that
      of `output` is zero where rows were received.

    Raises:
      ValueError: the arrays do not fit each other.
    """
    indices = (input_offsets, send_sizes, output_offsets, recv_sizes)
    if operand.dtype != output.dtype or operand.shape[1:] != output.shape[1:]:
        raise ValueError(
            f"ragged_all_to_all needs operand and output of one dtype and row shape, got {operand.dtype}{list(operand.shape)}"
            f" and {output.dtype}{list(output.shape)}: make output like operand but for its first axis."
        )
    n = jax.lax.axis_size(axis_name)
    if len({index.shape for index in indices}) != 1 or indices[0].ndim != 1 or indices[0].shape[0] % n or not indices[0].size:
        raise ValueError(
            f"ragged_all_to_all needs offsets and sizes of one length, a multiple of the {n} devices of {axis_name!r},"
            f" got shapes {[index.shape for index in indices]}."
        )
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    axes = varying_axes(operand, output, *indices) | set(names)
    arrays = [vary_over(array, axes) for array in (operand, output, *(index.astype(jnp.int32) for index in indices))]
    return _exchange(*arrays, names, target_platform() == "cpu")


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name, emulate):
    exchange = _emulation if emulate else jax.lax.ragged_all_to_all
    return exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axis_name)


def _exchange_forward(operand, output, *rest):
    *indices, axis_name, emulate = rest
    return _exchange(operand, output, *indices, axis_name, emulate), (operand.shape[0], *indices)


def _exchange_backward(axis_name, emulate, residuals, g):
    num_rows, input_offsets, send_sizes, output_offsets, recv_sizes = residuals
    home_offsets, recv_offsets = _swap((input_offsets, output_offsets), axis_name)
    zeros = vary_over(jnp.zeros((num_rows, *g.shape[1:]), g.dtype), varying_axes(g))
    g_operand = _exchange(g, zeros, recv_offsets, recv_sizes, home_offsets, send_sizes, axis_name, emulate)
    _, received = _slice_of_row(recv_offsets, recv_sizes, g.shape[0])
    return g_operand, _where_row(received, jnp.zeros_like(g), g), None, None, None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _emulation(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Every device sees all operands (n * N rows) and picks its rows. The sizes received say all that those sent do."""
    del send_sizes
    (num_rows, *_), num_slices, n = operand.shape, recv_sizes.shape[0], jax.lax.axis_size(axis_name)
    home_offsets, recv_offsets = _swap((input_offsets, output_offsets), axis_name)
    slice_M, received_M = _slice_of_row(recv_offsets, recv_sizes, output.shape[0])
    first_k = jnp.arange(num_slices, dtype=jnp.int32) // (num_slices // n) * num_rows + home_offsets - recv_offsets
    source_M = first_k[slice_M] + jnp.arange(output.shape[0], dtype=jnp.int32)
    everything = jax.lax.all_gather(operand, axis_name, tiled=True)
    return _where_row(received_M, everything.at[source_M].get(mode="clip"), output)


def _swap(arrays_k, axis_name):
    """What the peers' slices for this device say, in the order of the peers."""
    stacked_ka = jnp.stack(arrays_k, axis=1)
    return tuple(jax.lax.all_to_all(stacked_ka, axis_name, split_axis=0, concat_axis=0, tiled=True).T)


def _slice_of_row(offsets_k, sizes_k, num_rows):
    """The slice that covers each of M rows, and whether one does."""
    starts_k = jnp.where(sizes_k > 0, offsets_k, num_rows)  # empty slices cover nothing, wherever they lie
    order_k = jnp.argsort(starts_k)
    begun_M = jnp.cumsum(jnp.zeros_like(starts_k, shape=num_rows).at[starts_k].add(1, mode="drop"))
    slice_M = order_k[jnp.maximum(begun_M, 1) - 1]
    inside_M = jnp.arange(num_rows, dtype=jnp.int32) < (offsets_k + sizes_k)[slice_M]
    return slice_M, inside_M & (begun_M > 0)


def _where_row(mask_M, chosen, other):
    return jnp.where(mask_M.reshape(-1, *(1,) * (other.ndim - 1)), chosen, other)


class RaggedPlan(NamedTuple):
    """Which rows go where; all int32 [n], one entry a peer. `ragged_all_to_all(rows, buffer, *plan.arguments, axis_name=...)`.

    Attributes:
      input_offsets: first row of mine for the peer.
      send_sizes: rows of mine that the peer accepts.
      output_offsets: where they lie in the peer's buffer.
      recv_sizes: rows that I accept from the peer.
      recv_offsets: where they lie in my buffer: peers in their order, one after the other, from row 0.
      home_offsets: where they lay at the peer.
      refused_n: rows of mine that the peer refused, the last of those for it.
    """

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array
    recv_offsets: jax.Array
    home_offsets: jax.Array
    refused_n: jax.Array

    @property
    def arguments(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The offsets and sizes of `ragged_all_to_all`, in its order."""
        return self.input_offsets, self.send_sizes, self.output_offsets, self.recv_sizes


def plan_ragged(send_sizes_n: jax.Array, receive_rows: int | None, *, axis_name: AxisName) -> RaggedPlan:
    """Tells the peers how much is coming, and settles what they accept.

    A receiver accepts its own rows first, then those of the next device and so on around the ring, a sender's first rows first,
    until its buffer is full: so nobody's place among the devices is better than another's.

    Args:
      send_sizes_n: int32, rows of this device for each peer; they lie sorted by peer, from row 0.
      receive_rows: rows of every device's buffer; None when it cannot overflow.
      axis_name: as in `ragged_all_to_all`.
    """
    wanted_nn = jax.lax.all_gather(send_sizes_n.astype(jnp.int32), axis_name)  # [from, to]
    accepted_nn = wanted_nn if receive_rows is None else accept_rows(wanted_nn, receive_rows)
    me = jax.lax.axis_index(axis_name)
    return RaggedPlan(
        input_offsets=_before(wanted_nn, 1)[me],
        send_sizes=accepted_nn[me],
        output_offsets=_before(accepted_nn, 0)[me],
        recv_sizes=accepted_nn[:, me],
        recv_offsets=_before(accepted_nn, 0)[:, me],
        home_offsets=_before(wanted_nn, 1)[:, me],
        refused_n=(wanted_nn - accepted_nn)[me],
    )


def accept_rows(wanted_nn: jax.Array, receive_rows: int) -> jax.Array:
    """Of the rows p has for q, `wanted_nn[p, q]`, how many q accepts in `receive_rows`: from q first, then q + 1, ... (mod n)."""
    place_n = jnp.arange(wanted_nn.shape[0])
    sender_nn = (place_n[:, None] + place_n) % place_n.size  # [turn, receiver]
    turn_nn = (place_n[:, None] - place_n) % place_n.size  # [sender, receiver]
    offered_nn = wanted_nn[sender_nn, place_n]
    return jnp.clip(receive_rows - _before(offered_nn, 0), 0, offered_nn)[turn_nn, place_n]


def reverse(plan: RaggedPlan) -> RaggedPlan:
    """The way home: the receiver's buffer is sent, and every accepted row lands where its sender had it. Nothing is refused."""
    return RaggedPlan(
        input_offsets=plan.recv_offsets,
        send_sizes=plan.recv_sizes,
        output_offsets=plan.home_offsets,
        recv_sizes=plan.send_sizes,
        recv_offsets=plan.input_offsets,
        home_offsets=plan.output_offsets,
        refused_n=jnp.zeros_like(plan.refused_n),
    )


def _before(sizes_nn, axis):
    """Exclusive cumulative sum."""
    return jnp.cumsum(sizes_nn, axis=axis, dtype=jnp.int32) - sizes_nn
