"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): keys and values are made of one narrow latent a token.

In the form for training and prefill: keys and values are written out for every head. Heads are split over the tensor axis, on whose
devices the latents are the same.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig
from moe_jax.layers.attention import Attention, attend
from moe_jax.layers.basic import RMSNorm, gathered, normal_param, project, tensor_spec
from moe_jax.mesh import batch_spec
from moe_jax.ops.rope import apply_rope
from moe_jax.ops.varying import vary_alike


class LatentAttention(nnx.Module):
    """Causal self-attention within segments, of latents; R is the width of a latent, M that of a head's values.

    A query is `head_dim` widths that match a key made of the latent (equations 10, 13), and after them `rope_head_dim` widths that
    match a rotated key that all heads share (14 to 17). With `q_rank` the queries have a latent of their own (12, 13). Both latents are
    normed (RMSNorm), as in section 3.1.2.
    """

    def __init__(self, config: ModelConfig, out_std: float, dtype, *, rngs: nnx.Rngs):
        a, D, std = config.attention, config.d_model, config.init_std
        H, N, M, R = a.num_heads, a.head_dim + a.rope_head_dim, a.v_head_dim or a.head_dim, a.kv_rank
        up, eps = ("fsdp", "tensor", None), a.latent_norm_eps or config.norm_eps
        self.config, self.dtype = a, dtype
        if a.q_rank:
            self.wq_down_DR = normal_param(rngs, (D, a.q_rank), ("fsdp", None), std)
            self.q_latent_norm = RMSNorm(a.q_rank, eps, "R")
            self.wq_up_RHN = normal_param(rngs, (a.q_rank, H, N), up, std)
        else:
            self.wq_DHN = normal_param(rngs, (D, H, N), up, std)
        self.wkv_down_DR = normal_param(rngs, (D, R), ("fsdp", None), std)
        self.wk_rope_DN = normal_param(rngs, (D, a.rope_head_dim), ("fsdp", None), std)
        self.kv_latent_norm = RMSNorm(R, eps, "R")
        self.wk_up_RHN = normal_param(rngs, (R, H, a.head_dim), up, std)
        self.wv_up_RHN = normal_param(rngs, (R, H, M), up, std)
        self.wo_HND = normal_param(rngs, (H, M, D), ("tensor", None, "fsdp"), out_std)

    def __call__(
        self, x_BSD: jax.Array, segment_ids_BS: jax.Array, positions_BS: jax.Array, sees_all: jax.Array | None = None
    ) -> jax.Array:
        """What attention adds to the residual stream; the arguments are those of `Attention.__call__`."""
        if self.config.q_rank:
            q_BSHN = self._up(self.q_latent_norm(self._down(x_BSD, self.wq_down_DR)), self.wq_up_RHN)
        else:
            q_BSHN = self._up(x_BSD, self.wq_DHN)
        latent_BSR = self.kv_latent_norm(self._down(x_BSD, self.wkv_down_DR))
        k_BSHN, v_BSHM = self._up(latent_BSR, self.wk_up_RHN), self._up(latent_BSR, self.wv_up_RHN)
        k_rope_BSN = self._down(x_BSD, self.wk_rope_DN)
        y_BSHM = self._attend(q_BSHN, k_BSHN, k_rope_BSN, v_BSHM, segment_ids_BS, positions_BS, sees_all)
        w_HMD = gathered(self.wo_HND, P("tensor", None, None), self.dtype)
        return project("BSHM,HMD->BSD", y_BSHM, w_HMD, tensor_spec(None))

    def _down(self, x_BSD, w_DR):
        return project("BSD,DR->BSR", x_BSD, gathered(w_DR, P(None, None), self.dtype))

    def _up(self, latent_BSR, w_RHN):
        return project("BSR,RHN->BSHN", latent_BSR, gathered(w_RHN, P(None, "tensor", None), self.dtype))

    def _attend(self, q_BSHN, k_BSHN, k_rope_BSN, v_BSHM, segment_ids_BS, positions_BS, sees_all):
        """As in `Attention`: every device attends with its own heads over its own sequences."""
        a = self.config

        def body(q_BSHN, k_BSHN, k_rope_BSN, v_BSHM, segment_ids_BS, positions_BS, sees_all):
            q_BSHN = apply_rope(q_BSHN, positions_BS, a.rope, first=a.head_dim)
            k_rope_BS1N = apply_rope(k_rope_BSN[:, :, None], positions_BS, a.rope)
            k_rope_BSHN = jnp.broadcast_to(k_rope_BS1N, (*k_BSHN.shape[:3], a.rope_head_dim))
            k_BSHN = jnp.concatenate(vary_alike(k_BSHN, k_rope_BSHN), axis=-1)
            return attend(q_BSHN, k_BSHN, v_BSHM, segment_ids_BS, None, sees_all, a)

        heads, rows = tensor_spec("tensor", None), batch_spec(2)
        island = jax.shard_map(body, in_specs=(heads, heads, batch_spec(3), heads, rows, rows, P()), out_specs=heads)
        return island(q_BSHN, k_BSHN, k_rope_BSN, v_BSHM, segment_ids_BS, positions_BS, sees_all)


def make_attention(config: ModelConfig, out_std: float, dtype, *, rngs: nnx.Rngs) -> Attention | LatentAttention:
    """The attention that `config.attention` describes: latent where it has a `kv_rank`."""
    return (LatentAttention if config.attention.kv_rank else Attention)(config, out_std, dtype, rngs=rngs)
