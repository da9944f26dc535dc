"""The decoder: embedding, a stack of dense blocks, a stack of groups that end in an MoE block, norm, head.

Layers are stacked and scanned, so compile time does not grow with depth; on a CPU, whose loops copy each layer's weights in and their
gradients out, the scan is unrolled (`scan_unroll`). `first_dense` layers form the first stack; the rest is a
stack of groups of `every` layers, the last of each MoE. A dense model is the first stack alone.
"""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import ModelConfig
from moe_jax.exchange.contract import KEPT
from moe_jax.layers.basic import Embedding, Head, gathered, make_norm, normal_param, project, scaled
from moe_jax.layers.block import Block
from moe_jax.layers.moe import MoEAux, Replay, RouterState
from moe_jax.mesh import batch_spec, target_platform
from moe_jax.routing import language_router

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat_policy(config: ModelConfig) -> Callable[..., bool]:
    """What the backward pass finds saved: `model.remat`'s choice, and what came over the wire unless `remat_exchange`."""
    policy = REMAT_POLICIES[config.remat]
    if config.moe.remat_exchange:
        return policy
    keep = jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint_policies.save_from_both_policies(policy, keep)


class Group(nnx.Module):
    """`every - 1` dense blocks and one MoE block."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dense_names = [f"dense_{i}" for i in range(config.moe.every - 1)]
        for name in self.dense_names:
            setattr(self, name, Block(config, is_moe=False, rngs=rngs))
        self.moe = Block(config, is_moe=True, rngs=rngs)

    def __call__(self, x_BSD, segment_ids_BS, positions_BS, sees_all=None, **for_moe):
        """As `Block`; `sees_all` is of each block, [every]."""
        blocks = [getattr(self, name) for name in self.dense_names] + [self.moe]
        sees_all = [None] * len(blocks) if sees_all is None else list(sees_all)
        for block, sees in zip(blocks[:-1], sees_all[:-1], strict=True):
            x_BSD, _ = block(x_BSD, segment_ids_BS, positions_BS, sees)
        return self.moe(x_BSD, segment_ids_BS, positions_BS, sees_all[-1], **for_moe)


class Ahead(nnx.Module):
    """What predicts the token after the next (DeepSeek-V3, 2412.19437, section 2.2): a projection, a layer like the last, a norm.

    The projection of two normed vectors end to end is the sum of two projections; embedding and head are the model's.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, self.dtype = config.d_model, jnp.dtype(config.dtype)
        self.hidden_norm, self.embed_norm, self.final_norm = make_norm(config), make_norm(config), make_norm(config)
        self.w_hidden_DD = normal_param(rngs, (D, D), ("fsdp", None), config.init_std)
        self.w_embed_DD = normal_param(rngs, (D, D), ("fsdp", None), config.init_std)
        self.block = _stack(lambda r: Block(config, is_moe=config.num_moe_layers > 0, rngs=r), 1, rngs)

    def join(self, x_BSD: jax.Array, embedding_BSD: jax.Array) -> jax.Array:
        """The block's input (eq. 21) of the model's last hidden vectors and the next tokens' embeddings."""
        w_hidden_DD, w_embed_DD = (gathered(w, P(None, None), self.dtype) for w in (self.w_hidden_DD, self.w_embed_DD))
        of_hidden_BSD = project("BSD,DE->BSE", self.hidden_norm(x_BSD), w_hidden_DD)
        return of_hidden_BSD + project("BSD,DE->BSE", self.embed_norm(embedding_BSD), w_embed_DD)


class Transformer(nnx.Module):
    """A decoder-only language model. Build it under `jax.set_mesh`, inside `jax.jit` (see `build`)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if not config.vocab_size:
            raise ValueError("model.vocab_size = 0 when the model was built; set it to the tokenizer's size.")
        if config.num_moe_layers:
            language_router(config.moe.router, config.moe.num_experts)
        self.config = config
        V, D, dtype = config.vocab_size, config.d_model, jnp.dtype(config.dtype)
        self.embed = Embedding(V, D, config.init_std, dtype, rngs=rngs)
        self.num_groups = config.num_moe_layers
        self.num_dense = config.moe.first_dense if self.num_groups else config.num_layers
        if self.num_dense:
            self.dense = _stack(lambda r: Block(config, is_moe=False, rngs=r), self.num_dense, rngs)
        if self.num_groups:
            self.groups = _stack(lambda r: Group(config, rngs=r), self.num_groups, rngs)
        self.final_norm = make_norm(config)
        tied, bias = config.tied_embeddings, config.head_bias
        self.head = Head(V, D, config.init_std, dtype, tied=tied, bias=bias, rngs=rngs)
        if config.mtp_layers:
            self.mtp = Ahead(config, rngs=rngs)

    def __call__(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        noise_key: jax.Array | None = None,
        token_id_BS: jax.Array | None = None,
        *,
        replay: Replay | None = None,
        record: bool = False,
    ) -> tuple[jax.Array, MoEAux | None]:
        """Logits of the next token.

        Args: as in `hidden`.

        Returns:
          logits_BSV in the compute dtype, and the MoE layers' aux stacked [L, ...] (None for a dense model).
        """
        inputs = tokens_BS, segment_ids_BS, positions_BS, noise_key, token_id_BS
        x_BSD, aux = self.hidden(*inputs, replay=replay, record=record)
        return self.logits(x_BSD), aux

    def hidden(
        self,
        tokens_BS: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        noise_key: jax.Array | None = None,
        token_id_BS: jax.Array | None = None,
        *,
        replay: Replay | None = None,
        record: bool = False,
        loss_probe: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, MoEAux | None]:
        """What the head makes logits of.

        Args:
          tokens_BS: int32 token ids.
          segment_ids_BS: int32; tokens see earlier tokens of their own segment only; 0 is padding.
          positions_BS: int32 positions for the rotary embedding, restarting with each document.
          noise_key: key of this step, for routers with noise; None in evaluation.
          token_id_BS: int32 places in the global batch (default: of this batch), which the noise is a function of.
          replay: choices to make again, of every MoE layer: [L, B, S, M].
          record: whether `MoEAux.per_token` tells the choices.
          loss_probe: as `MoE`, of every MoE layer: [L, ...].

        Returns:
          x_BSD after the last norm, in the compute dtype, and aux as `__call__`.
        """
        if token_id_BS is None:
            token_id_BS = token_ids(tokens_BS)
        chex.assert_equal_shape([tokens_BS, segment_ids_BS, positions_BS, token_id_BS])
        tokens_BS, segment_ids_BS, positions_BS, token_id_BS = _split(tokens_BS, segment_ids_BS, positions_BS, token_id_BS)
        x_BSD, inputs, aux = self._embed(tokens_BS), (segment_ids_BS, positions_BS), None
        if self.num_dense:
            of_layers = {"sees_all": self._sees_all(0, self.num_dense)}
            x_BSD, _ = self._scan(self.dense, x_BSD, inputs, of_layers, {}, self.num_dense)
        if self.num_groups:
            keys_L = None if noise_key is None else jax.random.split(noise_key, self.num_groups)
            same = {"token_id_BS": token_id_BS, "vocabulary_BS": tokens_BS, "record": record}
            of_layers = {"noise_key": keys_L, "replay": replay, "loss_probe": loss_probe}
            of_layers["sees_all"] = self._sees_all(self.num_dense, self.num_groups, self.config.moe.every)
            x_BSD, aux = self._scan(self.groups, x_BSD, inputs, of_layers, same, self.num_groups)
        return self.final_norm(x_BSD), aux

    def ahead(
        self,
        x_BSD: jax.Array,
        next_BS: jax.Array,
        segment_ids_BS: jax.Array,
        positions_BS: jax.Array,
        noise_key: jax.Array | None,
        token_id_BS: jax.Array,
        *,
        loss_probe: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, MoEAux | None]:
        """Logits of the token after the next (2412.19437, eqs. 21-23), for a model with `mtp_layers`.

        Args:
          x_BSD: of `hidden`: after the last norm, as it is served.
          next_BS: int32, the next token of each.
          segment_ids_BS: 0 also where the next token is of another document or not known: such a place takes no part.
          positions_BS, noise_key, token_id_BS: as in `hidden`.
          loss_probe: as `hidden`, of this one layer.

        Returns: as `__call__`, the aux of the one layer [1, ...].
        """
        next_BS, segment_ids_BS, positions_BS, token_id_BS = _split(next_BS, segment_ids_BS, positions_BS, token_id_BS)
        x_BSD = self.mtp.join(x_BSD, self._embed(next_BS))
        key_1 = None if noise_key is None else jax.random.fold_in(noise_key, self.num_groups)[None]
        same = {"token_id_BS": token_id_BS, "vocabulary_BS": next_BS} if self.num_groups else {}
        of_layers = {"noise_key": key_1, "loss_probe": loss_probe, "sees_all": self._sees_all(self.config.num_layers, 1)}
        x_BSD, aux = self._scan(self.mtp.block, x_BSD, (segment_ids_BS, positions_BS), of_layers, same, 1)
        return self.logits(self.mtp.final_norm(x_BSD)), aux

    def _embed(self, tokens_BS):
        return scaled(self.embed(tokens_BS), self.config.embedding_scale)

    def logits(self, x_BSD: jax.Array) -> jax.Array:
        """Logits [B, S, V] in the compute dtype of what `hidden` returns; the cap's arithmetic is float32."""
        return capped(scaled(self.head(x_BSD, self.embed), self.config.logit_scale), self.config.logit_softcap)

    def _sees_all(self, first, *shape):
        """bool of the layers from `first` on, in `shape`: which of them have no window; None where all layers are alike."""
        if not self.config.attention.full_every:
            return None
        layers = range(first, first + math.prod(shape))
        return jnp.asarray([self.config.attention.layer_window(layer) == 0 for layer in layers]).reshape(shape)

    def _scan(self, stack, x_BSD, inputs, of_layers, same, length):
        """Runs a stack; `of_layers` has `_sees_all` and what each MoE layer is told, `same` what all of them are told."""
        graphdef, state = nnx.split(stack)

        def body(x_BSD, layer):
            layer_state, told = layer
            return nnx.merge(graphdef, layer_state)(x_BSD, *inputs, **told, **same)

        if self.config.remat != "none":
            body = jax.checkpoint(body, policy=remat_policy(self.config))
        everything = self.config.scan_unroll == 0 and target_platform() == "cpu"
        unroll = length if everything else min(self.config.scan_unroll or 1, length)
        return jax.lax.scan(body, x_BSD, (state, of_layers), unroll=unroll)


def capped(logits_BSV: jax.Array, cap: float) -> jax.Array:
    """cap tanh(logits / cap), computed in float32; as they are where cap is 0."""
    return (cap * jnp.tanh(logits_BSV.astype(jnp.float32) / cap)).astype(logits_BSV.dtype) if cap else logits_BSV


def _split(*arrays_BS):
    return (jax.sharding.reshard(array_BS, batch_spec(2)) for array_BS in arrays_BS)


def token_ids(tokens_BS: jax.Array) -> jax.Array:
    """Row-major places 0 .. B*S-1 in the batch, sharded as `tokens_BS`."""
    sharding = jax.typeof(tokens_BS).sharding
    rows = jax.lax.broadcasted_iota(jnp.int32, tokens_BS.shape, 0, out_sharding=sharding)
    columns = jax.lax.broadcasted_iota(jnp.int32, tokens_BS.shape, 1, out_sharding=sharding)
    return rows * tokens_BS.shape[1] + columns


def _stack(make, length, rngs):
    """`length` copies of a module, each with its own keys, as one module whose arrays have a leading layer axis."""
    make = nnx.transform_metadata(make, in_axes=0, out_axes=0, partition=None)
    return nnx.vmap(make)(rngs.split(length))


def abstract(config: ModelConfig, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, params, router state) of a model that is shapes only, on the ambient mesh."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(seed))), nnx.Param, RouterState)


def innermost(router_state: dict) -> dict[str, jax.Array]:
    """The stacked state [L, ...] of the routers by its names, out of the nested dict that `build` returns.

    The layer that predicts the token after the next is the last, where its router has a state.
    """
    stacks = _stacks(router_state)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks) if len(stacks) > 1 else (stacks or [{}])[0]


def with_innermost(router_state: dict, state: dict[str, jax.Array]) -> dict:
    """The nested dict `router_state` with `state` in the place of its `innermost`."""
    arrays, start = {name: [] for name in state}, 0
    for stack in _stacks(router_state):
        end = start + len(next(iter(stack.values())))
        for name, array in state.items():
            arrays[name].append(array[start:end])
        start = end
    leaves = [array for parts in zip(*(arrays[name] for name in sorted(arrays)), strict=True) for array in parts]
    return jax.tree.unflatten(jax.tree.structure(router_state), leaves)


def _stacks(tree):
    """The dicts of arrays in a nested dict, in the order of its keys, which is that of the layers."""
    if not any(isinstance(value, dict) for value in tree.values()):
        return [tree] if tree else []
    return [stack for name in sorted(tree) for stack in _stacks(tree[name])]


def build(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, dict, dict]:
    """A freshly initialised model on the ambient mesh as (graphdef, params, router_state).

    The last two are nested dicts of arrays with their shardings; `nnx.merge(graphdef, params, router_state)` is the model. The
    values depend on `seed` alone, not on the mesh.
    """

    @jax.jit
    def initialise():
        _, params, router_state = nnx.split(Transformer(config, rngs=nnx.Rngs(seed)), nnx.Param, RouterState)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(router_state)

    return abstract(config, seed)[0], *initialise()
