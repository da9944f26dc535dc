"""The exchange of a device that has all experts: none."""

from dataclasses import dataclass

import jax

from moe_jax.dispatch.contract import Dispatch, ExpertFn, Stats
from moe_jax.exchange.contract import Sent, Worked
from moe_jax.routing.contract import Routing


@dataclass(frozen=True)
class Local:
    """A dispatch as an exchange.

    Attributes:
      dispatch: with float32 answers.
    """

    dispatch: Dispatch

    def begin(self, x_TD: jax.Array, routing: Routing) -> Sent:
        """As in `Exchange`."""
        return Sent(x_TD, routing)

    def work(self, sent: Sent, expert_fn: ExpertFn) -> Worked:
        """As in `Exchange`."""
        return Worked(*self.dispatch(*sent, expert_fn))

    def finish(self, worked: Worked) -> tuple[jax.Array, Stats]:
        """As in `Exchange`."""
        return worked.answers, worked.rest
