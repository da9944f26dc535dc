"""Exact parameter counts, matmul FLOPs and key/value caches of a config, by arithmetic: no array, no device."""

import dataclasses
import math
from dataclasses import dataclass

import jax

from moe_jax.config import Config, ConfigError, ModelConfig
from moe_jax.routing import make_router

GATED = ("swiglu", "geglu", "swiglu_clamped")  # activations of three matrices; the others have two


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """The config with `model.vocab_size` filled in for a tokenizer of `vocab_size` ids.

    Raises:
      ConfigError: the config's own vocabulary is smaller than the tokenizer's.
    """
    asked = config.model.vocab_size
    if asked and asked < vocab_size:
        raise ConfigError(f"model.vocab_size = {asked} is less than the tokenizer's {vocab_size} ids; raise it, or set 0.")
    filled = asked or -(-vocab_size // 128) * 128
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=filled))


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part.

    Attributes:
      embedding: the input table (the output head too when tied).
      head: the output head; when tied its bias alone, if there is one.
      attention: all layers' attention, but for the norms in it.
      dense: dense FFNs and shared experts, with the shared experts' gate.
      router: the routers' parameters.
      experts: all routed experts.
      active_experts: the routed experts that one token uses, on average where the router varies their number.
      norms: every norm, those of queries, keys and latents too.
      mtp: the layer that predicts the token after the next. It is not in `total`, nor in what is active: published counts leave it
        out, and a model that only predicts the next token runs without it.
      router_state: what the routers keep that no gradient moves (a balancing bias). It is not in `total` either; some published
        counts have it (DeepSeek-V3), some not (GLM-4.5-Air).
      tied: whether the table is the head too.
    """

    embedding: int
    head: int
    attention: int
    dense: int
    router: int
    experts: int
    active_experts: int
    norms: int
    mtp: int = 0
    router_state: int = 0
    tied: bool = False

    @property
    def total(self) -> int:
        """Every parameter, `mtp` and `router_state` aside."""
        return self.embedding + self.head + self._between + self.experts

    @property
    def active(self) -> int:
        """Parameters that one token uses, the input embedding included."""
        return self.embedding + self.head + self._between + self.active_experts

    @property
    def active_without_embedding(self) -> int:
        """Active parameters less the input table (a tied table still counts, as the head)."""
        return self.active - (0 if self.tied else self.embedding)

    @property
    def _between(self):
        return self.attention + self.dense + self.router + self.norms


@dataclass(frozen=True)
class CacheSize:
    """Numbers that attention keeps of the tokens so far, over all layers; times the bytes of a number it is memory.

    Attributes:
      growth: what each token adds for good, in the layers that see all tokens.
      window_growth: what each token adds in the layers with a window, until the window is full.
      window: tokens of the window; 0 where no layer has one.
    """

    growth: int
    window_growth: int
    window: int

    def values(self, length: int) -> int:
        """Numbers kept of `length` tokens."""
        return self.growth * length + self.window_growth * min(length, self.window)


def num_params(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of `model` (vocab_size must be set)."""
    moe, num_moe, table = model.moe, model.num_moe_layers, model.vocab_size * model.d_model
    num_dense = model.num_layers - num_moe
    expert, router = sum(_expert(model)), make_router(moe.router, moe.num_experts) if num_moe else None
    return ParameterCount(
        embedding=table,
        head=(not model.tied_embeddings) * table + model.head_bias * model.vocab_size,
        attention=model.num_layers * sum(_attention(model)),
        dense=num_dense * _mlp(model, model.d_ff) + num_moe * _shared(model),
        router=num_moe * sum(_routing(router, model)) if num_moe else 0,
        experts=num_moe * moe.num_experts * expert,
        active_experts=round(num_moe * router.active_experts * expert) if num_moe else 0,
        norms=model.num_layers * _layer_norms(model) + _norm(model),
        mtp=model.mtp_layers * _mtp(router, model),
        router_state=num_moe * sum(x.size for x in jax.eval_shape(router.init_state).values()) if num_moe else 0,
        tied=model.tied_embeddings,
    )


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Matmul FLOPs of one token's forward pass in a causal sequence of `seq_len`; a training step is three times this.

    Two per active weight (biases, norms and sinks are none), and attention over the mean causal context of each layer: half the
    sequence, or its window where that is shorter. The layer that predicts the token after the next is left out.
    """
    num_moe = model.num_moe_layers
    weights = model.num_layers * _attention(model)[0] + (model.num_layers - num_moe) * _mlp(model, model.d_ff)
    weights += model.vocab_size * model.d_model
    if num_moe:
        router = make_router(model.moe.router, model.moe.num_experts)
        weights += num_moe * (_shared(model) + _routing(router, model)[0] + router.active_experts * _expert(model)[0])
    windows = [model.attention.layer_window(layer) for layer in range(model.num_layers)]
    context = sum(_mean_context(seq_len, window) for window in windows)
    return round(2 * weights + 2 * model.attention.num_heads * sum(_head_widths(model)) * context)


def cache_size(model: ModelConfig) -> CacheSize:
    """What attention keeps: keys and values of each kv head; with latent attention the latent and the keys' positions."""
    a = model.attention
    layer = a.kv_rank + a.rope_head_dim if a.kv_rank else 2 * a.num_kv_heads * a.head_dim
    windowed = sum(a.layer_window(i) > 0 for i in range(model.num_layers))
    return CacheSize((model.num_layers - windowed) * layer, windowed * layer, a.window if windowed else 0)


def _mean_context(seq_len, window):
    """Tokens that a token sees, itself included, on average over a sequence."""
    w = min(window or seq_len, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


def _head_widths(model):
    """(width of a query, width of a head's values)."""
    a = model.attention
    return (a.head_dim + a.rope_head_dim, a.v_head_dim or a.head_dim) if a.kv_rank else (a.head_dim, a.head_dim)


def _attention(model):
    """(weights, vectors) of a layer; vectors are what no product has: biases, sinks."""
    a, D = model.attention, model.d_model
    H, G, N = a.num_heads, a.num_kv_heads, a.head_dim
    if not a.kv_rank:
        return 2 * D * N * (H + G), a.qkv_bias * N * (H + 2 * G) + a.out_bias * D + a.sinks * H
    query, value = _head_widths(model)
    queries = a.q_rank * (D + H * query) if a.q_rank else D * H * query
    keys_and_values = D * (a.kv_rank + a.rope_head_dim) + a.kv_rank * H * (N + value)
    return queries + keys_and_values + H * value * D, 0


def _mlp(model, width):
    return _matrices(model) * model.d_model * width


def _matrices(model):
    return 3 if model.activation in GATED else 2


def _expert(model):
    """(weights, biases) of one routed expert."""
    inner = (_matrices(model) - 1) * model.moe.d_ff
    return _mlp(model, model.moe.d_ff), model.moe.expert_bias * (inner + model.d_model)


def _shared(model):
    """The shared experts of a layer and their gate."""
    moe = model.moe
    return _mlp(model, moe.num_shared_experts * (moe.shared_d_ff or moe.d_ff)) + moe.shared_gate * model.d_model


def _routing(router, model):
    """(weights, biases) of one layer's router, which names its biases b_router_."""
    sizes = {name: math.prod(spec.shape) for name, spec in router.params(model.d_model).items()}
    biases = sum(size for name, size in sizes.items() if name.startswith("b_"))
    return sum(sizes.values()) - biases, biases


def _norm(model):
    """One norm of width D: its scale, and its bias if it has one."""
    return model.d_model * (2 if model.norm == "layer" else 1)


def _layer_norms(model):
    """The norms of a layer: before and, with post_norms, after attention and FFN; of queries and keys; of the latents."""
    a = model.attention
    of_heads = {"none": 0, "head": 2 * a.head_dim, "full": (a.num_heads + a.num_kv_heads) * a.head_dim}[a.qk_norm]
    return (4 if model.post_norms else 2) * _norm(model) + of_heads + a.kv_rank + a.q_rank


def _mtp(router, model):
    """One further layer, MoE where there are any, on the projection of the stream and the next token's embedding, both normed, and a
    norm before the head (DeepSeek-V3, 2412.19437, eqs. 21-23); table and head are the model's."""
    D, moe = model.d_model, model.moe
    if router is not None:
        ffn = _shared(model) + sum(_routing(router, model)) + moe.num_experts * sum(_expert(model))
    else:
        ffn = _mlp(model, model.d_ff)
    return 2 * D * D + 3 * _norm(model) + _layer_norms(model) + sum(_attention(model)) + ffn
