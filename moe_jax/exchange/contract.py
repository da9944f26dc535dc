"""What an exchange is: a dispatch whose experts live on several devices."""

from typing import Any, NamedTuple, Protocol

import jax

from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.routing.contract import Routing

KEPT = "moe_exchange"  # what came over the wire, by the name that `jax.checkpoint` policies know


class Sent(NamedTuple):
    """What stands between the way out and the experts.

    Attributes:
      arrived: the rows that came, [R, D].
      rest: whatever else the exchange needs.
    """

    arrived: jax.Array
    rest: Any


class Worked(NamedTuple):
    """What stands before the way home.

    Attributes:
      answers: the experts' answers to the rows that came, float32 [R, D].
      rest: whatever else the exchange needs.
    """

    answers: jax.Array
    rest: Any


class Exchange(Protocol):
    """From tokens to the experts' answers inside `jax.shard_map`: out, work, home; on this device's tokens.

    The n devices of the expert axes are peers: each has T tokens of its own, routed to E global experts, and E / n experts.
    """

    def begin(self, x_TD: jax.Array, routing: Routing) -> Sent:
        """Takes each token to its experts' devices.

        Args:
          x_TD: this device's tokens.
          routing: their assignments to global experts; E is nowhere.
        """
        ...

    def work(self, sent: Sent, expert_fn: ExpertFn) -> Worked:
        """Runs this device's E / n experts, expert p * E / n first on device p, on what arrived."""
        ...

    def finish(self, worked: Worked) -> tuple[jax.Array, Stats]:
        """Brings the answers home: y_TD float32 for this device's tokens, and its counts; summed over devices, the whole batch's."""
        ...


def run(exchange: Exchange, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn) -> tuple[jax.Array, Stats]:
    """The three, one after the other."""
    return exchange.finish(exchange.work(exchange.begin(x_TD, routing), expert_fn))
