"""Every router of the table in the settings that differ, for the suite that all of them pass; and what each promises."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import RouterConfig
from moe_jax.routing import make_router
from moe_jax.routing.contract import Tokens

B, S, D, E, VOCABULARY = 8, 6, 9, 4, 11
T = B * S


@dataclass(frozen=True)
class Case:
    """A router with 4 experts, and what it declares beyond its class.

    Attributes:
      family: of `ROUTERS`.
      top_k: experts a token.
      options: of the family.
      weights: what a token's weights sum to; None for no constant.
      training_weights: the same of a training step; -1 for the same.
      ties: with all parameters 0 the first K experts are chosen.
      renames: its experts can be renamed, in any order or ("groups", R) by whole groups of R; False where names mean something.
    """

    family: str
    top_k: int = 2
    options: dict = field(default_factory=dict)
    weights: float | None = None
    training_weights: float | None = -1.0
    ties: bool = True
    renames: object = True

    @property
    def router(self):
        return make_router(RouterConfig(self.family, self.top_k, self.options), E)


CASES = {
    "switch": Case("switch", 1),
    "mixtral": Case("mixtral", weights=1.0),
    "mixtral before": Case("mixtral", 3, {"normalize": "before", "jitter": 0.1}),
    "mixtral, bias": Case("mixtral", 2, {"bias": True}, 1.0),
    "deepseek": Case("deepseek", weights=1.0),
    "deepseek groups": Case("deepseek", 2, {"num_groups": 2, "top_groups": 1, "scale": 2.5}, 2.5, renames=("groups", 2)),
    "deepseek softmax": Case("deepseek", 2, {"score": "softmax", "normalize": False}),
    "deepseek quantile": Case("deepseek", 2, {"bias_update": "quantile"}, 1.0),
    "switch, expert dropout": Case("switch", 1, {"expert_dropout": 0.4, "jitter": 0.0}),
    "mixtral, expert dropout": Case("mixtral", 2, {"expert_dropout": 0.4}, 1.0),
    "noisy top-k": Case("noisy_top_k", weights=1.0),
    "gshard": Case("gshard", weights=1.0, training_weights=None),
    "st_moe": Case("st_moe", 2, {"jitter": 0.1, "threshold": 0.9}, 1.0, None),
    "deepseek_moe": Case("deepseek_moe", 2, {"num_groups": 2, "device_loss_weight": 0.1}, renames=("groups", 2)),
    "expert choice, sequence": Case("expert_choice", ties=False),
    "expert choice, batch": Case("expert_choice", 1, {"group": "batch"}, ties=False),
    "expert choice, position": Case("expert_choice", 2, {"group": "position"}, ties=False),
    "base": Case("base", 1),
    "sinkhorn": Case("sinkhorn"),
    "soft moe": Case("soft_moe", 2, {"slots": 2}),
    "zero experts": Case("zero_experts", 3),
    "zero experts, controlled": Case("zero_experts", 2, {"num_constant": 0, "expected_real": 1.0, "balance_weight": 0.1}),
    "hash": Case("hash", weights=1.0, ties=False, renames=False),
    "random": Case("random", weights=1.0, ties=False, renames=False),
    "round robin": Case("round_robin", weights=1.0, ties=False, renames=False),
    "balanced": Case("balanced", weights=1.0, ties=False, renames=False),
    "all experts": Case("all_experts", 4, weights=1.0),
    "remoe": Case("remoe", ties=False),
    "remoe, at most two": Case("remoe", 1, {"max_choices": 2, "load_balanced": False}, ties=False),
    "reinforce": Case("reinforce", 2, {"entropy_weight": 0.01}, 1.0),
    "reinforce, probability": Case("reinforce", 1, {"weigh": "probability"}),
    "mixture of depths": Case("mixture_of_depths", 2, {"capacity_fraction": 0.5, "predictor_width": 5}, ties=False),
}


def problem(case, seed=0, scale=0.8):
    """(tokens, params, state) of random numbers, choices clear; every sequence has a padding token at its end, one is all padding."""
    router, rng = case.router, np.random.default_rng(seed)

    def normal(shape, std):
        return jnp.asarray(rng.normal(size=shape) * std, jnp.float32)

    mask_BS = np.ones((B, S), bool)
    mask_BS[:, -1] = mask_BS[3] = False
    params = {name: normal(spec.shape, scale) for name, spec in router.params(D).items()}
    state = {
        name: value + normal(value.shape, 0.2) if name.startswith("bias") else value
        for name, value in router.init_state().items()
    }
    tokens = Tokens(
        x_TD=normal((T, D), 1.0),
        mask_T=jnp.asarray(mask_BS.reshape(-1)),
        token_id_T=jnp.arange(T, dtype=jnp.int32),
        vocabulary_T=jnp.asarray(rng.integers(0, VOCABULARY, T), jnp.int32),
        num_sequences=B,
    )
    return tokens, params, state


def in_training(tokens, router, key=0):
    """The tokens of a training step."""
    return tokens.replace(training=True, noise_key=jax.random.key(key) if router.uses_noise else None)
