"""Which exchange a run uses."""

import functools
import logging
from collections.abc import Callable

from jax.typing import DTypeLike

from moe_jax.config import MoEConfig
from moe_jax.dispatch import make_dispatch
from moe_jax.exchange.all_gather import AllGather
from moe_jax.exchange.all_to_all import AllToAll
from moe_jax.exchange.contract import Exchange

_LOG = logging.getLogger(__name__)

EXCHANGES: dict[str, Callable[[MoEConfig, int, DTypeLike | None], Exchange]] = {
    "local": lambda moe, axis_size, dtype: make_dispatch(moe, out_dtype=dtype),  # all experts are here
    "all_to_all": AllToAll,
    "all_gather": AllGather,
}


def make_exchange(moe: MoEConfig, axis_size: int, out_dtype: DTypeLike | None = None) -> Exchange:
    """The exchange of `moe.exchange` over `axis_size` devices; "auto" is the dispatch alone on one device, else all_to_all.

    Args:
      axis_size: devices on the expert axis; divides the number of experts.
      out_dtype: dtype of y; None for x's.
    """
    name = moe.exchange
    if name == "auto":
        name = "local" if axis_size == 1 else "all_to_all"
    _log_choice(name, moe.exchange, moe.dispatch, axis_size, moe.exchange_factor)
    return EXCHANGES[name](moe, axis_size, out_dtype)


@functools.cache  # once for each choice
def _log_choice(name: str, wish: str, dispatch: str, axis_size: int, factor: float) -> None:
    buffers = f", buffers of {factor:g} x the balanced rows" if factor and name == "all_to_all" else ""
    _LOG.info("exchange: %s (asked for: %s), expert axis %d, dispatch %s%s", name, wish, axis_size, dispatch, buffers)
