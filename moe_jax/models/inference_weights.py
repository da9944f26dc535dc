"""From the parameters of a `Transformer` to those of a `Decoder`: unstacked, in the compute dtype, split over experts and tensor only."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import ConfigError, ModelConfig
from moe_jax.layers.moe import RouterState
from moe_jax.layers.separate_experts import separate
from moe_jax.mesh import target_platform
from moe_jax.models.decoder import Decoder
from moe_jax.routing import make_router

# what the layers read in float32 whatever the compute dtype: norms, routers, sinks
FLOAT32 = ("scale_", "bias_D", "w_router_", "b_router_", "sink_")


def inference_config(model: ModelConfig, dispatch: str) -> ModelConfig:
    """`model` as it is decoded: nothing dropped, rounded or chunked on the way, and no layer for the token after the next.

    Raises:
      ConfigError: a router whose choice for a token depends on other tokens, which come later or are of other texts.
    """
    moe = model.moe
    if model.num_moe_layers and not make_router(moe.router, moe.num_experts).by_token:
        raise ConfigError(
            f"model.moe.router.name = {moe.router.name!r} chooses for a token by other tokens, which decoding does not have yet; texts can"
            " be made with a router that goes by the token alone."
        )
    plain = {"exchange_factor": 0.0, "exchange_chunks": 1, "dispatch_wire": "compute", "combine_wire": "compute"}
    moe = dataclasses.replace(moe, dispatch=dispatch, **plain)
    return dataclasses.replace(model, moe=moe, mtp_layers=0)


def decoder_weights(model: ModelConfig, params: dict, router_state: dict) -> tuple[dict, dict]:
    """(params, router state) for `decoder_graph`'s model, on the ambient mesh. Works inside `jax.jit` too."""
    layers, states = [], []
    for i in range(model.num_layers):
        stack, index = _place(model, i)
        layers.append(_layer(params, stack, index, model.dtype))
        states.append(_layer(router_state, stack, index, "float32") if _get(router_state, stack) else {})
        if model.is_moe_layer(i) and separates():
            layers[i]["moe"]["experts"] = separate(layers[i]["moe"]["experts"])
    whole = {name: _cast(params[name], None, model.dtype) for name in ("embed", "final_norm", "head") if name in params}
    return {**whole, "layers": dict(enumerate(layers))}, {"layers": {i: state for i, state in enumerate(states) if state}}


def decoder_graph(config: ModelConfig, params: dict) -> nnx.GraphDef:
    """The graph that `nnx.merge(graph, params, router_state)` makes a `Decoder` with; params of `decoder_weights`."""
    moe_layers = [i for i in range(config.num_layers) if config.is_moe_layer(i)]
    shapes = params["layers"][moe_layers[0]]["moe"]["experts"] if moe_layers and separates() else None
    model = nnx.eval_shape(lambda: Decoder(config, shapes, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param, RouterState)[0]


def separates() -> bool:
    """Whether experts are arrays of their own here: on a CPU. Elsewhere the grouped product reads only what it has rows for."""
    return target_platform() == "cpu"


def _place(model, layer):
    """(path of the stack, index in it) of a layer, as `Transformer` stacks them."""
    num_dense = model.moe.first_dense if model.num_moe_layers else model.num_layers
    if layer < num_dense:
        return ("dense",), layer
    group, place = divmod(layer - num_dense, model.moe.every)
    return ("groups", "moe" if place == model.moe.every - 1 else f"dense_{place}"), group


def _get(tree, path):
    for name in path:
        tree = tree.get(name, {})
    return tree


def _layer(tree, path, index, dtype):
    return _cast(_get(tree, path), index, dtype)


def _cast(tree, index, dtype):
    """The arrays of a tree, of layer `index` where they are stacked, without a split over fsdp."""

    def leaf(path, array):
        name = path[-1].key
        spec = P(*(None if axes == "fsdp" else axes for axes in jax.typeof(array).sharding.spec))
        if index is not None:
            array, spec = jax.lax.index_in_dim(array, index, keepdims=False), P(*spec[1:])
        return jax.sharding.reshard(array if name.startswith(FLOAT32) else array.astype(dtype), spec)

    return jax.tree_util.tree_map_with_path(leaf, tree)
