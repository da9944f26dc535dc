"""A trained model laid out for inference: its layers one by one, each with a cache of its own.

A scan over stacked layers would have each step of decoding copy every layer's weights, and windows differ by layer: here the loop over
layers is written out, and each layer's cache is as long as its window.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig
from moe_jax.layers.attention import cache_spec
from moe_jax.layers.basic import Embedding, Head, make_norm, scaled
from moe_jax.layers.block import Block
from moe_jax.layers.separate_experts import SeparateExperts
from moe_jax.mesh import BATCH_AXES, EXPERT_AXES, Axes, batch_spec
from moe_jax.models.transformer import capped
from moe_jax.ops.stored_vectors import StoredVectors, fill, no_vectors

AXES = Axes(BATCH_AXES, EXPERT_AXES, None, "tensor")  # no weight is split over fsdp here
Cache = list[dict[str, StoredVectors]]  # of each layer


class Decoder(nnx.Module):
    """The same function as `Transformer` of the same parameters, dropless, one token of each text after the other."""

    def __init__(self, config: ModelConfig, separate: Mapping[str, jax.ShapeDtypeStruct] | None = None, *, rngs: nnx.Rngs):
        """With `separate`, the shapes of `SeparateExperts`, experts are of that kind."""
        V, D, dtype = config.vocab_size, config.d_model, jnp.dtype(config.dtype)
        self.config = config
        self.embed = Embedding(V, D, config.init_std, dtype, rngs=rngs)
        layers = [Block(config, is_moe=config.is_moe_layer(i), rngs=rngs) for i in range(config.num_layers)]
        for layer in layers:
            if layer.is_moe:
                layer.moe.axes = AXES
            if layer.is_moe and separate is not None:
                layer.moe.experts = SeparateExperts({name: jnp.zeros(of.shape, of.dtype) for name, of in separate.items()})
        self.layers = nnx.List(layers)
        self.final_norm = make_norm(config)
        tied, bias = config.tied_embeddings, config.head_bias
        self.head = Head(V, D, config.init_std, dtype, tied=tied, bias=bias, rngs=rngs)

    def forward(self, tokens_BS: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array, list[dict[str, jax.Array]]]:
        """The texts' first `length_B` tokens: (x_BSD before the head, load_LE, what each layer's attention keeps)."""
        tokens_BS, length_B = jax.sharding.reshard(tokens_BS, batch_spec(2)), jax.sharding.reshard(length_B, batch_spec(1))
        positions_BS = jax.lax.broadcasted_iota(jnp.int32, tokens_BS.shape, 1, out_sharding=batch_spec(2))
        segment_ids_BS = jnp.where(positions_BS < length_B[:, None], 1, 0)
        x_BSD, auxes, everything = self._embed(tokens_BS), [], []
        for i, layer in enumerate(self.layers):
            inputs = x_BSD, segment_ids_BS, positions_BS, self._sees_all(i)
            x_BSD, aux, kept = layer.prefill(*inputs, **self._for_moe(i, tokens_BS, positions_BS))
            auxes.append(aux)
            everything.append(kept)
        return self.final_norm(x_BSD), _loads(auxes), everything

    def prefill(
        self, cache: Cache, tokens_PS: jax.Array, length_P: jax.Array, row_P: jax.Array
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Reads P new texts into the rows `row_P` of the cache; a row that is not in it is left out.

        Returns: logits [P, V] of the token after each text, the experts' loads [L, E] of the MoE layers, and the cache.
        """
        x_PSD, load_LE, everything = self.forward(tokens_PS, length_P)
        column_S = jnp.arange(tokens_PS.shape[1], dtype=jnp.int32)
        last_PS = (column_S == jax.sharding.reshard(length_P, batch_spec(1))[:, None] - 1).astype(x_PSD.dtype)
        x_P1D = jnp.einsum("PSD,PS->PD", x_PSD, last_PS)[:, None]
        cache = [_fill(old, kept, length_P, row_P) for old, kept in zip(cache, everything, strict=True)]
        return self.logits(x_P1D)[:, 0], load_LE, cache

    def decode(
        self, cache: Cache, tokens_B: jax.Array, at_B: jax.Array, live_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """One token of each text, at position `at_B`; returns as `prefill`. A row that is not live computes nonsense and gets no expert."""
        tokens_B, at_B, live_B = (jax.sharding.reshard(array_B, batch_spec(1)) for array_B in (tokens_B, at_B, live_B))
        x_B1D, auxes, new = self._embed(tokens_B[:, None]), [], []
        for i, layer in enumerate(self.layers):
            for_moe = self._for_moe(i, tokens_B[:, None], at_B[:, None])
            window = self.config.attention.layer_window(i)
            x_B1D, aux, kept = layer.decode(x_B1D, cache[i], at_B, live_B, window, **for_moe)
            auxes.append(aux)
            new.append(kept)
        return self.logits(self.final_norm(x_B1D))[:, 0], _loads(auxes), new

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """As `Transformer.logits`."""
        return capped(scaled(self.head(x_BSD, self.embed), self.config.logit_scale), self.config.logit_softcap)

    def new_cache(self, num_rows: int, length: int, dtype: str) -> Cache:
        """Empty, for texts of at most `length` tokens; a layer with a window keeps no more than that. `dtype` may be int8."""
        return [self._empty(i, num_rows, length, dtype) for i in range(len(self.layers))]

    def _empty(self, i, num_rows, length, dtype):
        num_slots, shapes = min(self.config.attention.layer_window(i) or length, length), self.layers[i].attention.kept_shapes()
        empty = {name: no_vectors((num_rows, heads, num_slots, width), dtype) for name, (heads, width) in shapes.items()}
        return jax.tree.map(jax.sharding.reshard, empty, cache_spec(empty))

    def _embed(self, tokens_BS):
        return scaled(self.embed(tokens_BS), self.config.embedding_scale)

    def _sees_all(self, i):
        return jnp.asarray(self.config.attention.layer_window(i) == 0) if self.config.attention.full_every else None

    def _for_moe(self, i, tokens_BS, positions_BS):
        """What an MoE layer is told: a token's place is that in its own text, so that no answer depends on the other texts."""
        return {"token_id_BS": positions_BS, "vocabulary_BS": tokens_BS} if self.config.is_moe_layer(i) else {}


def _loads(auxes):
    """The experts' loads of the MoE layers, int32 [L, E]; of a dense model [0, 0]."""
    loads = [aux.stats.load_E for aux in auxes if aux is not None]
    return jnp.stack(loads) if loads else jnp.zeros((0, 0), jnp.int32)


def _fill(cache, kept, length_P, row_P):
    """A layer's cache with P texts in it: every device takes those whose rows it has."""
    num_rows = jax.tree.leaves(cache)[0].shape[0]
    row_B = jax.lax.broadcasted_iota(jnp.int32, (num_rows,), 0, out_sharding=batch_spec(1))
    specs = cache_spec(cache)
    of_kept = {name: P(None, None, spec.values_BGTN[1], None) for name, spec in specs.items()}
    kept = {name: jax.sharding.reshard(array_PSGN, of_kept[name]) for name, array_PSGN in kept.items()}

    def body(cache, kept, length_P, row_P, row_B):
        own_P = row_P - row_B[0]
        return {name: fill(cache[name], jnp.swapaxes(x_PSGN, 1, 2), length_P, own_P) for name, x_PSGN in kept.items()}

    island = jax.shard_map(body, in_specs=(specs, of_kept, P(), P(), batch_spec(1)), out_specs=specs)
    return island(cache, kept, length_P, row_P, row_B)
