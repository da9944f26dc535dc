"""Grouped-query attention (2305.13245) with rotary positions; heads are split over the tensor axis."""

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig
from moe_jax.layers.basic import RMSNorm, constant_param, gathered, normal_param, project, tensor_spec
from moe_jax.mesh import batch_spec
from moe_jax.ops.attention import attention
from moe_jax.ops.rope import apply_rope


class Attention(nnx.Module):
    """Causal self-attention within segments; optional QK-norm per head (2302.05442), sliding window and biases."""

    def __init__(self, config: ModelConfig, out_std: float, dtype, *, rngs: nnx.Rngs):
        a, D, std = config.attention, config.d_model, config.init_std
        H, G, N = a.num_heads, a.num_kv_heads, a.head_dim
        self.config, self.dtype = a, dtype
        self.wq_DHN = normal_param(rngs, (D, H, N), ("fsdp", "tensor", None), std)
        self.wk_DGN = normal_param(rngs, (D, G, N), ("fsdp", "tensor", None), std)
        self.wv_DGN = normal_param(rngs, (D, G, N), ("fsdp", "tensor", None), std)
        self.wo_HND = normal_param(rngs, (H, N, D), ("tensor", None, "fsdp"), out_std)
        if a.qkv_bias:
            self.bq_HN = constant_param(0.0, (H, N), ("tensor", None))
            self.bk_GN = constant_param(0.0, (G, N), ("tensor", None))
            self.bv_GN = constant_param(0.0, (G, N), ("tensor", None))
        if a.out_bias:
            self.bo_D = constant_param(0.0, (D,), (None,))
        if a.qk_norm:
            self.q_norm = RMSNorm(N, config.norm_eps, "N")
            self.k_norm = RMSNorm(N, config.norm_eps, "N")

    def __call__(self, x_BSD: jax.Array, segment_ids_BS: jax.Array, positions_BS: jax.Array) -> jax.Array:
        q_BSHN = self._project(x_BSD, self.wq_DHN, "bq_HN")
        k_BSGN = self._project(x_BSD, self.wk_DGN, "bk_GN")
        v_BSGN = self._project(x_BSD, self.wv_DGN, "bv_GN")
        if self.config.qk_norm:
            q_BSHN, k_BSGN = self.q_norm(q_BSHN), self.k_norm(k_BSGN)
        y_BSHN = _attend(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, positions_BS, self.config)
        w_HND = gathered(self.wo_HND, P("tensor", None, None), self.dtype)
        y_BSD = project("BSHN,HND->BSD", y_BSHN, w_HND, tensor_spec(None))
        return y_BSD + self.bo_D[...].astype(self.dtype) if self.config.out_bias else y_BSD

    def _project(self, x_BSD, w, bias_name):
        y = project("BSD,DHN->BSHN", x_BSD, gathered(w, P(None, "tensor", None), self.dtype))
        return y + getattr(self, bias_name)[...].astype(self.dtype) if self.config.qkv_bias else y


def _attend(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, positions_BS, config):
    """Every device attends with its own heads over its own sequences: manual, so that fused kernels see plain arrays."""

    def body(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, positions_BS):
        q_BSHN = apply_rope(q_BSHN, positions_BS, config.rope_theta)
        k_BSGN = apply_rope(k_BSGN, positions_BS, config.rope_theta)
        return attention(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, window=config.window, implementation=config.implementation)

    heads = tensor_spec("tensor", None)
    island = jax.shard_map(body, in_specs=(heads, heads, heads, batch_spec(2), batch_spec(2)), out_specs=heads)
    return island(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, positions_BS)
