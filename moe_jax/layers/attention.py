"""Grouped-query attention (2305.13245) with rotary positions; heads are split over the tensor axis."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.layers.basic import RMSNorm, constant_param, gathered, normal_param, project, tensor_spec
from moe_jax.mesh import BATCH_AXES, batch_spec
from moe_jax.ops.attention import attention
from moe_jax.ops.cached_attention import attend_to_stored
from moe_jax.ops.rope import apply_rope
from moe_jax.ops.stored_vectors import StoredVectors, append

OF_ALL_HEADS = ("latent", "rope")  # what latent attention keeps


class Attention(nnx.Module):
    """Causal self-attention within segments; what else there is to it, `configs/base.py` says field by field.

    QK-norm is RMSNorm over each head (2302.05442) or over all heads together (OLMo 2, 2501.00656). Queries and keys are projected,
    normed, cut to size (`qkv_clip`; OLMoE's order), and then rotated. The sinks start at 0.
    """

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
        if a.qk_norm == "head":
            self.q_norm = RMSNorm(N, config.norm_eps, "N")
            self.k_norm = RMSNorm(N, config.norm_eps, "N")
        elif a.qk_norm == "full":
            self.q_norm = AllHeadsRMSNorm(H, N, config.norm_eps, "HN")
            self.k_norm = AllHeadsRMSNorm(G, N, config.norm_eps, "GN")
        if a.sinks:
            self.sink_H = constant_param(0.0, (H,), ("tensor",))

    def __call__(
        self, x_BSD: jax.Array, segment_ids_BS: jax.Array, positions_BS: jax.Array, sees_all: jax.Array | None = None
    ) -> jax.Array:
        """What attention adds to the residual stream.

        Args:
          x_BSD: the normed stream.
          segment_ids_BS: int32; tokens see earlier tokens of their own segment only; 0 is padding.
          positions_BS: int32, from 0 in each document.
          sees_all: bool scalar, whether this is a layer whose window is not applied (`attention.full_every`); None means it is not.
        """
        return self.prefill(x_BSD, segment_ids_BS, positions_BS, sees_all)[0]

    def prefill(
        self, x_BSD: jax.Array, segment_ids_BS: jax.Array, positions_BS: jax.Array, sees_all: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As `__call__`, and what `decode` wants kept of every token: [B, S, G, N] by the names of `kept_shapes`."""
        q_BSHN, k_BSGN, v_BSGN = self._heads(x_BSD)
        y_BSHN, k_BSGN = self._attend(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, positions_BS, sees_all)
        return self._out(y_BSHN), {"key": k_BSGN, "value": v_BSGN}

    def kept_shapes(self) -> dict[str, tuple[int, int]]:
        """(heads, width) of what is kept of a token: its key, rotated, and its value. Heads are split over the tensor axis."""
        shape = self.config.num_kv_heads, self.config.head_dim
        return {"key": shape, "value": shape}

    def decode(
        self, x_B1D: jax.Array, cache: dict[str, StoredVectors], at_B: jax.Array, window: int
    ) -> tuple[jax.Array, dict[str, StoredVectors]]:
        """One token of each text: what attention adds to the stream, and the cache with the token in it.

        Args:
          x_B1D: the normed stream.
          cache: of this layer, by the names of `kept_shapes`.
          at_B: int32, the token's position.
          window: of this layer; 0 for none.
        """
        a = self.config

        def body(q_B1HN, k_B1GN, v_B1GN, at_B, sink_H, cache):
            q_B1HN, k_B1GN = (apply_rope(x, at_B[:, None], a.rope) for x in (q_B1HN, k_B1GN))
            key, value = append(cache["key"], k_B1GN[:, 0], at_B), append(cache["value"], v_B1GN[:, 0], at_B)
            settings = {"window": window, "scale": a.scale or a.head_dim**-0.5, "softcap": a.softcap}
            y_BHN = attend_to_stored([q_B1HN[:, 0]], [key], value, at_B, sink_H, **settings)
            return y_BHN[:, None], {"key": key, "value": value}

        heads, rows, stored = tensor_spec("tensor", None), batch_spec(1), cache_spec(cache)
        specs = (heads, heads, heads, rows, P("tensor"), stored)
        sink_H = self.sink_H[...] if a.sinks else None
        y_B1HN, cache = jax.shard_map(body, in_specs=specs, out_specs=(heads, stored))(*self._heads(x_B1D), at_B, sink_H, cache)
        return self._out(y_B1HN), cache

    def _heads(self, x_BSD):
        """Queries, keys and values, normed and cut to size, not yet rotated."""
        q_BSHN = self._project(x_BSD, self.wq_DHN, "bq_HN")
        k_BSGN = self._project(x_BSD, self.wk_DGN, "bk_GN")
        v_BSGN = self._project(x_BSD, self.wv_DGN, "bv_GN")
        if self.config.qk_norm != "none":
            q_BSHN, k_BSGN = self.q_norm(q_BSHN), self.k_norm(k_BSGN)
        if size := self.config.qkv_clip:
            q_BSHN, k_BSGN, v_BSGN = (jnp.clip(array, -size, size) for array in (q_BSHN, k_BSGN, v_BSGN))
        return q_BSHN, k_BSGN, v_BSGN

    def _project(self, x_BSD, w, bias_name):
        y = project("BSD,DHN->BSHN", x_BSD, gathered(w, P(None, "tensor", None), self.dtype))
        return y + getattr(self, bias_name)[...].astype(self.dtype) if self.config.qkv_bias else y

    def _out(self, y_BSHN):
        w_HND = gathered(self.wo_HND, P("tensor", None, None), self.dtype)
        y_BSD = project("BSHN,HND->BSD", y_BSHN, w_HND, tensor_spec(None))
        return y_BSD + self.bo_D[...].astype(self.dtype) if self.config.out_bias else y_BSD

    def _attend(self, q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, positions_BS, sees_all):
        """Every device attends with its own heads over its own sequences: manual, so that fused kernels see plain arrays.

        Returns the rotated keys too.
        """

        def body(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, positions_BS, sink_H, sees_all):
            q_BSHN = apply_rope(q_BSHN, positions_BS, self.config.rope)
            k_BSGN = apply_rope(k_BSGN, positions_BS, self.config.rope)
            return attend(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, sink_H, sees_all, self.config), k_BSGN

        heads, rows = tensor_spec("tensor", None), batch_spec(2)
        island = jax.shard_map(body, in_specs=(heads, heads, heads, rows, rows, P("tensor"), P()), out_specs=(heads, heads))
        sink_H = self.sink_H[...] if self.config.sinks else None
        return island(q_BSHN, k_BSGN, v_BSGN, segment_ids_BS, positions_BS, sink_H, sees_all)


def cache_spec(cache: dict[str, StoredVectors]) -> dict[str, StoredVectors]:
    """Specs of a layer's cache: texts over the batch axes, heads over tensor; what all heads share is on every device."""

    def spec(name, array):
        return P(BATCH_AXES, None if name in OF_ALL_HEADS else "tensor", *(None,) * (array.ndim - 2))

    return {name: jax.tree.map(partial(spec, name), stored) for name, stored in cache.items()}


class AllHeadsRMSNorm(nnx.Module):
    """x / rms(x) * scale over the last two axes together, in float32: the heads of all devices are one vector."""

    def __init__(self, heads: int, width: int, eps: float, axes: str):
        self.eps = eps
        self.name = f"scale_{axes}"
        setattr(self, self.name, constant_param(1.0, (heads, width), ("tensor", None)))

    def __call__(self, x_BSHN: jax.Array) -> jax.Array:
        x32_BSHN = x_BSHN.astype(jnp.float32)
        rms_BS11 = jnp.sqrt(jnp.mean(jnp.square(x32_BSHN), axis=(-2, -1), keepdims=True) + self.eps)
        return (x32_BSHN / rms_BS11 * getattr(self, self.name)[...]).astype(x_BSHN.dtype)


def attend(
    q_BSHN: jax.Array,
    k_BSGN: jax.Array,
    v_BSGM: jax.Array,
    segment_ids_BS: jax.Array,
    sink_H: jax.Array | None,
    sees_all: jax.Array | None,
    config: AttentionConfig,
) -> jax.Array:
    """`moe_jax.ops.attention` of one device's arrays as `config` wants it, the window lifted where `sees_all` is True.

    Layers run in one scan, so which of the two a layer is is known only then, while a window's blocks are cut out before: one of
    two branches runs. What they keep for the gradient is of the same shapes, which JAX lays one over the other.
    """

    def branch(window):
        return partial(
            attention, window=window, scale=config.scale, softcap=config.softcap, implementation=config.implementation
        )

    operands = q_BSHN, k_BSGN, v_BSGM, segment_ids_BS, sink_H
    if sees_all is None or not config.window:
        return branch(config.window)(*operands)
    return jax.lax.cond(sees_all, branch(0), branch(config.window), *operands)
