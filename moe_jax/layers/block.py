"""A pre-norm transformer block, dense or MoE."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.layers.basic import make_norm, scaled
from moe_jax.layers.latent_attention import make_attention
from moe_jax.layers.mlp import MLP
from moe_jax.layers.moe import MoE, MoEAux
from moe_jax.ops.stored_vectors import StoredVectors


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the FFN is dense or a mixture of experts.

    With `model.post_norms` what is added goes through a norm of its own first (Gemma 2, 2408.00118, section 2), and it is multiplied
    by `model.residual_scale`. The projections back into the residual stream start smaller by sqrt(2 L) (GPT-2).
    """

    def __init__(self, config: ModelConfig, is_moe: bool, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        out_std = config.init_std / math.sqrt(2 * config.num_layers)
        self.is_moe, self.residual_scale, self.has_post_norms = is_moe, config.residual_scale, config.post_norms
        self.attention_norm = make_norm(config)
        self.attention = make_attention(config, out_std, dtype, rngs=rngs)
        self.ffn_norm = make_norm(config)
        if config.post_norms:
            self.attention_post_norm, self.ffn_post_norm = make_norm(config), make_norm(config)
        if is_moe:
            self.moe = MoE(config, out_std, dtype, rngs=rngs)
        else:
            widths, limit = (config.d_model, config.d_ff), config.activation_limit
            self.mlp = MLP(*widths, config.activation, config.init_std, out_std, dtype, limit=limit, rngs=rngs)

    def __call__(
        self,
        x_BSD: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        sees_all: jax.Array | None = None,
        **for_moe: Any,
    ) -> tuple[jax.Array, MoEAux | None]:
        """Returns (x, aux); aux is None for a dense block.

        Args:
          x_BSD: the residual stream.
          segment_ids_BS: 0 is padding.
          positions_BS: within the document.
          sees_all: as in `Attention.__call__`; None where all layers are alike.
          **for_moe: arguments of `MoE.__call__`.
        """
        with jax.named_scope("attention"):
            y_BSD = self.attention(self.attention_norm(x_BSD), segment_ids_BS, positions_BS, sees_all)
        return self._add(x_BSD, y_BSD, segment_ids_BS > 0, for_moe)

    def prefill(
        self,
        x_BSD: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        sees_all: jax.Array | None = None,
        **for_moe: Any,
    ) -> tuple[jax.Array, MoEAux | None, dict[str, jax.Array]]:
        """As `__call__`, and what attention keeps of each token (`Attention.prefill`)."""
        with jax.named_scope("attention"):
            y_BSD, kept = self.attention.prefill(self.attention_norm(x_BSD), segment_ids_BS, positions_BS, sees_all)
        return *self._add(x_BSD, y_BSD, segment_ids_BS > 0, for_moe), kept

    def decode(
        self, x_B1D: jax.Array, cache: dict[str, StoredVectors], at_B: jax.Array, live_B: jax.Array, window: int, **for_moe: Any
    ) -> tuple[jax.Array, MoEAux | None, dict[str, StoredVectors]]:
        """One token of each text: (x, aux, cache).

        Args:
          x_B1D: the residual stream.
          cache: of this layer's attention.
          at_B: int32, the token's position.
          live_B: bool; what is not live gets no expert.
          window: of this layer; 0 for none.
          **for_moe: arguments of `MoE.__call__`.
        """
        with jax.named_scope("attention"):
            y_B1D, cache = self.attention.decode(self.attention_norm(x_B1D), cache, at_B, window)
        return *self._add(x_B1D, y_B1D, live_B[:, None], for_moe), cache

    def _add(self, x_BSD, y_BSD, mask_BS, for_moe):
        """(x, aux) from the stream and what attention adds to it."""
        x_BSD = x_BSD + scaled(self.attention_post_norm(y_BSD) if self.has_post_norms else y_BSD, self.residual_scale)
        h_BSD = self.ffn_norm(x_BSD)
        y_BSD, aux = self.moe(h_BSD, mask_BS, **for_moe) if self.is_moe else (self.mlp(h_BSD), None)
        return x_BSD + scaled(self.ffn_post_norm(y_BSD) if self.has_post_norms else y_BSD, self.residual_scale), aux
