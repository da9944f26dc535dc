"""The token exchange: each assignment travels to its expert's device and its answer comes home (GShard, 2006.16668, sec. 3.2).

Every peer has a buffer of R rows at the sender, fixed when the program is compiled. With `exchange_factor` 0, R is the worst
case and the exchange exact; with a factor, R is that many times the balanced number, and what does not fit is dropped and
counted.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.config import MoEConfig
from moe_jax.dispatch import Group, make_dispatch
from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.dispatch.slots import Slots, claim_keys, claim_slots, combine_rows, fill_rows
from moe_jax.exchange.contract import AXIS
from moe_jax.routing.contract import Routing
from moe_jax.routing.losses import count_load

_send = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)  # row block p goes to peer p


def peer_rows(num_tokens: int, num_assignments: int, num_experts: int, axis_size: int, factor: float) -> int:
    """R, rows a device can send to one peer, `min(worst, max(1, ceil(factor * T * K / n)))`; factor 0 is the worst case.

    The worst case is `T * min(K, E / n)`: no token has two assignments to one expert.
    """
    worst = min(num_assignments, num_tokens * (num_experts // axis_size))
    if factor == 0:
        return worst
    return min(worst, max(1, math.ceil(Fraction(str(factor)) * num_assignments / axis_size)))


@dataclass(frozen=True)
class AllToAll:
    """Fixed buffers to every peer, one `all_to_all` for the rows, one for who they are, one for the answers.

    Attributes:
      moe: names the local dispatch, its capacity, and the factor of the peers' buffers.
      axis_size: n, devices on the expert axis.
      out_dtype: dtype of y; None for x's.
    """

    moe: MoEConfig
    axis_size: int
    out_dtype: DTypeLike | None = None

    def __call__(self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn) -> tuple[jax.Array, Stats]:
        n, (num_tokens, width) = self.axis_size, x_TD.shape
        num_assignments, num_local = routing.expert_A.shape[0], routing.num_experts // n
        rows = peer_rows(num_tokens, num_assignments, routing.num_experts, n, self.moe.exchange_factor)
        keys = claim_keys(routing, self.moe.capacity_priority)
        slots = claim_slots(routing.expert_A // num_local, n, rows, keys[:-1])  # E // (E / n) is n: no peer
        received, keys = _receive(routing, slots, keys, num_local)
        alone = Group.alone(routing)
        dispatch = make_dispatch(self.moe, alone._replace(num_tokens=n * num_tokens))
        y_RD, stats = dispatch(_send(fill_rows(x_TD, routing, slots)), received, expert_fn, keys)
        y_TD = combine_rows(_send(y_RD), routing, slots, num_tokens)
        row_bytes = 2 * width * x_TD.dtype.itemsize + 4 * (1 + len(keys))
        stats = stats.replace(
            load_E=count_load(routing),
            dropped_sender=slots.dropped,
            bytes_sent=jnp.float32((n - 1) * rows * row_bytes),
        )
        return y_TD.astype(self.out_dtype or x_TD.dtype), stats


def _receive(routing: Routing, slots: Slots, keys: tuple[jax.Array, ...], num_local: int):
    """Tells the peers which expert each row wants and its claim keys; returns what the peers told, as one assignment a row.

    The weights stay at home: here they are 1. Empty rows go nowhere.
    """
    empty_R = slots.source_R == routing.expert_A.shape[0]

    def exchange(array_A, empty):
        sent_R = jnp.where(empty_R, empty, array_A.at[slots.source_R].get(mode="clip"))
        return jax.lax.bitcast_convert_type(sent_R.astype(array_A.dtype), jnp.int32)

    told_RM = _send(jnp.stack([exchange(routing.expert_A % num_local, num_local), *(exchange(key, 0) for key in keys)], axis=1))
    num_rows = told_RM.shape[0]
    unused_RE = jnp.zeros((num_rows, num_local), jnp.float32)
    received = Routing(
        token_A=jnp.arange(num_rows, dtype=jnp.int32),
        expert_A=told_RM[:, 0],
        weight_A=jnp.ones(num_rows, jnp.float32),
        probs_TE=unused_RE,
        logits_TE=unused_RE,
        choices=1,
    )
    return received, tuple(jax.lax.bitcast_convert_type(told_RM[:, 1 + i], key.dtype) for i, key in enumerate(keys))
