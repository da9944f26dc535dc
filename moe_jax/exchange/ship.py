"""The two crossings of an exchange, differentiable: tokens out with what the peers must know of them, answers home.

Each has a gradient of its own, so that what travels backwards is a row for a row, in the wire's combine dtype, whatever the transport.
"""

from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.exchange.transport import Link, Transport
from moe_jax.exchange.wire import Wire, decode, encode
from moe_jax.ops.varying import vary_over, varying_axes


@jax.named_scope("exchange")
def ship(
    transport: Transport, wire: Wire, link: Link, x_ND: jax.Array, weights_NM: jax.Array, words_NW: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sends rows to the peers: one collective for the tokens, one for everything else.

    Args:
      transport: and its open `link`.
      wire: dtypes.
      x_ND: tokens, one a row.
      weights_NM: float32, differentiable.
      words_NW: int32.

    Returns: the same three as the receivers have them, [R, ...].
    """
    axes = varying_axes(words_NW, link.peer_N)  # the tokens may vary over more: by then they may have met the experts' slices
    link, *arrays = jax.tree.map(lambda a: vary_over(a, axes), (link, x_ND, weights_NM, words_NW))
    return _ship(transport, wire, link, *arrays)


@jax.named_scope("exchange")
def ship_home(transport: Transport, wire: Wire, link: Link, y_RD: jax.Array) -> jax.Array:
    """Sends the receivers' rows back to their senders, float32 [N, D], rounded to the wire's combine dtype."""
    axes = varying_axes(y_RD, link.peer_N)
    return _ship_home(transport, wire, link, vary_over(y_RD, axes))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ship(transport, wire, link, x_ND, weights_NM, words_NW):
    payload_ND, scale_N1 = encode(x_ND, wire.dispatch)
    payload_RD = transport.send(link, payload_ND)
    told_NW, scale_N1 = jnp.concatenate((words_NW, _as_words(weights_NM)), axis=1), _as_words(scale_N1)
    if varying_axes(scale_N1) <= varying_axes(told_NW):
        told_RW, scale_R1 = _split(transport.send(link, jnp.concatenate((told_NW, scale_N1), axis=1)), told_NW.shape[1])
    else:  # in one array the words would vary over as much as the tokens
        told_RW, scale_R1 = transport.send(link, told_NW), transport.send(link, scale_N1)
    words_RW, weights_RM = _split(told_RW, words_NW.shape[1])
    return decode(payload_RD, _as_floats(scale_R1), x_ND.dtype), _as_floats(weights_RM), words_RW


def _ship_forward(transport, wire, link, x_ND, weights_NM, words_NW):
    return _ship(transport, wire, link, x_ND, weights_NM, words_NW), (link, x_ND[:0], weights_NM)


def _ship_backward(transport, wire, residuals, gradients):
    link, like, weights_NM = residuals
    g_x_RD, g_weights_RM, _ = gradients
    g_x_ND = transport.back(link, g_x_RD.astype(wire.combine)).astype(like.dtype)
    g_weights_NM = transport.back(link, g_weights_RM) if weights_NM.shape[1] else weights_NM  # nothing, of nothing
    return None, g_x_ND, g_weights_NM, None


_ship.defvjp(_ship_forward, _ship_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ship_home(transport, wire, link, y_RD):
    return transport.back(link, y_RD.astype(wire.combine)).astype(jnp.float32)


def _ship_home_forward(transport, wire, link, y_RD):
    return _ship_home(transport, wire, link, y_RD), (link, y_RD[:0])


def _ship_home_backward(transport, wire, residuals, g_ND):
    link, like = residuals
    return None, transport.send(link, g_ND.astype(wire.combine)).astype(like.dtype)


_ship_home.defvjp(_ship_home_forward, _ship_home_backward)


def _split(array_RW, width):
    return array_RW[:, :width], array_RW[:, width:]


def _as_words(floats):
    return jax.lax.bitcast_convert_type(floats, jnp.int32)


def _as_floats(words):
    return jax.lax.bitcast_convert_type(words, jnp.float32)
