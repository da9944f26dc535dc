"""No buffers, nothing dropped: sort the assignments by expert, multiply group by group, sum each token's answers.

MegaBlocks (2211.15841) without its padding to blocks: `ops/grouped_matmul` takes groups of any size.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.dispatch.contract import ExpertFn, Stats, make_stats
from moe_jax.dispatch.slots import combine_rows, fill_rows, sort_slots
from moe_jax.routing.contract import Routing


@dataclass(frozen=True)
class DroplessDispatch:
    """Sorted rows and group sizes.

    Attributes:
      out_dtype: dtype of y; None for x's.
      rows: rows that the experts compute at most, all together; None for one an assignment, so that nothing is dropped. A receiver
        whose list is mostly nowhere sets it. The last of the list are dropped first, and counted as `dropped_receiver`.
    """

    out_dtype: DTypeLike | None = None
    rows: int | None = None

    def __call__(
        self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn, keys: tuple[jax.Array, ...] = ()
    ) -> tuple[jax.Array, Stats]:
        """As in `Dispatch`; `keys` are not used: who is refused, if anybody, is at the end of the list."""
        expert_A, dropped = routing.expert_A, jnp.zeros((), jnp.int32)
        rows = min(self.rows or expert_A.shape[0], expert_A.shape[0])
        if rows < expert_A.shape[0]:
            somewhere_A = expert_A < routing.num_experts
            kept_A = somewhere_A & (jnp.cumsum(somewhere_A) <= rows)
            expert_A = jnp.where(kept_A, expert_A, routing.num_experts)
            dropped = jnp.sum(somewhere_A, dtype=jnp.int32) - jnp.sum(kept_A, dtype=jnp.int32)
        slots, group_sizes_E = sort_slots(expert_A, routing.num_experts, rows)
        y_RD = expert_fn(fill_rows(x_TD, routing, slots), group_sizes_E)
        y_TD = combine_rows(y_RD, routing, slots, x_TD.shape[0])
        return y_TD.astype(self.out_dtype or x_TD.dtype), make_stats(routing, dropped_receiver=dropped)
