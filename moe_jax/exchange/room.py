"""How many rows the buffers of an exchange get: the worst case, or a factor times what balanced routing needs."""

import math
from dataclasses import dataclass
from fractions import Fraction

from moe_jax.config import MoEConfig
from moe_jax.dispatch import Group


def copies(group: Group, num_experts: int, send_once: bool) -> Fraction:
    """Rows that a token sends to a device of `num_experts` of the E experts, on average, when its K experts are drawn evenly.

    One by one K E' / E; sent once the chance that any of K distinct experts is there, 1 - C(E - E', K) / C(E, K).
    """
    total, choices = group.num_experts, group.choices
    if not send_once:
        return Fraction(choices) * num_experts / total
    return 1 - Fraction(math.comb(total - num_experts, int(choices)), math.comb(total, int(choices)))


def room(balanced: Fraction, factor: float, worst: int) -> int:
    """Rows of a buffer: `min(worst, max(1, ceil(factor * balanced)))`, and `worst` for factor 0.

    The product is one of exact rationals, the factor being the decimal it prints as; then it is rounded up.
    """
    if factor == 0:
        return worst
    return min(worst, max(1, math.ceil(Fraction(str(factor)) * balanced)))


@dataclass(frozen=True)
class Traffic:
    """The list that one level of exchange is given, and its surroundings.

    Attributes:
      group: who shares the experts' buffers, over all levels.
      num_tokens: T, tokens of the list.
      num_assignments: A, its length.
      num_experts: E, experts of all peers together.
      peers: n.
      share: devices that share what arrives at one peer: those of the levels within.
      choices: K when it is a list of token choice.
    """

    group: Group
    num_tokens: int
    num_assignments: int
    num_experts: int
    peers: int
    share: int
    choices: int | None

    @property
    def num_local(self) -> int:
        """Experts of one peer."""
        return self.num_experts // self.peers

    def sends_once(self, moe: MoEConfig) -> bool:
        """Whether tokens are sent once: not where a peer has one expert or a token one choice, as nothing could be saved."""
        return moe.send_once and (self.choices or 1) > 1 and self.num_local > 1

    def rows(self, moe: MoEConfig) -> tuple[int, int]:
        """Rows of the sender's buffer for all peers, and of the receiver's; the fixed buffers are n equal parts of both."""
        n, once = self.peers, self.sends_once(moe)
        worst = self.worst_rows(moe)
        arriving = self.group.num_tokens * copies(self.group, self.num_local, once) / self.share
        if moe.exchange == "ragged":
            sending = min(self.num_assignments, self.num_tokens * n) if once else self.num_assignments
            return sending, room(arriving, moe.exchange_factor, n * worst)
        per_peer = room(arriving / n, moe.exchange_factor, worst)
        return n * per_peer, n * per_peer

    def worst_rows(self, moe: MoEConfig) -> int:
        """The most that one device can send to one peer: no token has two assignments to one expert."""
        return self.num_tokens if self.sends_once(moe) else min(self.num_assignments, self.num_tokens * self.num_local)

    def expert_rows(self, moe: MoEConfig) -> int | None:
        """The most rows that a receiver's experts compute; None when that is one a row."""
        if not self.sends_once(moe):
            return None
        balanced = self.group.num_tokens * copies(self.group, self.num_local, False) / self.share
        return room(balanced, moe.exchange_factor, self.rows(moe)[1] * min(self.choices, self.num_local))
