"""Which exchange a run uses."""

import functools
import logging
import math
from collections.abc import Mapping

import jax.numpy as jnp

from moe_jax.config import MoEConfig
from moe_jax.dispatch import make_dispatch
from moe_jax.exchange.all_gather import AllGather
from moe_jax.exchange.chunks import Chunks
from moe_jax.exchange.contract import Exchange
from moe_jax.exchange.local import Local
from moe_jax.exchange.overflow import ExactOnOverflow
from moe_jax.exchange.token_exchange import TokenExchange
from moe_jax.exchange.transport import Level

_LOG = logging.getLogger(__name__)


def make_exchange(moe: MoEConfig, sizes: Mapping[str, int]) -> Exchange:
    """The exchange of `moe.exchange` over the expert axes; "auto" is the dispatch alone on one device, else all_to_all.

    Over two axes, "all_to_all" and "ragged" are exchanges in two levels; "all_gather" gathers over both at once.

    Args:
      sizes: of the expert axes by name, the slowest first; their product divides the number of experts.
    """
    levels = [Level((axis,), size) for axis, size in sizes.items() if size > 1]
    name = moe.exchange
    if name == "auto" or not levels:
        name = "all_to_all" if levels else "local"
    _log_choice(name, moe.exchange, tuple(levels), _settings(moe, name))
    if not levels:
        return Local(make_dispatch(moe, out_dtype=jnp.float32))
    exact = _chunked(moe, _all_gather(moe, levels))
    if name == "all_gather":
        return exact
    exchange = _chunked(moe, _token_exchange(moe, levels))
    if moe.exchange_factor and moe.exchange_overflow == "exact":
        return ExactOnOverflow(exchange, exact)
    return exchange


def _all_gather(moe, levels):
    level = Level(tuple(axis for level in levels for axis in level.axes), math.prod(level.size for level in levels))
    return AllGather(moe, level, functools.partial(_local, moe))


def _token_exchange(moe, levels):
    """The levels from the inside out: what runs the experts for one is the exchange of the next."""
    axes = tuple(axis for level in levels for axis in level.axes)
    num_devices, share, make_local = math.prod(level.size for level in levels), 1, functools.partial(_local, moe)
    for level in reversed(levels):
        exchange = TokenExchange(moe, level, share, axes, num_devices, make_local)
        share, make_local = share * level.size, functools.partial(_within, exchange)
    return exchange


def _local(moe, group, rows):
    return make_dispatch(moe, group, jnp.float32, rows)


def _within(exchange, group, rows):
    return functools.partial(exchange, group=group)


def _chunked(moe, exchange):
    return Chunks(exchange, moe.exchange_chunks) if moe.exchange_chunks > 1 else exchange


def _settings(moe, name):
    """What else distinguishes the exchange, in words."""
    if name == "local":
        return ()
    words = []
    if name != "all_gather":
        words += ["sent once"] * moe.send_once
        words += [f"room for {moe.exchange_factor:g} x the balanced rows, else {moe.exchange_overflow}"] * bool(
            moe.exchange_factor
        )
    words += [f"{moe.dispatch_wire} out"] * (moe.dispatch_wire != "compute") + [f"{moe.combine_wire} home"] * (
        moe.combine_wire != "compute"
    )
    return (*words, *[f"{moe.exchange_chunks} chunks"] * (moe.exchange_chunks > 1), f"dispatch {moe.dispatch}")


@functools.cache  # once for each choice
def _log_choice(name: str, wish: str, levels: tuple[Level, ...], settings: tuple[str, ...]) -> None:
    over = " x ".join(f"{'+'.join(level.axes)} {level.size}" for level in levels) or "one device"
    _LOG.info("exchange: %s (asked for: %s) over %s%s", name, wish, over, "".join(f", {word}" for word in settings))
