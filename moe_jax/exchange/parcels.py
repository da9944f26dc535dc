"""What a device packs for its peers, and what a receiver reads off it: rows, the experts they want, who claims a full buffer first.

Assignment by assignment, a row carries one expert and its weight stays at home. Sent once, a row is a token bound for a device, with
all its experts there and their weights, and what comes home is one weighted partial sum (the deduplication of DeepSeek-V3's
dispatch, 2412.19437, sec. 3.2.2).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.dispatch.slots import claim_keys, combine_rows, fill_rows, sum_rows
from moe_jax.exchange.contract import KEPT
from moe_jax.exchange.transport import Link
from moe_jax.routing.contract import Routing

Claims = tuple[jax.Array, ...]  # [A] sort keys, the smallest first: (- weight if that decides, choice, place at home)


class Parcels(NamedTuple):
    """A list of rows to send.

    Attributes:
      peer_A: int32 in [0, n], where each goes; n for nowhere (or with an earlier row of the same token).
      keys: who claims a bounded buffer first; the rest is decided by the order of the list.
      count_A: int32, assignments in each row.
    """

    peer_A: jax.Array
    keys: tuple[jax.Array, ...]
    count_A: jax.Array


def home_claims(routing: Routing, priority: str, device: jax.Array) -> Claims:
    """The claims of a list on device number `device`: as if the lists of all peers were one, device after device."""
    length = routing.probs_TE.shape[0] if routing.choices else routing.expert_A.shape[0]
    index_A = jnp.arange(routing.expert_A.shape[0], dtype=jnp.int32)
    return (*claim_keys(routing, priority), device * length + index_A % length)


@dataclass(frozen=True)
class OneByOne:
    """A row for an assignment.

    Attributes:
      num_local: experts of one peer.
      priority: "position" or "probability".
    """

    num_local: int
    priority: str

    def pack(self, routing: Routing, claims: Claims | None) -> Parcels:
        """The rows of a list; `claims` as they came from elsewhere, None for a list of one's own."""
        peer_A = routing.expert_A // self.num_local
        keys = claims or claim_keys(routing, self.priority)[:-1]
        return Parcels(peer_A, keys, (routing.expert_A < routing.num_experts).astype(jnp.int32))

    def address(self, routing: Routing, claims: Claims | None, link: Link):
        """(weights [N, 0], words [N, W]) that go with the rows: expert, claims."""
        expert_A = jnp.where(routing.expert_A < routing.num_experts, routing.expert_A % self.num_local, self.num_local)
        columns = [expert_A, *(_as_words(key) for key in claims or ())]
        told_AW = jnp.stack(columns, axis=1)
        source_N = link.slots.source_R
        words_NW = told_AW.at[source_N].get(mode="clip")
        empty_N = source_N == expert_A.shape[0]
        words_NW = words_NW.at[:, 0].set(jnp.where(empty_N, self.num_local, words_NW[:, 0]))
        return jnp.zeros((source_N.shape[0], 0), jnp.float32), words_NW

    def read(self, weights_RM, words_RW, is_row_R) -> tuple[Routing, Claims]:
        """The receiver's list, one assignment a row with weight 1, and its claims."""
        expert_R = jnp.where(is_row_R, words_RW[:, 0], self.num_local)
        claims = tuple(words_RW[:, 1:].T)
        if claims and self.priority == "probability":
            claims = (_as_floats(claims[0]), *claims[1:])
        return _received(expert_R, jnp.ones_like(expert_R, jnp.float32), self.num_local, 1), claims

    def columns(self, choices: int | None, num_claims: int) -> int:
        """Words of 4 bytes that travel with a row: its expert and claims."""
        return 1 + num_claims

    def combine(self, y_ND, routing: Routing, link: Link, num_tokens: int) -> jax.Array:
        """Each token's weighted sum of what came home, float32 [T, D]; the weights' gradients need the answers again."""
        y_ND = checkpoint_name(y_ND, KEPT)
        return combine_rows(y_ND, routing, link.slots, num_tokens)


@dataclass(frozen=True)
class SendOnce:
    """A row for a token and a peer; for lists of token choice.

    Attributes: as in `OneByOne`.
    """

    num_local: int
    priority: str

    def pack(self, routing: Routing, claims: Claims | None) -> Parcels:
        """A token's first assignment to a peer is the row; the others ride with it."""
        keys_A = claims or claim_keys(routing, self.priority)[:-1]
        peers = jnp.split(routing.expert_A // self.num_local, routing.choices)
        weights = jnp.split(jax.lax.stop_gradient(routing.weight_A), routing.choices)
        nowhere = routing.num_experts // self.num_local
        rows, counts, best = [], [], []
        for k, peer_T in enumerate(peers):
            is_first_T = ~sum((earlier_T == peer_T for earlier_T in peers[:k]), jnp.zeros_like(peer_T, bool))
            rows.append(jnp.where(is_first_T, peer_T, nowhere))
            riders = [(later_T == peer_T) & is_first_T & (peer_T < nowhere) for later_T in peers[k:]]
            counts.append(sum(rider_T.astype(jnp.int32) for rider_T in riders))
            best.append(
                jnp.max(jnp.stack([jnp.where(r, w, -jnp.inf) for r, w in zip(riders, weights[k:], strict=True)]), axis=0)
            )
        if self.priority == "probability" and keys_A:
            keys_A = (-jnp.concatenate(best), *keys_A[1:])
        return Parcels(jnp.concatenate(rows), keys_A, jnp.concatenate(counts))

    def address(self, routing: Routing, claims: Claims | None, link: Link):
        """(weights [N, K], words [N, K (+ 1)]): experts at this peer and nowhere for the others; the token's place."""
        expert_TK = routing.expert_A.reshape(routing.choices, -1).T
        weight_TK = routing.weight_A.reshape(routing.choices, -1).T
        columns = [expert_TK] + ([claims[-1][: expert_TK.shape[0], None]] if claims else [])
        told_NW = fill_rows(jnp.concatenate(columns, axis=1), routing, link.slots)
        expert_NK, place_N1 = told_NW[:, : routing.choices], told_NW[:, routing.choices :]
        is_here_NK = (expert_NK // self.num_local == link.peer_N[:, None]) & (expert_NK < routing.num_experts)
        expert_NK = jnp.where(is_here_NK, expert_NK % self.num_local, self.num_local)
        weight_NK = jnp.where(is_here_NK, fill_rows(weight_TK, routing, link.slots), 0.0)
        return weight_NK, jnp.concatenate([expert_NK, place_N1], axis=1)

    def read(self, weights_RM, words_RW, is_row_R) -> tuple[Routing, Claims]:
        """The receiver's list: the rows are its tokens, and the order of a token's choices is what it was at home."""
        choices = weights_RM.shape[1]
        expert_RK = jnp.where(is_row_R[:, None], words_RW[:, :choices], self.num_local)
        routing = _received(expert_RK.T.reshape(-1), weights_RM.T.reshape(-1), self.num_local, choices)
        if words_RW.shape[1] == choices:
            return routing, ()
        return routing, (*claim_keys(routing, self.priority), jnp.tile(words_RW[:, choices], choices))

    def columns(self, choices: int, num_claims: int) -> int:
        """Words of 4 bytes that travel with a row: K experts, K weights, the token's place if there are claims."""
        return 2 * choices + (num_claims > 0)

    def combine(self, y_ND, routing: Routing, link: Link, num_tokens: int) -> jax.Array:
        """Each token's sum of the partial sums that came home, float32 [T, D]."""
        return sum_rows(y_ND, routing.choices, link.slots)


def _received(expert_A, weight_A, num_local, choices):
    num_rows = expert_A.shape[0] // choices
    unused_RE = jnp.zeros((num_rows, num_local), jnp.float32)
    token_A = jnp.tile(jnp.arange(num_rows, dtype=jnp.int32), choices)
    return Routing(token_A, expert_A, weight_A, unused_RE, unused_RE, choices)


def _as_words(key):
    return key if key.dtype == jnp.int32 else jax.lax.bitcast_convert_type(key.astype(jnp.float32), jnp.int32)


def _as_floats(words):
    return jax.lax.bitcast_convert_type(words, jnp.float32)
