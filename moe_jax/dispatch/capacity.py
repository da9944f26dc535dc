"""Experts with fixed buffers: every expert has C rows, and an assignment that finds its expert's buffer full is dropped.

The assignments are sorted by expert and the first C of each expert take its rows, so nothing of shape [T, E, C] exists
(GShard, 2006.16668, algorithm 1, writes the same rule with one-hot tensors: `dispatch/einsum.py`). A token whose assignment is
dropped keeps its other choices' answers with the weights the router gave them; nothing is renormalised.
"""

import functools
import logging
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import jax
from jax.typing import DTypeLike

from moe_jax.dispatch.contract import ExpertFn, Stats, make_stats
from moe_jax.dispatch.slots import claim_keys, claim_slots, combine_rows, fill_rows
from moe_jax.routing.contract import Routing

_LOG = logging.getLogger(__name__)


class Group(NamedTuple):
    """Who shares the experts' buffers: the tokens of all peers, their choices a token, all experts."""

    num_tokens: int
    choices: int | Fraction
    num_experts: int

    @classmethod
    def alone(cls, routing: Routing) -> "Group":
        """The group of a dispatch that sees all tokens and experts itself."""
        num_tokens = routing.probs_TE.shape[0]
        return cls(num_tokens, routing.choices or Fraction(routing.expert_A.shape[0], num_tokens), routing.num_experts)


def capacity(num_tokens: int, choices: int | Fraction, num_experts: int, factor: float) -> int:
    """Rows of an expert's buffer, `max(1, min(T, ceil(factor * T * K / E)))`.

    The factor includes K (V-MoE, Megatron; not Flaxformer, AXLearn): at 1.0 balanced experts are exactly full. The product is
    one of exact rationals, the factor being the decimal it prints as, so that no float error adds a row; then it is rounded up.
    T counts padding tokens too, whose number is not known when the program is compiled, though they take no row. An expert gets
    at most one assignment from a token, hence never more than T rows.
    """
    return max(1, min(num_tokens, math.ceil(Fraction(str(factor)) * num_tokens * choices / num_experts)))


@dataclass(frozen=True)
class CapacityDispatch:
    """Fixed buffers [E, C, D].

    Attributes:
      factor: the capacity factor, K included (`capacity`).
      priority: "position" or "probability" (`claim_keys`).
      group: who shares the buffers; None for the tokens and experts of the call.
      out_dtype: dtype of y; None for x's.
    """

    factor: float
    priority: str = "position"
    group: Group | None = None
    out_dtype: DTypeLike | None = None

    def __call__(
        self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn, keys: tuple[jax.Array, ...] = ()
    ) -> tuple[jax.Array, Stats]:
        num_tokens, width = x_TD.shape
        group = self.group or Group.alone(routing)
        rows = capacity(*group, self.factor)
        _log_capacity(group, self.factor, rows)
        slots = claim_slots(routing.expert_A, routing.num_experts, rows, keys or claim_keys(routing, self.priority)[:-1])
        x_ECD = fill_rows(x_TD, routing, slots).reshape(routing.num_experts, rows, width)
        y_TD = combine_rows(expert_fn(x_ECD).reshape(-1, width), routing, slots, num_tokens)
        return y_TD.astype(self.out_dtype or x_TD.dtype), make_stats(routing, dropped_capacity=slots.dropped)


@functools.cache  # once for each shape
def _log_capacity(group: Group, factor: float, rows: int) -> None:
    tokens, choices, experts = group
    message = "capacity: %g x %d tokens x %g / %d experts, rounded up: %d rows an expert"
    _LOG.info(message, factor, tokens, float(choices), experts, rows)
