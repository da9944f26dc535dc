"""Top-k routing by softmax: Shazeer et al. (1701.06538) without the noise, as in Mixtral (2401.04088), OLMoE (2409.02060)."""

from dataclasses import dataclass

import jax

from moe_jax.routing.contract import ParamSpec, Router, Routing, Tokens, token_choice
from moe_jax.routing.options import check_choice, check_dropout, check_jitter, refuse_constant_weight
from moe_jax.routing.scores import choose_open, chosen, router_logits


@dataclass(frozen=True)
class Mixtral(Router):
    """The k experts with the highest logits.

    `normalize="after"` takes the softmax after the choice, over the k chosen logits: `Softmax(TopK(x W))` (2401.04088, section
    2.1). The weights sum to 1; dividing the chosen probabilities by their sum (`norm_topk_prob` elsewhere) is the same number.
    `normalize="before"` takes it over all experts: the weights are raw probabilities and sum to less than 1 (DeepSeekMoE,
    2401.06066; OLMoE). With `expert_dropout` probabilities are over the experts that are open to the token. With `bias` the logits
    are x W + b (gpt-oss, 2508.10925), b learned like W and part of the weights as of the choice.
    """

    normalize: str = "after"  # softmax "after" the choice (weights sum to 1) or "before" it (raw probabilities)
    jitter: float = 0.0  # half-width of the noise that multiplies the router's input in training; 0 is off
    expert_dropout: float = 0.0  # probability that an expert is closed to a token in training; 0 is off
    bias: bool = False  # True: a learned bias on the logits

    def __post_init__(self):
        super().__post_init__()
        check_choice("model.moe.router.mixtral.normalize", self.normalize, ("after", "before"))
        check_jitter("model.moe.router.mixtral.jitter", self.jitter)
        check_dropout("model.moe.router.mixtral.expert_dropout", self.expert_dropout)
        if self.top_k == 1 and self.normalize == "after":
            path = "model.moe.router.mixtral.normalize"
            refuse_constant_weight(path, self.normalize, f"{path}='before'")

    @property
    def uses_noise(self) -> bool:
        return self.jitter > 0 or self.expert_dropout > 0

    def params(self, d_model: int) -> dict[str, ParamSpec]:
        """See `Router.params`."""
        return super().params(d_model) | ({"b_router_E": ParamSpec((self.num_experts,), 0.0)} if self.bias else {})

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> Routing:
        """See `Router.__call__`."""
        logits_TE = router_logits(tokens, params["w_router_DE"], self.num_experts, jitter=self.jitter)
        logits_TE = logits_TE + params["b_router_E"] if self.bias else logits_TE
        expert_TK, open_TE = choose_open(logits_TE, self.top_k, tokens, self.expert_dropout)
        probs_TE = jax.nn.softmax(open_TE)
        weight_TK = jax.nn.softmax(chosen(logits_TE, expert_TK)) if self.normalize == "after" else chosen(probs_TE, expert_TK)
        return token_choice(expert_TK, weight_TK, probs_TE, logits_TE, tokens)
