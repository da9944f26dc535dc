"""Experts without computation beside the real ones: MoE++ (2410.07348) and LongCat-Flash (2509.01322).

Beyond the package's letters: `Z` null experts, `X` = E + Z experts of both kinds, of which the last `J` are constant ones, mixes
of 2 parts (`P` where a letter is needed).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError
from moe_jax.routing.contract import ParamSpec, Router, Routing, Tokens, token_choice
from moe_jax.routing.losses import RoutingSums
from moe_jax.routing.scores import choose, chosen, router_logits

_PATH = "model.moe.router.zero_experts"


@dataclass(frozen=True)
class ZeroExperts(Router):
    """Top-k of a softmax over real and null experts, so that a token decides how many real ones it runs through.

    Choices are 0 .. E - 1 for real experts, then `num_zero` that answer 0, `num_copy` that answer x (MoE++ eqs. 3 and 4) and
    `num_constant` that answer a1 x + a2 v, [a1, a2] = softmax(x W_c), v and W_c trained (eq. 5). Weights are the raw probabilities
    (eq. 1; MoE++'s published code renormalises them without the zero expert's) times `scale`. A null choice goes nowhere in the
    list of assignments; what copy and constant experts answer stands in `Routing.beside_TD`. LongCat-Flash at 512 real experts, top 12:
    num_zero=0, num_copy=256, num_constant=0, scale=6, expected_real=8; MoE++ at 8, top 2: the defaults and a balance_weight.

    Two ways to steer how much goes to whom; both may be on:
      `balance_weight`: MoE++'s heterogeneous balance loss, eq. 7. Null experts get 1 / tau times the tokens of a real one.
      `expected_real`: a bias on the choice of the real experts moves each to expected_real / E of the tokens, null experts get the rest
        (LongCat-Flash section 2.1.1).

    MoE++'s gating residuals (eq. 6) need the logits of the layer before, which a router here does not see, and its unequal capacities
    (eq. 8) are not needed where null experts have no buffer. The balance loss and the load of `model.moe` are those of the real experts
    among themselves; the z-loss is that of all X logits.
    """

    num_zero: int = 1  # null experts that answer 0
    num_copy: int = 1  # null experts that answer the token itself
    num_constant: int = 2  # null experts that answer a mix of the token and a trained vector
    scale: float = 1.0  # multiplies all weights (LongCat-Flash 6.0)
    balance_weight: float = 0.0  # weight of the heterogeneous balance loss, which is 1 at its balance; 0 is off
    tau: float = 0.75  # the balance loss counts a null expert tau times; below 1 gives null experts more tokens
    expected_real: float = 0.0  # real experts a token is to have on average, by a bias on the choice; 0 is off
    bias_speed: float = 0.03  # step of that bias, in units of probability, by error of an expert's share of all choices

    def __post_init__(self):
        super().__post_init__()
        for option in ("num_zero", "num_copy", "num_constant"):
            if getattr(self, option) < 0:
                raise ConfigError(f"{_PATH}.{option} = {getattr(self, option)} must be 0 or more; it is a number of experts.")
        if self.num_null == 0:
            raise ConfigError(
                f"{_PATH}.num_zero, num_copy and num_constant = 0 leave no null expert; give one, or choose the router 'mixtral'."
            )
        for option in ("scale", "tau"):
            if not 0 < getattr(self, option) < math.inf:
                raise ConfigError(
                    f"{_PATH}.{option} = {getattr(self, option)} must be greater than 0 and finite; 1.0 is neutral."
                )
        for option in ("balance_weight", "bias_speed"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ConfigError(f"{_PATH}.{option} = {getattr(self, option)} must be 0 or more and finite.")
        fewest = max(self.top_k - self.num_null, 0)
        if self.expected_real != 0 and not fewest <= self.expected_real <= self.top_k:
            raise ConfigError(
                f"{_PATH}.expected_real = {self.expected_real} must be between {fewest} and model.moe.router.top_k = {self.top_k},"
                f" with {self.num_null} null experts; 0 leaves it to the router."
            )

    @property
    def num_null(self) -> int:
        """Z."""
        return self.num_zero + self.num_copy + self.num_constant

    @property
    def has_loss(self) -> bool:
        return self.balance_weight > 0

    @property
    def active_experts(self) -> float:
        """Real experts a token: `expected_real`; or where the balance loss is at its minimum; or where all X are chosen alike.

        What is aimed at, not what is measured: that is the metric router/experts_per_token.
        """
        if self.expected_real:
            return self.expected_real
        real = self.num_experts * (self.tau if self.has_loss else 1.0)
        return self.top_k * real / (real + self.num_null)

    def params(self, d_model: int) -> dict[str, ParamSpec]:
        """The router over all X; v and W_c of the constant experts."""
        specs = {"w_router_DX": ParamSpec((d_model, self.num_experts + self.num_null))}
        if self.num_constant:
            specs["w_router_constant_JD"] = ParamSpec((self.num_constant, d_model))
            specs["w_router_constant_mix_JD2"] = ParamSpec((self.num_constant, d_model, 2))
        return specs

    def init_state(self) -> dict[str, jax.Array]:
        """The bias of the real experts, where `expected_real` asks for one; that of null experts is always 0."""
        return {"bias_E": jnp.zeros(self.num_experts, jnp.float32)} if self.expected_real else {}

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> Routing:
        """See `Router.__call__`. `choice_TM` holds the choices among all X; X is nowhere (padding)."""
        E, X = self.num_experts, self.num_experts + self.num_null
        logits_TX = router_logits(tokens, params["w_router_DX"], X)
        probs_TX = jax.nn.softmax(logits_TX)
        biased_TX = probs_TX.at[:, :E].add(state["bias_E"]) if self.expected_real else probs_TX
        choice_TK = choose(biased_TX, self.top_k, tokens.replay_TM)
        choice_TK = jnp.where(tokens.mask_T[:, None], choice_TK, X)
        weight_TK = tokens.replay_weight_TM
        if weight_TK is None:
            weight_TK = self.scale * chosen(probs_TX, choice_TK)
        weight_TK = jnp.where(choice_TK < X, weight_TK, 0.0)
        return token_choice(
            jnp.minimum(choice_TK, E),
            weight_TK,
            jax.nn.softmax(logits_TX[:, :E]),
            logits_TX,
            tokens,
            score_TE=biased_TX[:, :E],
            beside_TD=self._answer(tokens.x_TD.astype(jnp.float32), choice_TK, weight_TK, params),
            sums=self._sums(choice_TK, probs_TX, tokens.mask_T) if self.has_loss else {},
            choice_TM=choice_TK,
            choice_weight_TM=weight_TK,
        )

    def _answer(self, x_TD, choice_TK, weight_TK, params):
        """The weighted answers of copy and constant experts; None where there are neither."""
        if self.num_copy + self.num_constant == 0:
            return None
        first_copy = self.num_experts + self.num_zero
        first_constant = first_copy + self.num_copy
        copied_TK = (choice_TK >= first_copy) & (choice_TK < first_constant)
        on_x_T = jnp.sum(jnp.where(copied_TK, weight_TK, 0.0), 1)
        if self.num_constant == 0:
            return on_x_T[:, None] * x_TD
        constant_TKJ = choice_TK[:, :, None] == first_constant + jnp.arange(self.num_constant)
        weight_TJ = jnp.sum(jnp.where(constant_TKJ, weight_TK[:, :, None], 0.0), 1)
        highest = jax.lax.Precision.HIGHEST
        mix_TJ2 = jax.nn.softmax(jnp.einsum("TD,JDP->TJP", x_TD, params["w_router_constant_mix_JD2"], precision=highest))
        on_x_T += jnp.sum(weight_TJ * mix_TJ2[:, :, 0], 1)
        on_v_TJ = weight_TJ * mix_TJ2[:, :, 1]
        return on_x_T[:, None] * x_TD + jnp.einsum("TJ,JD->TD", on_v_TJ, params["w_router_constant_JD"], precision=highest)

    def _sums(self, choice_TK, probs_TX, mask_T):
        """Choices and probabilities of all X, over valid tokens."""
        load_X = jnp.zeros(probs_TX.shape[1] + 1, jnp.int32).at[choice_TK].add(1)[:-1]
        return {"load_X": load_X, "prob_sum_X": jnp.sum(jnp.where(mask_T[:, None], probs_TX, 0.0), 0)}

    def loss(self, sums: RoutingSums, state: dict[str, jax.Array]) -> jax.Array:
        """MoE++ eq. 7, sum_i eta_i f_i P_i with eta = 1 for real experts and tau for null ones; times balance_weight.

        Here f is a share of all choices and the sum is divided by what it is at balance (f = P, both in proportion to 1 / eta): the
        loss is 1 there, as all balance losses of this package are. It is (E + Z / tau) / K times the paper's.
        """
        if not self.has_loss:
            return jnp.zeros(())
        eta_X = jnp.where(jnp.arange(self.num_experts + self.num_null) < self.num_experts, 1.0, self.tau)
        load_X = sums.own["load_X"].astype(jnp.float32)
        fraction_X = load_X / jnp.maximum(load_X.sum(), 1.0)
        mean_X = sums.own["prob_sum_X"] / jnp.maximum(sums.num_tokens, 1)
        return self.balance_weight * jnp.sum(1.0 / eta_X) * jnp.sum(eta_X * fraction_X * mean_X)

    def update(self, state: dict[str, jax.Array], sums: RoutingSums) -> dict[str, jax.Array]:
        """b += bias_speed (expected_real / (K E) - load / (K T)): LongCat-Flash section 2.1.1, for real experts only.

        The step is in proportion to the error and the bias adds the steps up: an integral controller. Nothing moves without tokens.
        """
        if not self.expected_real:
            return state
        tokens_L1 = sums.num_tokens[..., None].astype(jnp.float32)
        share_LE = sums.load_E.astype(jnp.float32) / (self.top_k * jnp.maximum(tokens_L1, 1.0))
        error_LE = self.expected_real / (self.top_k * self.num_experts) - share_LE
        return {"bias_E": state["bias_E"] + self.bias_speed * jnp.where(tokens_L1 > 0, error_LE, 0.0)}
