"""No buffers, nothing dropped: sort the assignments by expert, multiply group by group, sum each token's answers.

MegaBlocks (2211.15841) without its padding to blocks: `ops/grouped_matmul` takes groups of any size.
"""

from dataclasses import dataclass

import jax
from jax.typing import DTypeLike

from moe_jax.dispatch.contract import ExpertFn, Stats, make_stats
from moe_jax.dispatch.slots import combine_rows, fill_rows, sort_slots
from moe_jax.routing.contract import Routing


@dataclass(frozen=True)
class DroplessDispatch:
    """Sorted rows [A, D] and group sizes.

    Attributes:
      out_dtype: dtype of y; None for x's.
    """

    out_dtype: DTypeLike | None = None

    def __call__(
        self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn, keys: tuple[jax.Array, ...] = ()
    ) -> tuple[jax.Array, Stats]:
        """As in `Dispatch`; `keys` are not used, as no row is ever refused."""
        slots, group_sizes_E = sort_slots(routing.expert_A, routing.num_experts)
        y_AD = expert_fn(fill_rows(x_TD, routing, slots), group_sizes_E)
        y_TD = combine_rows(y_AD, routing, slots, x_TD.shape[0])
        return y_TD.astype(self.out_dtype or x_TD.dtype), make_stats(routing)
