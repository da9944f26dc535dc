"""The token exchange: tokens travel to their experts' devices and the answers come home (GShard, 2006.16668, sec. 3.2).

One class for all of them. How rows get there is a transport (fixed buffers or ragged), what a row is a packing (an assignment, or a
token sent once), and who runs the experts on arrival is a dispatch, or another exchange: two levels are an exchange between groups of
devices over slow links, one message a peer, inside which each receiver exchanges over fast ones. Sent once, a token then crosses the
slow links once a group and fans out inside it; partial sums are added inside the group before they cross back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import MoEConfig
from moe_jax.dispatch import Group
from moe_jax.dispatch.contract import Dispatch, ExpertFn, Stats
from moe_jax.dispatch.slots import fill_rows
from moe_jax.exchange.contract import KEPT, Sent, Worked
from moe_jax.exchange.parcels import Claims, OneByOne, Parcels, SendOnce, home_claims
from moe_jax.exchange.room import Traffic
from moe_jax.exchange.ship import ship, ship_home
from moe_jax.exchange.transport import FixedTransport, Level, Link, RaggedTransport, Transport
from moe_jax.exchange.wire import Wire, row_bytes
from moe_jax.routing.contract import Routing
from moe_jax.routing.losses import count_load


class Home(NamedTuple):
    """What the sender keeps while its rows are away."""

    traffic: Traffic
    wire: Wire
    routing: Routing
    parcels: Parcels
    link: Link


@dataclass(frozen=True)
class TokenExchange:
    """One level of exchange.

    Attributes:
      moe: names the transport ("ragged", else fixed buffers), the packing, the wire, the factor of the buffers.
      level: the peers.
      share: devices that share what arrives at one peer: those of the levels within.
      axes: of all levels, outermost first; over them the devices are numbered.
      num_devices: of all levels.
      make_local: from the group that shares the experts' buffers, and the rows experts have to compute at most (None for all), to what
        runs the experts on arrival, with float32 answers.
    """

    moe: MoEConfig
    level: Level
    share: int
    axes: tuple[str, ...]
    num_devices: int
    make_local: Callable[[Group, int | None], Dispatch]

    def __call__(
        self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn, keys: Claims = (), group: Group | None = None
    ) -> tuple[jax.Array, Stats]:
        """As in `Exchange`. A level within is given the claims and the group of the whole."""
        return self.finish(self.work(self.begin(x_TD, routing, keys, group), expert_fn))

    def begin(self, x_TD: jax.Array, routing: Routing, keys: Claims = (), group: Group | None = None) -> Sent:
        """As in `Exchange`; `keys` and `group` as given to a level within."""
        traffic = self._traffic(routing, group)
        packing, transport = self._packing(traffic), self._transport(traffic)
        claims = keys
        if not claims and self.moe.dispatch == "capacity":
            claims = home_claims(routing, self.moe.capacity_priority, jax.lax.axis_index(self.axes))
        parcels = packing.pack(routing, keys)
        link = transport.open(parcels.peer_A, parcels.keys)
        told = packing.address(routing, claims, link)
        shipped = ship(transport, Wire.of(self.moe, x_TD.dtype), link, fill_rows(x_TD, routing, link.slots), *told)
        x_RD, weights_RM, words_RW = jax.tree.map(lambda a: checkpoint_name(a, KEPT), shipped)
        received, claims = packing.read(weights_RM, words_RW, transport.arrived(link))
        return Sent(x_RD, (received, claims, Home(traffic, Wire.of(self.moe, x_TD.dtype), routing, parcels, link)))

    def work(self, sent: Sent, expert_fn: ExpertFn) -> Worked:
        """As in `Exchange`."""
        x_RD, (received, claims, home) = sent
        local = self.make_local(home.traffic.group, home.traffic.expert_rows(self.moe))
        y_RD, stats = local(x_RD, received, expert_fn, claims)
        return Worked(y_RD, (stats, len(claims), home))

    def finish(self, worked: Worked) -> tuple[jax.Array, Stats]:
        """As in `Exchange`."""
        y_RD, (stats, num_claims, (traffic, wire, routing, parcels, link)) = worked
        packing, transport = self._packing(traffic), self._transport(traffic)
        y_ND = ship_home(transport, wire, link, y_RD)
        y_TD = packing.combine(y_ND, routing, link, traffic.num_tokens)
        stats = self._count(stats, routing, parcels, link, transport)
        row = row_bytes(wire, y_RD.shape[1], packing.columns(routing.choices, num_claims))
        bytes_sent = jnp.float32(transport.rows_sent(link)) * row
        return y_TD, stats.replace(bytes_sent=stats.bytes_sent + bytes_sent)

    def _traffic(self, routing, group):
        num_tokens = routing.probs_TE.shape[0]
        group = group or Group.alone(routing)._replace(num_tokens=self.num_devices * num_tokens)
        length, choices = routing.expert_A.shape[0], routing.choices
        return Traffic(group, num_tokens, length, routing.num_experts, self.level.size, self.share, choices)

    def _packing(self, traffic):
        return (SendOnce if traffic.sends_once(self.moe) else OneByOne)(traffic.num_local, self.moe.capacity_priority)

    def _transport(self, traffic) -> Transport:
        sending, arriving = traffic.rows(self.moe)
        if self.moe.exchange == "ragged":
            return RaggedTransport(self.level, arriving, arriving < traffic.peers * traffic.worst_rows(self.moe), sending)
        return FixedTransport(self.level, sending // traffic.peers)

    def _count(self, stats, routing, parcels, link, transport):
        """The counts of this level added to those of what is within."""
        count_N = parcels.count_A.at[link.slots.source_R].get(mode="fill", fill_value=0)
        refused_N = transport.refused(link)
        if refused_N is None:  # what found no row at home
            dropped = jnp.sum(parcels.count_A) - jnp.sum(count_N)
            return stats.replace(load_E=count_load(routing), dropped_sender=stats.dropped_sender + dropped)
        refused_n = jnp.zeros(self.level.size, jnp.int32).at[link.peer_N].add(jnp.where(refused_N, count_N, 0), mode="drop")
        return stats.replace(
            load_E=count_load(routing),
            refused=stats.refused + jnp.sum(refused_n),
            dropped_receiver=stats.dropped_receiver + jax.lax.psum_scatter(refused_n, self.level.axes, tiled=True)[0],
        )
