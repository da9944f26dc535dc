"""For few tokens: nothing is sorted or moved; every token goes through every expert that any of them chose, and what it did not choose
is left out of its sum."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.dispatch.contract import ExpertFn, Stats, make_stats
from moe_jax.routing.contract import Routing


@dataclass(frozen=True)
class TouchedDispatch:
    """Dropless. The weights of the touched experts are read once, and no others; the products are of T rows for each of them.

    Where weights are what takes the time, as in a step of decoding, that is the least there is to do. It has no gradient.

    Attributes:
      out_dtype: dtype of y; None for x's.
    """

    out_dtype: DTypeLike | None = None

    def __call__(
        self, x_TD: jax.Array, routing: Routing, expert_fn: ExpertFn, keys: tuple[jax.Array, ...] = ()
    ) -> tuple[jax.Array, Stats]:
        """As in `Dispatch`, with an expert function that takes `weight_TE`; `keys` are not used, as nobody is dropped."""
        y_TD = expert_fn(x_TD, weight_TE=weights_by_expert(routing, x_TD.shape[0]))
        return y_TD.astype(self.out_dtype or x_TD.dtype), make_stats(routing)


def weights_by_expert(routing: Routing, num_tokens: int) -> jax.Array:
    """Each token's weight for each expert, float32 [T, E]; a weight of exactly 0 is no choice."""
    if routing.choices is None:
        empty_TE = jnp.zeros((num_tokens, routing.num_experts), jnp.float32)
        return empty_TE.at[routing.token_A, routing.expert_A].add(routing.weight_A, mode="drop")
    expert_KT, weight_KT = (x_A.reshape(routing.choices, num_tokens) for x_A in (routing.expert_A, routing.weight_A))
    own_KTE = expert_KT[..., None] == jnp.arange(routing.num_experts, dtype=jnp.int32)
    return jnp.sum(jnp.where(own_KTE, weight_KT[..., None], 0), axis=0)
