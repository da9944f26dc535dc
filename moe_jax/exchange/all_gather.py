"""Every device sees its peers' tokens, runs the assignments to its own experts, and the partial sums are reduce-scattered.

Exact whenever the dispatch is: nothing has to fit a buffer between devices. It moves n - 1 copies of every token whatever K is,
where an exact all_to_all moves n - 1 times min(K, E / n) mostly empty rows.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.config import MoEConfig
from moe_jax.dispatch import Group, make_dispatch
from moe_jax.dispatch.contract import ExpertFn, Stats
from moe_jax.exchange.contract import AXIS
from moe_jax.routing.contract import Routing
from moe_jax.routing.losses import count_load


@dataclass(frozen=True)
class AllGather:
    """Gathers tokens and choices, reduce-scatters answers in float32.

    Attributes:
      moe: names the local dispatch and its capacity.
      axis_size: n, devices on the expert axis.
      out_dtype: dtype of y; None for x's.
    """

    moe: MoEConfig
    axis_size: int
    out_dtype: DTypeLike | None = None

    def __call__(self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn) -> tuple[jax.Array, Stats]:
        n, (num_tokens, width) = self.axis_size, x_TD.shape
        alone = Group.alone(routing)
        dispatch = make_dispatch(self.moe, alone._replace(num_tokens=n * num_tokens), jnp.float32)
        all_x_TD = jax.lax.all_gather(x_TD, AXIS, tiled=True)
        partial_TD, stats = dispatch(all_x_TD, _gather_routing(routing, n), expert_fn)
        y_TD = jax.lax.psum_scatter(partial_TD, AXIS, tiled=True)
        token_bytes = width * (x_TD.dtype.itemsize + 4)  # x out, a float32 sum back
        list_bytes = 4 * (2 if routing.choices else 3)  # expert, weight, token
        bytes_sent = (n - 1) * (num_tokens * token_bytes + routing.expert_A.shape[0] * list_bytes)
        stats = stats.replace(load_E=count_load(routing), bytes_sent=jnp.float32(bytes_sent))
        return y_TD.astype(self.out_dtype or x_TD.dtype), stats


def _gather_routing(routing: Routing, n: int) -> Routing:
    """The peers' assignments with this device's experts as 0..E/n and every other expert nowhere.

    Token choice stays choice-major over all peers' tokens; other lists follow one another in the order of the peers.
    """
    num_local, num_tokens = routing.num_experts // n, routing.probs_TE.shape[0]
    lists = routing.choices or 1

    def gather(array_A):
        return jax.lax.all_gather(array_A.reshape(lists, -1), AXIS, axis=1, tiled=True).reshape(-1)

    expert_A = gather(routing.expert_A) - jax.lax.axis_index(AXIS) * num_local
    is_local_A = (expert_A >= 0) & (expert_A < num_local)
    if routing.choices:
        token_A = jnp.tile(jnp.arange(n * num_tokens, dtype=jnp.int32), routing.choices)
    else:
        token_A = gather(routing.token_A + jax.lax.axis_index(AXIS) * num_tokens)
    return Routing(
        token_A=token_A,
        expert_A=jnp.where(is_local_A, expert_A, num_local),
        weight_A=jnp.where(is_local_A, gather(routing.weight_A), 0.0),
        probs_TE=jnp.zeros((n * num_tokens, num_local), jnp.float32),
        logits_TE=jnp.zeros((n * num_tokens, num_local), jnp.float32),
        choices=routing.choices,
    )
