"""RL-R: the router is a policy, trained by REINFORCE with a learned baseline (Clark et al., 2202.01169, section 2.2.3).

The router of a layer sees the token, its action is the expert, its reward the log-likelihood of the token's target. The forms of the
terms and their weights are this module's: with the action a of a token, its reward r and its baseline b,

    loss = nll + policy_weight * -log pi(a | x) (r - b) + baseline_weight * (r - b)^2 - entropy_weight * H(pi(. | x))

in every layer, where r - b in the second term and r in the third take no gradient (Williams, 1992; Sutton and Barto, section 13.4).
Rewards of later tokens, on which an action has an influence through attention, are left out. The paper's balancing term is
`model.moe.balance_loss_weight`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError
from moe_jax.routing.contract import ParamSpec, Router, Routing, Tokens, token_choice
from moe_jax.routing.losses import RoutingSums
from moe_jax.routing.options import check_choice, check_weight
from moe_jax.routing.scores import choose, chosen, noise, router_logits

_PATH = "model.moe.router.reinforce"


@dataclass(frozen=True)
class Reinforce(Router):
    """In training experts are sampled from softmax(x W); in evaluation they are the most likely.

    The paper samples one expert. For `top_k` > 1 the k are drawn one after the other without replacement, by the k highest of logits
    plus Gumbel noise (1903.06059); an action is the ordered draw, whose probability is that of Plackett and Luce.

    With `weigh="uniform"` the weights are constant and the policy gradient is the only way from the language-model loss to the router;
    with policy_weight = 1 it is, in expectation and up to the influence on later tokens, the gradient of the expected loss.
    `weigh="probability"` lets the loss through the weights too, as in Switch.
    """

    weigh: str = "uniform"  # weight of an answer: "uniform" 1 / top_k, or its "probability" among all experts
    policy_weight: float = 1.0  # of the policy-gradient loss; 1 goes with the language-model loss, 0 is off
    baseline_weight: float = 0.01  # of the baseline's squared error, which moves the baseline's parameters alone
    baseline_start: float = 0.0  # the baseline's first value; -ln(vocabulary) is the reward of knowing nothing
    entropy_weight: float = 0.0  # of the mean entropy of the policy in nats, a bonus against early certainty; 0 is off

    has_reward_loss: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_choice(f"{_PATH}.weigh", self.weigh, ("uniform", "probability"))
        for option in ("policy_weight", "baseline_weight", "entropy_weight"):
            check_weight(f"{_PATH}.{option}", getattr(self, option))
        if not math.isfinite(self.baseline_start):
            raise ConfigError(f"{_PATH}.baseline_start = {self.baseline_start} must be finite; 0.0 or -ln(vocabulary) will do.")
        if self.weigh == "uniform" and self.policy_weight == 0:
            raise ConfigError(
                f"{_PATH}.policy_weight = {self.policy_weight} with {_PATH}.weigh = 'uniform' leaves the router no gradient from the"
                " language-model loss; set a policy_weight greater than 0, or weigh='probability'."
            )

    @property
    def uses_noise(self) -> bool:
        return True

    @property
    def has_loss(self) -> bool:
        return self.entropy_weight > 0

    def params(self, d_model: int) -> dict[str, ParamSpec]:
        """The policy, and the baseline `x w + b`, which starts as a constant."""
        return super().params(d_model) | {
            "w_router_baseline_D": ParamSpec((d_model,), 0.0),
            "b_router_baseline_1": ParamSpec((1,), self.baseline_start),
        }

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> Routing:
        """See `Router.__call__`. `per_token` has "log_prob", of the choice as made, and "baseline"; both 0 for padding."""
        logits_TE = router_logits(tokens, params["w_router_DE"], self.num_experts)
        probs_TE = jax.nn.softmax(logits_TE)
        scores_TE = logits_TE
        if tokens.noise_key is not None:
            scores_TE = logits_TE + noise(tokens, lambda key: jax.random.gumbel(key, (self.num_experts,)))
        expert_TK = choose(scores_TE, self.top_k, tokens.replay_TM)
        weight_TK = chosen(probs_TE, expert_TK) if self.weigh == "probability" else jnp.full(expert_TK.shape, 1.0 / self.top_k)
        valued = {"log_prob": log_prob_of(logits_TE, expert_TK), "baseline": _baseline(tokens, params)}
        per_token = {name: jnp.where(tokens.mask_T, array_T, 0.0) for name, array_T in valued.items()}
        sums = {}
        if self.entropy_weight > 0:
            entropy_T = -jnp.sum(probs_TE * jax.nn.log_softmax(logits_TE), axis=-1)
            sums = {"policy_entropy": jnp.sum(jnp.where(tokens.mask_T, entropy_T, 0.0))}
        more = {"sums": sums, "per_token": per_token, "score_TE": scores_TE}
        return token_choice(expert_TK, weight_TK, probs_TE, logits_TE, tokens, **more)

    def loss(self, sums: RoutingSums, state: dict[str, jax.Array]) -> jax.Array:
        """Minus the weighted mean entropy of the policy, nats."""
        if not self.has_loss:
            return jnp.zeros(())
        return -self.entropy_weight * sums.own["policy_entropy"] / jnp.maximum(sums.num_tokens, 1)

    def reward_loss(self, per_token: dict[str, jax.Array], reward_T: jax.Array) -> jax.Array:
        """The policy-gradient loss and the baseline's, of each token; of any shape that broadcasts."""
        reward_T = jax.lax.stop_gradient(reward_T)
        error_T = reward_T - per_token["baseline"]
        policy_T = -per_token["log_prob"] * jax.lax.stop_gradient(error_T)
        return self.policy_weight * policy_T + self.baseline_weight * jnp.square(error_T)


def log_prob_of(logits_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
    """log of the probability [T] of drawing these experts in this order without replacement; of nowhere it is 1.

    sum_k (logit_k - logsumexp over the experts not drawn before the k-th): Plackett-Luce (1903.06059).
    """
    drawn_TKE = jax.nn.one_hot(expert_TK, logits_TE.shape[-1], dtype=jnp.int32)  # a row of zeros for nowhere
    before_TKE = jnp.cumsum(drawn_TKE, axis=1) - drawn_TKE
    left_TKE = jnp.where(before_TKE > 0, -jnp.inf, logits_TE[:, None, :])
    log_prob_TK = chosen(logits_TE, expert_TK) - jax.nn.logsumexp(left_TKE, axis=-1)
    return jnp.sum(jnp.where(expert_TK < logits_TE.shape[-1], log_prob_TK, 0.0), axis=-1)


def _baseline(tokens, params):
    """The expected reward, [T]; it learns from what the token is and teaches the token nothing."""
    x_TD = jax.lax.stop_gradient(tokens.x_TD.astype(jnp.float32))
    product_T = jnp.einsum("TD,D->T", x_TD, params["w_router_baseline_D"], precision=jax.lax.Precision.HIGHEST)
    return product_T + params["b_router_baseline_1"]
