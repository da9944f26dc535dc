"""Overlap: a device's tokens in parts, so that one part travels while the experts work on another."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.exchange.contract import Exchange, Sent, Worked
from moe_jax.ops.ordering import together
from moe_jax.routing.contract import Routing


@dataclass(frozen=True)
class Chunks:
    """Pipelines an exchange over `count` equal parts of the tokens, as they lie.

    Part i + 1 leaves before the experts start on part i, and part i comes home while they work on part i + 1: parts go out in order,
    come home in order, and each comes home after the next went out. A part has buffers of its own, so capacity is that of the part.

    Attributes:
      exchange: of one part.
      count: parts.
    """

    exchange: Exchange
    count: int

    def begin(self, x_TD: jax.Array, routing: Routing) -> Sent:
        """As in `Exchange`; sends the first part.

        Raises:
          ValueError: tokens that do not divide, or a router whose experts choose.
        """
        if not routing.choices or x_TD.shape[0] % self.count:
            raise ValueError(
                f"model.moe.exchange_chunks = {self.count} needs a router in which tokens choose, and a multiple of that many tokens"
                f" a device, not {x_TD.shape[0]}; set it to 1."
            )
        parts = [_part(x_TD, routing, self.count, i) for i in range(self.count)]
        first = self.exchange.begin(*parts[0])
        return Sent(first.arrived, (first, parts[1:]))

    def work(self, sent: Sent, expert_fn: ExpertFn) -> Worked:
        """As in `Exchange`; the other parts go out, and all but the last come home, here."""
        part, waiting = sent.rest
        waiting, answers, counts = list(waiting), [], []
        waiting[0], arrived = together(waiting[0], sent.arrived)
        for i, following in enumerate(waiting):
            leaving = self.exchange.begin(*following)
            arriving = leaving.arrived
            if i + 1 < len(waiting):
                waiting[i + 1], arriving = together(waiting[i + 1], arriving)
            worked = self.exchange.work(part._replace(arrived=arrived), expert_fn)
            replies, arrived = together(worked.answers, arriving)
            if answers:
                replies, answers[-1] = together(replies, answers[-1])
            y_TD, stats = self.exchange.finish(worked._replace(answers=replies))
            answers.append(y_TD)
            counts.append(stats)
            part = leaving
        worked = self.exchange.work(part._replace(arrived=arrived), expert_fn)
        replies, answers[-1] = together(worked.answers, answers[-1])
        return Worked(replies, (worked, answers, counts))

    def finish(self, worked: Worked) -> tuple[jax.Array, Stats]:
        """As in `Exchange`; the last part comes home."""
        last, answers, counts = worked.rest
        y_TD, stats = self.exchange.finish(last._replace(answers=worked.answers))
        return jnp.concatenate([*answers, y_TD]), jax.tree.map(lambda *parts: sum(parts), *counts, stats)


def _part(x_TD, routing, count, i):
    """Part i of the tokens and of every list over them."""
    length = x_TD.shape[0] // count
    own = slice(i * length, (i + 1) * length)
    expert_A, weight_A = (a.reshape(routing.choices, -1)[:, own].reshape(-1) for a in (routing.expert_A, routing.weight_A))
    token_A = jnp.tile(jnp.arange(length, dtype=jnp.int32), routing.choices)
    probs_TE, logits_TE = routing.probs_TE[own], routing.logits_TE[own]
    return x_TD[own], Routing(token_A, expert_A, weight_A, probs_TE, logits_TE, routing.choices)
