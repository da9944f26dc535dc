"""What a router is and what it returns: a flat list of assignments, the same for every router of the literature."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Routing:
    """The choices of a router for T tokens, as a flat list of A assignments.

    The order of the list is the order in which assignments claim capacity: *choice-major*, all first choices in token order, then
    all second choices (GShard, 2006.16668, section 3.2).

    Attributes:
      token_A: int32, the row of x the assignment takes.
      expert_A: int32 in [0, E]; E means nowhere (a padding token, a null expert).
      weight_A: float32, the weight of the expert's answer in the token's sum; 0 where the expert is E.
      probs_TE: float32, each row sums to 1: the router's soft preference, differentiable, for the balance losses. Padding too.
      logits_TE: float32, for the z-loss.
      choices: K when the list is exactly `token_A == tile(arange(T), K)` (token choice), else None. A static fact that lets a
        combine be a gather and a sum in place of a scatter.
    """

    token_A: jax.Array
    expert_A: jax.Array
    weight_A: jax.Array
    probs_TE: jax.Array
    logits_TE: jax.Array
    choices: int | None = struct.field(pytree_node=False, default=None)

    @property
    def num_experts(self) -> int:
        return self.probs_TE.shape[-1]


class Router(Protocol):
    """A routing rule. Frozen and hashable; parameters and state come in as arrays.

    Attributes:
      causal: True when a token's routing depends on no later token; a language model refuses a router that is not.
      has_bias: True when the choice uses a balancing bias, which `update_bias` moves once per optimizer step.
      uses_noise: True when training needs `noise_key`.
    """

    causal: bool
    has_bias: bool
    uses_noise: bool

    def __call__(
        self,
        x_TD: jax.Array,
        w_DE: jax.Array,
        bias_E: jax.Array,
        mask_T: jax.Array,
        *,
        noise_key: jax.Array | None = None,
        token_id_T: jax.Array | None = None,
    ) -> Routing:
        """Routes T tokens.

        Args:
          x_TD: tokens, any float dtype; the arithmetic is float32.
          w_DE: float32 router weights.
          bias_E: float32 balancing bias, for the choice only; zeros for a router without one.
          mask_T: bool, False for padding, which goes nowhere.
          noise_key: typed key for this step and layer; None (evaluation) means no noise.
          token_id_T: int32, the token's place in the global batch. Noise is a function of (noise_key, token id) alone, so that it
            does not change with the sharding or with gradient accumulation. Required with `noise_key`.
        """
        ...

    def update_bias(self, bias_LE: jax.Array, load_LE: jax.Array) -> jax.Array:
        """The bias for the next step from this step's global loads [L, E] (int32). The identity without a bias."""
        ...


def token_choice(
    expert_TK: jax.Array, weight_TK: jax.Array, probs_TE: jax.Array, logits_TE: jax.Array, mask_T: jax.Array
) -> Routing:
    """Flattens per-token choices into a choice-major `Routing`; padding tokens go nowhere with weight 0."""
    num_tokens, choices = expert_TK.shape
    num_experts = probs_TE.shape[-1]
    expert_TK = jnp.where(mask_T[:, None], expert_TK.astype(jnp.int32), num_experts)
    weight_TK = jnp.where(mask_T[:, None], weight_TK.astype(jnp.float32), 0.0)
    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    return Routing(
        token_A=jnp.tile(token_T, choices),
        expert_A=expert_TK.T.reshape(-1),
        weight_A=weight_TK.T.reshape(-1),
        probs_TE=probs_TE,
        logits_TE=logits_TE,
        choices=choices,
    )
