"""Switch Transformer routing: one expert a token (Fedus et al., 2101.03961)."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from moe_jax.config import ConfigError
from moe_jax.routing.contract import Routing, token_choice
from moe_jax.routing.options import check_jitter, check_top_k
from moe_jax.routing.scores import choose, chosen, router_logits


@dataclass(frozen=True)
class Switch:
    """Top-1 of a softmax over all experts; the weight is the probability itself, never renormalised (eqs. 1 and 2).

    That the weight is a probability < 1 is what carries the language-model loss's gradient to the router.
    """

    num_experts: int
    top_k: int
    jitter: float = 1e-2  # half-width of the noise that multiplies the router's input in training; 0 is off

    causal: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False

    def __post_init__(self):
        check_top_k(self.num_experts, self.top_k)
        if self.top_k != 1:
            raise ConfigError(
                f"model.moe.router.top_k = {self.top_k} but the router 'switch' chooses one expert a token; set top_k=1, or"
                " model.moe.router.name='mixtral' (with mixtral.normalize='before' for raw probabilities as weights)."
            )
        check_jitter("model.moe.router.switch.jitter", self.jitter)

    @property
    def uses_noise(self) -> bool:
        return self.jitter > 0

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
        """See `Router.__call__`. `bias_E` is not used."""
        logits_TE = router_logits(x_TD, w_DE, self.num_experts, jitter=self.jitter, noise_key=noise_key, token_id_T=token_id_T)
        probs_TE = jax.nn.softmax(logits_TE)
        expert_TK = choose(logits_TE, self.top_k)
        return token_choice(expert_TK, chosen(probs_TE, expert_TK), probs_TE, logits_TE, mask_T)

    def update_bias(self, bias_LE: jax.Array, load_LE: jax.Array) -> jax.Array:
        """The identity: Switch balances by a loss."""
        return bias_LE
