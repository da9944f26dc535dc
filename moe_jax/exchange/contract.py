"""What an exchange is: a dispatch whose experts live on several devices."""

from typing import Protocol

import jax

from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.routing.contract import Routing

AXIS = "expert"  # the mesh axis that splits the experts


class Exchange(Protocol):
    """`(x_TD, routing, expert_fn) -> (y_TD, Stats)` inside `jax.shard_map`, on this device's tokens.

    The n devices of the axis "expert" are peers: each has T tokens of its own, routed to E global experts, and E / n experts.
    """

    def __call__(self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn) -> tuple[jax.Array, Stats]:
        """Takes each assignment to its expert's device and brings the answer home.

        Args:
          x_TD: this device's tokens.
          routing: their assignments to global experts; E is nowhere.
          expert_fn: this device's E / n experts, expert p * E / n first on device p.

        Returns: y_TD for this device's tokens, and this device's counts; their sum over devices is the whole batch's.
        """
        ...
