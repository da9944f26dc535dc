"""Soft MoE: every expert gets mixes of all tokens, every token a mix of all answers (Puigcerver et al., 2308.00951, algorithm 1).

Beyond the package's letters: `P` = E * slots, all slots, those of expert 0 first.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError
from moe_jax.routing.contract import ParamSpec, Router, SoftRouting, Tokens

_PATH = "model.moe.router.soft_moe"


@dataclass(frozen=True)
class SoftMoE(Router):
    """Each slot holds an average of a sequence's tokens, each token gets an average of the slots' answers; nothing is discrete.

    `logits = x phi`; a slot's weights are their softmax over the tokens, a token's the softmax over the slots. Tokens that come
    later decide about earlier ones: not for language models.

    The experts compute E * slots rows a sequence of S tokens, whatever `top_k` says: choose slots = k * S / E for the FLOPs of k experts
    a token, and set `top_k` to that k, as FLOPs are counted by it.
    """

    slots: int = 1  # slots an expert has in each sequence; the experts compute num_experts * slots rows a sequence
    normalize: bool = True  # x and phi as unit vectors with a learned scale, so that logits keep their size as width grows

    causal = False
    causal_in_training = False
    by_token = False

    def __post_init__(self):
        super().__post_init__()
        if self.slots < 1:
            raise ConfigError(
                f"{_PATH}.slots = {self.slots} must be at least 1; top_k experts a token cost top_k * seq_len / num_experts."
            )

    def params(self, d_model: int) -> dict[str, ParamSpec]:
        """`w_router_DP` is phi; the scale starts at 1."""
        specs = {"w_router_DP": ParamSpec((d_model, self.num_experts * self.slots))}
        return specs | ({"b_router_scale": ParamSpec((), 1.0)} if self.normalize else {})

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> SoftRouting:
        """See `Router.__call__`. `probs_TE` is what a token's answer has of each expert, its slots together.

        Raises:
          ValueError: a replay is asked for.
        """
        if tokens.replay_TM is not None:
            raise ValueError(
                "replay_TM is given but the router 'soft_moe' makes no choices that could be made again; leave it None."
            )
        logits_BSP, mask_BS1 = self._logits(tokens, params), tokens.mask_T.reshape(tokens.num_sequences, -1, 1)
        masked_BSP = jnp.where(mask_BS1, logits_BSP, jnp.finfo(jnp.float32).min)
        logits_TE = jax.nn.logsumexp(logits_BSP.reshape(-1, self.num_experts, self.slots), axis=-1)
        return SoftRouting(
            dispatch_BSP=jnp.where(mask_BS1, jax.nn.softmax(masked_BSP, axis=1), 0.0),  # D
            combine_BSP=jnp.where(mask_BS1, jax.nn.softmax(logits_BSP, axis=2), 0.0),  # C
            probs_TE=jax.nn.softmax(logits_TE),
            logits_TE=logits_TE,
        )

    def _logits(self, tokens, params):
        x_TD, phi_DP = tokens.x_TD.astype(jnp.float32), params["w_router_DP"].astype(jnp.float32)
        if self.normalize:
            x_TD, phi_DP = _unit(x_TD, axis=1), params["b_router_scale"] * _unit(phi_DP, axis=0)
        logits_TP = jnp.einsum("TD,DP->TP", x_TD, phi_DP, precision=jax.lax.Precision.HIGHEST)
        return logits_TP.reshape(tokens.num_sequences, -1, phi_DP.shape[1])


def _unit(x, axis):
    """x / |x|, and 0 for 0; finite, with its gradient, for vectors of any size."""
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))  # no gradient: the result does not depend on it
    some = size > jnp.finfo(jnp.float32).tiny
    x = x / jnp.where(some, size, 1.0)
    return x * jax.lax.rsqrt(jnp.where(some, jnp.sum(jnp.square(x), axis=axis, keepdims=True), 1.0))
