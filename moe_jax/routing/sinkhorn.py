"""Sinkhorn routing, the S-BASE of Clark et al. (2202.01169, section 2.2.1): BASE's assignment, relaxed to optimal transport."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError
from moe_jax.ops.varying import vary_alike
from moe_jax.routing.contract import Router, Routing, Tokens, token_choice
from moe_jax.routing.scores import choose, chosen, router_logits

_PATH = "model.moe.router.sinkhorn"


@dataclass(frozen=True)
class Sinkhorn(Router):
    """The k experts that a balanced transport plan prefers; the weights are raw softmax probabilities of the logits, without the plan.

    In training the plan is over all valid tokens of the pass (a microbatch's, under gradient accumulation), so that other tokens, later
    ones too, move the choice; each expert gets the same mass of the *plan*, and so about the same number of choices. In evaluation the
    logits decide. The plan has no gradient.

    Elsewhere: Megatron-Core iterates until the change is below 1e-4, without logarithms, and weighs top-1 by a sigmoid.
    """

    iterations: int = 10  # Sinkhorn steps, each one scaling of the tokens and one of the experts
    temperature: float = 1.0  # weight of the plan's entropy; a lower one is nearer to BASE and needs more iterations

    causal_in_training = False

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1:
            raise ConfigError(f"{_PATH}.iterations = {self.iterations} must be at least 1; without any nothing is balanced.")
        if not 1e-3 <= self.temperature < math.inf:
            raise ConfigError(f"{_PATH}.temperature = {self.temperature} must be at least 1e-3 and finite.")

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> Routing:
        """See `Router.__call__`."""
        logits_TE = router_logits(tokens, params["w_router_DE"], self.num_experts)
        scores_TE = logits_TE
        if tokens.training and tokens.replay_TM is None:
            # a token's entries of the plan are these, exponentiated and scaled by one factor
            scores_TE = jax.lax.stop_gradient(logits_TE) / self.temperature
            potential_E = expert_potentials(tokens.batch.gather(scores_TE), tokens.batch.gather(tokens.mask_T), self.iterations)
            scores_TE = scores_TE + potential_E
        expert_TK = choose(scores_TE, self.top_k, tokens.replay_TM)
        probs_TE = jax.nn.softmax(logits_TE)
        return token_choice(expert_TK, chosen(probs_TE, expert_TK), probs_TE, logits_TE, tokens)


def expert_potentials(scores_GE: jax.Array, mask_G: jax.Array, iterations: int) -> jax.Array:
    """g [E], float32, the largest 0: for some f, exp(f_i + scores_ie + g_e) is a plan in which tokens have equal masses, and experts too.

    Sinkhorn's iterations (Cuturi, 1306.0895) on logarithms, from g = 0: after each the experts' masses are equal, and the tokens' nearly.
    A constant in g is one in f; without it rounding errors do not add up.

    Args:
      scores_GE: float32, of all tokens.
      mask_G: bool, False for padding, which has no mass.
      iterations: of both scalings.
    """
    scores_GE = jnp.where(mask_G[:, None], scores_GE, 0.0)

    def step(_, g_E):
        f_G = -jax.nn.logsumexp(scores_GE + g_E, axis=1)
        plan_GE = jnp.where(mask_G[:, None], scores_GE + f_G[:, None], jnp.finfo(jnp.float32).min)
        g_E = -jax.nn.logsumexp(plan_GE, axis=0)
        return g_E - g_E.max()

    start_E = jnp.zeros(scores_GE.shape[1], jnp.float32)
    return jax.lax.fori_loop(0, iterations, step, vary_alike(start_E, scores_GE, mask_G)[0])
