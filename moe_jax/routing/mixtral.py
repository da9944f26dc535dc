"""Top-k routing by softmax: Shazeer et al. (1701.06538) without the noise, as in Mixtral (2401.04088), OLMoE (2409.02060)."""

from dataclasses import dataclass
from typing import ClassVar

import jax

from moe_jax.routing.contract import Routing, token_choice
from moe_jax.routing.options import check_choice, check_jitter, check_top_k, refuse_constant_weight
from moe_jax.routing.scores import choose, chosen, router_logits


@dataclass(frozen=True)
class Mixtral:
    """The k experts with the highest logits.

    `normalize="after"` takes the softmax after the choice, over the k chosen logits: `Softmax(TopK(x W))` (2401.04088, section
    2.1). The weights sum to 1; dividing the chosen probabilities by their sum (`norm_topk_prob` elsewhere) is the same number.
    `normalize="before"` takes it over all experts: the weights are raw probabilities and sum to less than 1 (DeepSeekMoE,
    2401.06066; OLMoE).
    """

    num_experts: int
    top_k: int
    normalize: str = "after"  # softmax "after" the choice (weights sum to 1) or "before" it (raw probabilities)
    jitter: float = 0.0  # half-width of the noise that multiplies the router's input in training; 0 is off

    causal: ClassVar[bool] = True
    has_bias: ClassVar[bool] = False

    def __post_init__(self):
        check_top_k(self.num_experts, self.top_k)
        check_choice("model.moe.router.mixtral.normalize", self.normalize, ("after", "before"))
        check_jitter("model.moe.router.mixtral.jitter", self.jitter)
        if self.top_k == 1 and self.normalize == "after":
            path = "model.moe.router.mixtral.normalize"
            refuse_constant_weight(path, self.normalize, f"{path}='before'")

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
        weight_TK = jax.nn.softmax(chosen(logits_TE, expert_TK)) if self.normalize == "after" else chosen(probs_TE, expert_TK)
        return token_choice(expert_TK, weight_TK, probs_TE, logits_TE, mask_T)

    def update_bias(self, bias_LE: jax.Array, load_LE: jax.Array) -> jax.Array:
        """The identity: Mixtral balances by a loss."""
        return bias_LE
