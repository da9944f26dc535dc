"""Exactness on demand: bounded buffers as a rule, and a path without bounds in the steps in which they overflow."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.exchange.contract import Exchange, Sent, Worked, run
from moe_jax.ops.varying import vary_over, varying_axes
from moe_jax.routing.contract import Routing


@dataclass(frozen=True)
class ExactOnOverflow:
    """Takes `bounded`, unless it dropped anything anywhere: then `exact` in its place, at run time (`lax.cond`).

    Attributes:
      bounded: an exchange that may drop by sender or receiver.
      exact: one that does not.
    """

    bounded: Exchange
    exact: Exchange

    def begin(self, x_TD: jax.Array, routing: Routing) -> Sent:
        """As in `Exchange`."""
        sent = self.bounded.begin(x_TD, routing)
        return Sent(sent.arrived, (sent, x_TD, routing))

    def work(self, sent: Sent, expert_fn: ExpertFn) -> Worked:
        """As in `Exchange`."""
        bounded, x_TD, routing = sent.rest
        worked = self.bounded.work(bounded._replace(arrived=sent.arrived), expert_fn)
        return Worked(worked.answers, (worked, x_TD, routing, expert_fn))

    def finish(self, worked: Worked) -> tuple[jax.Array, Stats]:
        """As in `Exchange`. All devices of the mesh take the same path; the bytes of both are counted."""
        bounded, x_TD, routing, expert_fn = worked.rest
        y_TD, stats = self.bounded.finish(bounded._replace(answers=worked.answers))
        answer_axes, count_axes = varying_axes(y_TD), varying_axes(*jax.tree.leaves(stats))
        lost = vary_over(stats.dropped_sender + stats.dropped_receiver, count_axes)
        overflow = jax.lax.psum(lost, tuple(sorted(count_axes))) > 0

        def alike(y_TD, stats):
            return vary_over(y_TD, answer_axes), jax.tree.map(partial(vary_over, axes=count_axes), stats)

        @jax.checkpoint  # else every step would write zeros for what this path would have kept for the backward pass
        def take_exact():
            exact_TD, exact_stats = run(self.exact, x_TD, routing, expert_fn)
            bytes_sent = stats.bytes_sent + exact_stats.bytes_sent
            return alike(exact_TD, exact_stats.replace(bytes_sent=bytes_sent, exact=jnp.ones((), jnp.int32)))

        return jax.lax.cond(overflow, take_exact, lambda: alike(y_TD, stats))
