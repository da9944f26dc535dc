"""Noisy top-k gating: learned noise on the logits, and losses on importance and load (Shazeer et al., 1701.06538)."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError
from moe_jax.routing.contract import ParamSpec, Router, Routing, Tokens, token_choice
from moe_jax.routing.losses import RoutingSums
from moe_jax.routing.options import check_weight
from moe_jax.routing.scores import choose, chosen, noise, router_logits, sum_by_expert

_PATH = "model.moe.router.noisy_top_k"
_MIN_STD = 1e-2  # of the noise, in the load alone: a narrower one makes P(x, i) a step, whose gradient has no bound


@dataclass(frozen=True)
class NoisyTopK(Router):
    """Softmax over the k highest of H(x) = x W_g + normal * softplus(x W_noise) (eqs. 3-5); no noise in evaluation.

    The paper starts both matrices at zero (appendix A). Here only the noise does, at a standard deviation of ln 2 that is far above
    the first logits', so that loads start even too; W_g is the model's usual small normal: at zero all tokens would be tied, and
    without noise (evaluation, fine-tuning) all would go to the first k experts.

    The load's P(x, i), the probability that expert i is among the k were its own noise drawn again (eqs. 8 and 9), is what makes the
    load differentiable. Where there is no noise, or k = E so that there is no (k + 1)-th, P is 1 for the chosen and 0 for the others:
    the load is the count, without a gradient.
    """

    importance_weight: float = 0.1  # of CV^2 of the experts' summed weights (eq. 7); 0 is off
    load_weight: float = 0.1  # of CV^2 of the smooth number of tokens of each expert (eq. 11); 0 is off

    def __post_init__(self):
        super().__post_init__()
        check_weight(f"{_PATH}.importance_weight", self.importance_weight)
        check_weight(f"{_PATH}.load_weight", self.load_weight)
        if self.top_k == 1:
            raise ConfigError(
                "model.moe.router.top_k = 1 with the router 'noisy_top_k' is a softmax over one expert, the constant 1, so the router"
                " would get no gradient from the language-model loss; set model.moe.router.top_k >= 2, or"
                " model.moe.router.name='switch'."
            )

    @property
    def uses_noise(self) -> bool:
        return True

    @property
    def has_loss(self) -> bool:
        return self.importance_weight > 0 or self.load_weight > 0

    def params(self, d_model: int) -> dict[str, ParamSpec]:
        """W_g and W_noise."""
        shape = d_model, self.num_experts
        return {"w_router_DE": ParamSpec(shape), "w_router_noise_DE": ParamSpec(shape, 0.0)}

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> Routing:
        """See `Router.__call__`. `logits_TE` are the noisy H(x)."""
        clean_TE = logits_TE = router_logits(tokens, params["w_router_DE"], self.num_experts)
        if tokens.noise_key is not None:
            std_TE = jax.nn.softplus(router_logits(tokens, params["w_router_noise_DE"], self.num_experts))
            normal_TE = noise(tokens, lambda key: jax.random.normal(key, (self.num_experts,)))
            logits_TE = clean_TE + normal_TE * std_TE  # eq. 4
        expert_TK = choose(logits_TE, self.top_k, tokens.replay_TM)
        weight_TK = jax.nn.softmax(chosen(logits_TE, expert_TK))  # eq. 3
        if tokens.noise_key is None or self.top_k == self.num_experts:
            load_E = sum_by_expert(jnp.ones_like(weight_TK), expert_TK, tokens.mask_T, self.num_experts)
        else:
            in_top_TE = _chance_of_top(clean_TE, logits_TE, std_TE, self.top_k)
            load_E = jnp.sum(jnp.where(tokens.mask_T[:, None], in_top_TE, 0.0), axis=0)  # eq. 10
        importance_E = sum_by_expert(weight_TK, expert_TK, tokens.mask_T, self.num_experts)  # eq. 6
        sums = {"importance_E": importance_E, "load_E": load_E}
        return token_choice(expert_TK, weight_TK, jax.nn.softmax(logits_TE), logits_TE, tokens, sums=sums)

    def loss(self, sums: RoutingSums, state: dict[str, jax.Array]) -> jax.Array:
        """Both losses (eqs. 7 and 11), 0 at perfect balance."""
        importance, load = (_cv_squared(sums.own[name]) for name in ("importance_E", "load_E"))
        return self.importance_weight * importance + self.load_weight * load


def _chance_of_top(clean_TE, noisy_TE, std_TE, choices):
    """P(x, i) of eq. 9; what expert i has to beat is the k-th highest of the *others*, their noise as drawn."""
    top_TK = jax.lax.top_k(noisy_TE, choices + 1)[0]
    last_in_T1, first_out_T1 = top_TK[:, -2:-1], top_TK[:, -1:]
    bar_TE = jnp.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
    return _normal_cdf((clean_TE - bar_TE) / jnp.maximum(std_TE, _MIN_STD))


@jax.custom_jvp
def _normal_cdf(z_TE):
    """Of the standard normal distribution; jax 0.12.0 cannot differentiate its own inside `shard_map`."""
    return jax.scipy.special.ndtr(z_TE)


@_normal_cdf.defjvp
def _normal_density(primals, tangents):
    (z_TE,), (tangent_TE,) = primals, tangents
    return _normal_cdf(z_TE), tangent_TE * jnp.exp(-jnp.square(z_TE) / 2) / math.sqrt(2 * math.pi)


def _cv_squared(sum_E):
    """Squared coefficient of variation over experts, variance / mean^2; 0 where all is 0."""
    mean = jnp.mean(sum_E)
    return jnp.where(mean > 0, jnp.var(sum_E / jnp.where(mean > 0, mean, 1.0)), 0.0)
