"""Every device sees its peers' tokens, runs the assignments to its own experts, and the partial sums are reduce-scattered.

Exact whenever the dispatch is: nothing has to fit a buffer between devices. It moves n - 1 copies of every token whatever K is,
where an exact all_to_all moves n - 1 mostly empty buffers of up to min(K, E / n) copies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import MoEConfig
from moe_jax.dispatch import Group
from moe_jax.dispatch.contract import Dispatch, ExpertFn, Stats
from moe_jax.exchange.contract import KEPT, Sent, Worked
from moe_jax.exchange.transport import Level
from moe_jax.exchange.wire import Wire, decode, encode, row_bytes
from moe_jax.routing.contract import Routing
from moe_jax.routing.losses import count_load


@dataclass(frozen=True)
class AllGather:
    """Gathers tokens and choices, reduce-scatters answers.

    Attributes:
      moe: names the wire.
      level: the peers, over all expert axes.
      make_local: as in `TokenExchange`.
    """

    moe: MoEConfig
    level: Level
    make_local: Callable[[Group, int | None], Dispatch]

    def begin(self, x_TD: jax.Array, routing: Routing) -> Sent:
        """As in `Exchange`."""
        gathered = _gather(self.level, Wire.of(self.moe, x_TD.dtype), x_TD), _gather_routing(routing, self.level)
        x_TD, everything = jax.tree.map(lambda a: checkpoint_name(a, KEPT), gathered)
        return Sent(x_TD, (everything, routing))

    def work(self, sent: Sent, expert_fn: ExpertFn) -> Worked:
        """As in `Exchange`."""
        all_x_TD, (everything, own) = sent
        n, num_tokens = self.level.size, own.probs_TE.shape[0]
        group = Group.alone(own)._replace(num_tokens=n * num_tokens)
        rows = n * num_tokens * min(own.choices, everything.num_experts) if own.choices else None
        partial_TD, stats = self.make_local(group, rows)(all_x_TD, everything, expert_fn)
        wire = Wire.of(self.moe, all_x_TD.dtype)
        token_bytes = row_bytes(wire, all_x_TD.shape[1], 0)
        list_bytes = 4 * (2 if own.choices else 3)  # expert, weight, token
        bytes_sent = (n - 1) * (num_tokens * token_bytes + own.expert_A.shape[0] * list_bytes)
        stats = stats.replace(load_E=count_load(own), bytes_sent=jnp.float32(bytes_sent))
        return Worked(partial_TD, (wire, stats))

    def finish(self, worked: Worked) -> tuple[jax.Array, Stats]:
        """As in `Exchange`."""
        wire, stats = worked.rest
        return _scatter(self.level, wire, worked.answers), stats


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@jax.named_scope("exchange")
def _gather(level, wire, x_TD):
    """All peers' tokens, each rounded to the dispatch wire once."""
    payload, scale = (jax.lax.all_gather(a, level.axes, tiled=True) if a.size else a for a in encode(x_TD, wire.dispatch))
    return decode(payload, scale if scale.size else scale[:0], x_TD.dtype)


def _gather_forward(level, wire, x_TD):
    return _gather(level, wire, x_TD), None


def _gather_backward(level, wire, _, g_TD):
    return (_scatter(level, wire, g_TD).astype(g_TD.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@jax.named_scope("exchange")
def _scatter(level, wire, partial_TD):
    """The sum over peers of their partial sums for this device's tokens, float32, each rounded to the combine wire once."""
    if wire.combine == "float32":
        return jax.lax.psum_scatter(partial_TD.astype(jnp.float32), level.axes, tiled=True)
    pieces = jax.lax.all_to_all(partial_TD.astype(wire.combine), level.axes, split_axis=0, concat_axis=0, tiled=True)
    return jnp.sum(pieces.reshape(level.size, -1, pieces.shape[-1]).astype(jnp.float32), axis=0)


def _scatter_forward(level, wire, partial_TD):
    return _scatter(level, wire, partial_TD), partial_TD[:0]


@jax.named_scope("exchange")
def _scatter_backward(level, wire, like, g_TD):
    return (jax.lax.all_gather(g_TD.astype(wire.combine), level.axes, tiled=True).astype(like.dtype),)


_scatter.defvjp(_scatter_forward, _scatter_backward)


@jax.named_scope("exchange")
def _gather_routing(routing: Routing, level: Level) -> Routing:
    """The peers' assignments with this device's experts as 0..E/n and every other expert nowhere.

    Token choice stays choice-major over all peers' tokens; other lists follow one another in the order of the peers.
    """
    n, me = level.size, jax.lax.axis_index(level.axes)
    num_local, num_tokens = routing.num_experts // n, routing.probs_TE.shape[0]
    lists = routing.choices or 1

    def gather(array_A):
        return jax.lax.all_gather(array_A.reshape(lists, -1), level.axes, axis=1, tiled=True).reshape(-1)

    expert_A = gather(routing.expert_A) - me * num_local
    is_local_A = (expert_A >= 0) & (expert_A < num_local)
    if routing.choices:
        token_A = jnp.tile(jnp.arange(n * num_tokens, dtype=jnp.int32), routing.choices)
    else:
        token_A = gather(routing.token_A + me * num_tokens)
    return Routing(
        token_A=token_A,
        expert_A=jnp.where(is_local_A, expert_A, num_local),
        weight_A=jnp.where(is_local_A, gather(routing.weight_A), 0.0),
        probs_TE=jnp.zeros((n * num_tokens, num_local), jnp.float32),
        logits_TE=jnp.zeros((n * num_tokens, num_local), jnp.float32),
        choices=routing.choices,
    )
