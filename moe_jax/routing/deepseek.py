"""DeepSeek-V3 routing: sigmoid affinities, a bias that balances without a loss, a limit on groups.

DeepSeek-V3 (2412.19437) section 2.1.2, eqs. 12-16; the bias is that of Wang et al. (2408.15664). Beyond the package's letters:
`R` groups of experts, `I` = E // R experts in a group, `M` groups that a token may use.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError
from moe_jax.routing.bias_update import RULES, count_margins, update_bias, update_bias_by_quantile
from moe_jax.routing.contract import Router, Routing, Tokens, token_choice
from moe_jax.routing.losses import RoutingSums
from moe_jax.routing.options import check_choice, refuse_constant_weight
from moe_jax.routing.scores import choose, chosen, router_logits

_PATH = "model.moe.router.deepseek"


@dataclass(frozen=True)
class DeepSeek(Router):
    """The k experts with the highest biased affinity; the weights are the affinities without the bias.

    DeepSeek-V3's own values at 256 experts, top 8: num_groups=8, top_groups=4, scale=2.5.
    """

    score: str = "sigmoid"  # affinity: "sigmoid" of each logit (V3, eq. 15) or "softmax" over all experts (V2)
    normalize: bool = True  # divide the chosen affinities by their sum (eq. 13)
    scale: float = (
        1.0  # multiplies the weights, after normalising (V3 2.5): the size of the routed part next to a shared expert
    )
    num_groups: int = 1  # experts stand in this many equal groups of neighbours; one group a node in V3
    top_groups: int = 1  # groups a token may use: at most that many nodes hear of it
    group_best: int = (
        2  # a group counts by the sum of this many of its best affinities: 2 (V3) or 1 (V2, 2405.04434, section 2.2.2)
    )
    bias_update: str = (
        "sign"  # rule of the bias: "sign" (V3), "proportional" to the relative load error, "quantile" (at once), "none"
    )
    bias_speed: float = 0.001  # step of the bias, in units of affinity; too large and the loads swing; "quantile" has none

    def __post_init__(self):
        super().__post_init__()
        check_choice(f"{_PATH}.score", self.score, ("sigmoid", "softmax"))
        check_choice(f"{_PATH}.bias_update", self.bias_update, (*RULES, "quantile"))
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"{_PATH}.scale = {self.scale} must be greater than 0 and finite; 1.0 leaves the weights alone.")
        if not 0 <= self.bias_speed < math.inf:
            raise ConfigError(f"{_PATH}.bias_speed = {self.bias_speed} must be 0 or more and finite; V3 uses 0.001.")
        self._check_groups()
        if self.bias_update == "quantile" and (self.top_groups < self.num_groups or self.top_k == self.num_experts):
            raise ConfigError(
                f"{_PATH}.bias_update = 'quantile' asks how far a token is from its next expert, so all groups must be open and"
                f" model.moe.router.top_k = {self.top_k} less than model.moe.num_experts = {self.num_experts}; use 'sign'."
            )
        if self.top_k == 1 and self.normalize:
            refuse_constant_weight(f"{_PATH}.normalize", self.normalize, f"{_PATH}.normalize=False")

    def _check_groups(self):
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ConfigError(
                f"{_PATH}.num_groups = {self.num_groups} must be at least 1 and divide model.moe.num_experts ="
                f" {self.num_experts}; all groups have the same number of experts."
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ConfigError(
                f"{_PATH}.top_groups = {self.top_groups} must be between 1 and {_PATH}.num_groups = {self.num_groups}."
            )
        if self.group_best < 1:
            raise ConfigError(f"{_PATH}.group_best = {self.group_best} must be at least 1; V3 uses 2, V2 uses 1.")
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > reachable:
            raise ConfigError(
                f"model.moe.router.top_k = {self.top_k} is more than the {reachable} experts of {_PATH}.top_groups ="
                f" {self.top_groups} groups; raise top_groups or lower top_k."
            )

    def init_state(self) -> dict[str, jax.Array]:
        """The balancing bias, which the choice sees and the weights do not."""
        return {"bias_E": jnp.zeros(self.num_experts, jnp.float32)}

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> Routing:
        """See `Router.__call__`."""
        logits_TE = router_logits(tokens, params["w_router_DE"], self.num_experts)
        # Ratios of affinities are taken through their logarithms: a sum of sigmoids underflows where this stays finite.
        if self.score == "sigmoid":
            affinity_TE, log_affinity_TE = jax.nn.sigmoid(logits_TE), jax.nn.log_sigmoid(logits_TE)
        else:
            affinity_TE, log_affinity_TE = jax.nn.softmax(logits_TE), jax.nn.log_softmax(logits_TE)
        biased_TE = affinity_TE + state["bias_E"]
        score_TE = self._limit_groups(biased_TE)
        expert_TK = choose(score_TE, self.top_k, tokens.replay_TM)  # eqs. 14 and 16
        normalized_TK = jax.nn.softmax(chosen(log_affinity_TE, expert_TK))  # eq. 13: s / sum s
        weight_TK = normalized_TK if self.normalize else chosen(affinity_TE, expert_TK)
        probs_TE = jax.nn.softmax(log_affinity_TE)  # eq. 19
        by_quantile = self.bias_update == "quantile"
        sums = {"margin_EQ": count_margins(biased_TE, self.top_k, tokens.mask_T)} if by_quantile else {}
        return token_choice(expert_TK, self.scale * weight_TK, probs_TE, logits_TE, tokens, sums=sums, score_TE=score_TE)

    def _limit_groups(self, biased_TE: jax.Array) -> jax.Array:
        """Node-limited routing: -inf outside the M groups whose `group_best` best biased affinities have the highest sums.

        Not 0: a biased affinity may be negative, and then an expert of a group that lost would win.
        """
        if self.top_groups == self.num_groups:
            return biased_TE
        biased_TRI = biased_TE.reshape(-1, self.num_groups, self.num_experts // self.num_groups)
        best = jax.lax.top_k(biased_TRI, min(self.group_best, biased_TRI.shape[-1]))[0]
        group_TM = choose(best.sum(-1), self.top_groups)
        kept_TR = (group_TM[:, :, None] == jnp.arange(self.num_groups)).any(1)
        return jnp.where(kept_TR[:, :, None], biased_TRI, -jnp.inf).reshape(biased_TE.shape)

    def update(self, state: dict[str, jax.Array], sums: RoutingSums) -> dict[str, jax.Array]:
        """See `bias_update`, with this router's rule and speed."""
        if self.bias_update == "quantile":
            return {"bias_E": update_bias_by_quantile(state["bias_E"], sums.own["margin_EQ"], self.top_k)}
        return {"bias_E": update_bias(state["bias_E"], sums.load_E, self.bias_update, self.bias_speed)}
