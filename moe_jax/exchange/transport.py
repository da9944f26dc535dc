"""How rows get to the peers and back: fixed buffers, or as many rows as there are.

A transport opens a `Link` for one list of rows; `send` then carries any array [N, ...] with one entry a row of the sender to [R, ...]
at the receivers, and `back` carries [R, ...] home to the [N, ...] it came from. Each is the other's transpose.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from moe_jax.dispatch.slots import Slots, claim_slots, sort_slots
from moe_jax.exchange.ragged_all_to_all import RaggedPlan, plan_ragged, ragged_all_to_all, reverse


class Level(NamedTuple):
    """The devices an exchange is between.

    Attributes:
      axes: names of the mesh axes, as a collective takes them; the peers are numbered over them in this order.
      size: n, their number.
    """

    axes: tuple[str, ...]
    size: int


class Link(NamedTuple):
    """An open exchange.

    Attributes:
      slots: the sender's rows.
      peer_N: int32 in [0, n], where each row goes; n for an empty row.
      plan: offsets and sizes of a ragged exchange.
    """

    slots: Slots
    peer_N: jax.Array
    plan: RaggedPlan | None


class Transport(Protocol):
    """See the module's docstring."""

    level: Level

    @property
    def arriving_rows(self) -> int:
        """R, rows of a receiver's buffer for all its peers together."""
        ...

    def open(self, peer_A: jax.Array, keys: tuple[jax.Array, ...]) -> Link:
        """Gives rows to a list: peer_A int32 in [0, n], n for nowhere; `keys` say who claims a bounded buffer first."""
        ...

    def send(self, link: Link, rows: jax.Array) -> jax.Array:
        """Rows of the sender to the receivers. Rows that nobody sent are zero."""
        ...

    def back(self, link: Link, rows: jax.Array) -> jax.Array:
        """Rows of the receivers to their senders. Rows that were not sent are zero."""
        ...

    def arrived(self, link: Link) -> jax.Array:
        """bool [R], rows of this receiver that may hold something; in the others there are zeros."""
        ...

    def refused(self, link: Link) -> jax.Array | None:
        """bool [N], rows that the receiver had no room for; None when none can be refused on arrival."""
        ...

    def rows_sent(self, link: Link) -> jax.Array | int:
        """Rows this device put on the wire in one direction."""
        ...


@dataclass(frozen=True)
class FixedTransport:
    """`rows` rows to each peer, full or empty; one `all_to_all` whatever the routing."""

    level: Level
    rows: int

    @property
    def arriving_rows(self):
        return self.level.size * self.rows

    def open(self, peer_A, keys):
        slots = claim_slots(peer_A, self.level.size, self.rows, keys)
        peer_N = jnp.repeat(jnp.arange(self.level.size, dtype=jnp.int32), self.rows)
        return Link(slots, jnp.where(slots.source_R < peer_A.shape[0], peer_N, self.level.size), None)

    def send(self, link, rows):
        return jax.lax.all_to_all(rows, self.level.axes, split_axis=0, concat_axis=0, tiled=True)

    back = send  # block p of the sender is block p of what comes back

    def arrived(self, link):
        return jnp.ones(self.arriving_rows, bool)

    def refused(self, link):
        return None

    def rows_sent(self, link):
        return (self.level.size - 1) * self.rows


@dataclass(frozen=True)
class RaggedTransport:
    """Exactly the rows there are, after the counts. Who finds a receiver full: `plan_ragged`.

    Attributes:
      level: the peers.
      arriving_rows: R.
      can_refuse: whether more than R rows can be sent to one receiver.
      sending_rows: N, all a device can want to send.
    """

    level: Level
    arriving_rows: int
    can_refuse: bool
    sending_rows: int

    def open(self, peer_A, keys):
        slots, sizes_n = sort_slots(peer_A, self.level.size, self.sending_rows, keys)
        peer_N = peer_A.at[slots.source_R].get(mode="fill", fill_value=self.level.size)
        return Link(
            slots, peer_N, plan_ragged(sizes_n, self.arriving_rows if self.can_refuse else None, axis_name=self.level.axes)
        )

    def send(self, link, rows):
        return self._move(rows, self.arriving_rows, link.plan)

    def back(self, link, rows):
        return self._move(rows, self.sending_rows, reverse(link.plan))

    def _move(self, rows, num_rows, plan):
        output = jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype)
        return ragged_all_to_all(rows, output, *plan.arguments, axis_name=self.level.axes)

    def arrived(self, link):
        return jnp.arange(self.arriving_rows) < jnp.sum(link.plan.recv_sizes)

    def refused(self, link):
        if not self.can_refuse:
            return None
        start_n, accepted_n = link.plan.input_offsets, link.plan.send_sizes
        place_N = jnp.arange(link.peer_N.shape[0]) - start_n.at[link.peer_N].get(mode="clip")
        is_row_N = link.peer_N < self.level.size
        return is_row_N & (place_N >= accepted_n.at[link.peer_N].get(mode="clip"))

    def rows_sent(self, link):
        sent_n = link.plan.send_sizes
        return jnp.sum(sent_n) - sent_n[jax.lax.axis_index(self.level.axes)]
