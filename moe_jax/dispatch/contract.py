"""What a dispatch takes and returns, and the counts every one of them keeps."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.routing.contract import Routing
from moe_jax.routing.losses import count_load


@struct.dataclass
class Stats:
    """Exact counts of what happened to the assignments, int32, on the tokens at hand (`psum` makes them global).

    load_E.sum() == delivered + dropped_capacity + dropped_sender + dropped_receiver.

    Attributes:
      load_E: assignments the router gave each expert, before any drop; padding is not counted.
      dropped_capacity: assignments that found their expert's buffer full, counted on the device of the expert.
      dropped_sender: assignments that did not fit the sender's buffer to a peer.
      dropped_receiver: assignments that a receiver had no room for, counted there.
      refused: of those, the ones that therefore stayed at home, counted there: seen from the sender. Not added to the sum above.
      exact: 1 where a step that would have dropped took the exact path.
      padding: assignments that padding tokens would have made; they are never routed. A routing list does not say why it sends
        something nowhere: whoever holds the padding mask counts this (`exchange/expert_parallel.py`), a dispatch leaves 0.
      bytes_sent: float32, bytes this device put on the wire to other devices, forward, dispatch and combine together.
    """

    load_E: jax.Array
    dropped_capacity: jax.Array
    dropped_sender: jax.Array
    dropped_receiver: jax.Array
    refused: jax.Array
    exact: jax.Array
    padding: jax.Array
    bytes_sent: jax.Array


class ExpertFn(Protocol):
    """The experts, on rows grouped by expert."""

    def __call__(self, x: jax.Array, group_sizes_E: jax.Array | None = None) -> jax.Array:
        """Applies expert e to its rows.

        Args:
          x: [A, D] with rows of expert 0 first, then expert 1, ... and `group_sizes_E` given; or [E, C, D] without it.
          group_sizes_E: int32 rows per expert; rows past their sum come back as zeros.

        Returns: the same shape as x.
        """
        ...


class Dispatch(Protocol):
    """Runs each assignment and sums each token's weighted answers in float32.

    `(x_TD, routing, expert_fn) -> (y_TD, Stats)`, y in x's dtype unless the dispatch was made with another. What goes nowhere
    (expert E) adds nothing: a padding token's y is zero.
    """

    def __call__(
        self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn, keys: tuple[jax.Array, ...] = ()
    ) -> tuple[jax.Array, Stats]:
        """Dispatches T tokens.

        `keys` are [A] arrays that say who claims a full buffer first (`dispatch.slots.claim_slots`), in place of the
        dispatch's own rule; a receiver of other devices' rows uses them to keep the order those had at home.
        """
        ...


def make_stats(routing: Routing, **counts: jax.Array) -> Stats:
    """Stats of `routing`, with zeros for what is not given."""
    zero = jnp.zeros((), jnp.int32)
    fields = {name: zero for name in ("dropped_capacity", "dropped_sender", "dropped_receiver", "refused", "exact", "padding")}
    return Stats(**({"load_E": count_load(routing), **fields, "bytes_sent": jnp.zeros((), jnp.float32)} | counts))
