"""Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1): keys and values are made of one narrow latent a token.

For training and prefill keys and values are written out for every head; decoding works on the latents themselves. Heads are split over
the tensor axis, on whose devices the latents are the same.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig
from moe_jax.layers.attention import Attention, attend, cache_spec
from moe_jax.layers.basic import RMSNorm, gathered, normal_param, project, tensor_spec
from moe_jax.mesh import batch_spec
from moe_jax.ops.cached_attention import attend_to_stored
from moe_jax.ops.rope import apply_rope
from moe_jax.ops.stored_vectors import StoredVectors, append, decoded
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
        self.config, self.dtype, self.absorbed = a, dtype, True
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
        return self.prefill(x_BSD, segment_ids_BS, positions_BS, sees_all)[0]

    def prefill(
        self, x_BSD: jax.Array, segment_ids_BS: jax.Array, positions_BS: jax.Array, sees_all: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As `Attention.prefill`."""
        q_BSHN, latent_BSR = self._queries(x_BSD), self._latents(x_BSD)
        k_BSHN, v_BSHM = self._up(latent_BSR, self.wk_up_RHN), self._up(latent_BSR, self.wv_up_RHN)
        k_rope_BSN = self._down(x_BSD, self.wk_rope_DN)
        y_BSHM, k_rope_BS1N = self._attend(q_BSHN, k_BSHN, k_rope_BSN, v_BSHM, segment_ids_BS, positions_BS, sees_all)
        return self._out(y_BSHM), {"latent": latent_BSR[:, :, None], "rope": k_rope_BS1N}

    def kept_shapes(self) -> dict[str, tuple[int, int]]:
        """(1, width) of what is kept of a token, the same for all heads: its latent, and its rotated key."""
        return {"latent": (1, self.config.kv_rank), "rope": (1, self.config.rope_head_dim)}

    def decode(
        self, x_B1D: jax.Array, cache: dict[str, StoredVectors], at_B: jax.Array, window: int
    ) -> tuple[jax.Array, dict[str, StoredVectors]]:
        """As `Attention.decode`, over the latents (2405.04434, section 2.1.2).

        Absorbed, a query's first part is brought to the latents by `wk_up_RHN`, and the weighted latents to values by `wv_up_RHN`: nothing
        is made of a latent. Otherwise keys and values of every latent are written out, H times as much.
        """
        a = self.config

        def body(q_B1HN, latent_B1R, k_rope_B1N, at_B, wk_up_RHN, wv_up_RHN, cache):
            q_BHN, q_rope_BHN = jnp.split(apply_rope(q_B1HN, at_B[:, None], a.rope, first=a.head_dim)[:, 0], [a.head_dim], -1)
            k_rope_B1N = apply_rope(k_rope_B1N[:, :, None], at_B[:, None], a.rope)[:, :, 0]
            latent, rope = append(cache["latent"], latent_B1R, at_B), append(cache["rope"], k_rope_B1N, at_B)
            scale = a.scale or (a.head_dim + a.rope_head_dim) ** -0.5
            settings = {"window": window, "scale": scale, "softcap": a.softcap}
            cache = {"latent": latent, "rope": rope}
            if not self.absorbed:
                key, value, rope = _written_out(latent, rope, wk_up_RHN, wv_up_RHN)
                return attend_to_stored([q_BHN, q_rope_BHN], [key, rope], value, at_B, **settings)[:, None], cache
            q_BHR = jnp.einsum("BHN,RHN->BHR", q_BHN, wk_up_RHN)
            y_BHR = attend_to_stored([q_BHR, q_rope_BHN], [latent, rope], latent, at_B, **settings)
            return jnp.einsum("BHR,RHM->BHM", y_BHR, wv_up_RHN)[:, None], cache

        q_B1HN, latent_B1R, k_rope_B1N = self._queries(x_B1D), self._latents(x_B1D), self._down(x_B1D, self.wk_rope_DN)
        ups = [gathered(w, P(None, "tensor", None), self.dtype) for w in (self.wk_up_RHN, self.wv_up_RHN)]
        heads, stored = tensor_spec("tensor", None), cache_spec(cache)
        specs = (heads, batch_spec(3), batch_spec(3), batch_spec(1), *[P(None, "tensor", None)] * 2, stored)
        island = jax.shard_map(body, in_specs=specs, out_specs=(heads, stored))
        y_B1HM, cache = island(q_B1HN, latent_B1R, k_rope_B1N, at_B, *ups, cache)
        return self._out(y_B1HM), cache

    def _queries(self, x_BSD):
        if self.config.q_rank:
            return self._up(self.q_latent_norm(self._down(x_BSD, self.wq_down_DR)), self.wq_up_RHN)
        return self._up(x_BSD, self.wq_DHN)

    def _latents(self, x_BSD):
        return self.kv_latent_norm(self._down(x_BSD, self.wkv_down_DR))

    def _down(self, x_BSD, w_DR):
        return project("BSD,DR->BSR", x_BSD, gathered(w_DR, P(None, None), self.dtype))

    def _up(self, latent_BSR, w_RHN):
        return project("BSR,RHN->BSHN", latent_BSR, gathered(w_RHN, P(None, "tensor", None), self.dtype))

    def _out(self, y_BSHM):
        w_HMD = gathered(self.wo_HND, P("tensor", None, None), self.dtype)
        return project("BSHM,HMD->BSD", y_BSHM, w_HMD, tensor_spec(None))

    def _attend(self, q_BSHN, k_BSHN, k_rope_BSN, v_BSHM, segment_ids_BS, positions_BS, sees_all):
        """As in `Attention`: every device attends with its own heads over its own sequences."""
        a = self.config

        def body(q_BSHN, k_BSHN, k_rope_BSN, v_BSHM, segment_ids_BS, positions_BS, sees_all):
            q_BSHN = apply_rope(q_BSHN, positions_BS, a.rope, first=a.head_dim)
            k_rope_BS1N = apply_rope(k_rope_BSN[:, :, None], positions_BS, a.rope)
            k_rope_BSHN = jnp.broadcast_to(k_rope_BS1N, (*k_BSHN.shape[:3], a.rope_head_dim))
            k_BSHN = jnp.concatenate(vary_alike(k_BSHN, k_rope_BSHN), axis=-1)
            return attend(q_BSHN, k_BSHN, v_BSHM, segment_ids_BS, None, sees_all, a), k_rope_BS1N

        heads, rows = tensor_spec("tensor", None), batch_spec(2)
        in_specs = (heads, heads, batch_spec(3), heads, rows, rows, P())
        island = jax.shard_map(body, in_specs=in_specs, out_specs=(heads, batch_spec(4)))
        return island(q_BSHN, k_BSHN, k_rope_BSN, v_BSHM, segment_ids_BS, positions_BS, sees_all)


def _written_out(latent, rope, wk_up_RHN, wv_up_RHN):
    """Keys and values of every head from stored latents, and the rotated key once for each head."""
    latent_BTR = decoded(latent, wk_up_RHN.dtype)[:, 0]
    k_BHTN, v_BHTM = (jnp.einsum("BTR,RHN->BHTN", latent_BTR, w_RHN) for w_RHN in (wk_up_RHN, wv_up_RHN))
    rope_BHTN = jnp.broadcast_to(decoded(rope, k_BHTN.dtype), (*k_BHTN.shape[:3], rope.values_BGTN.shape[-1]))
    return (StoredVectors(array_BHTN, None) for array_BHTN in (k_BHTN, v_BHTM, rope_BHTN))


def make_attention(config: ModelConfig, out_std: float, dtype, *, rngs: nnx.Rngs) -> Attention | LatentAttention:
    """The attention that `config.attention` describes: latent where it has a `kv_rank`."""
    return (LatentAttention if config.attention.kv_rank else Attention)(config, out_std, dtype, rngs=rngs)
