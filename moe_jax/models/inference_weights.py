"""From the parameters of a `Transformer` to those of a `Decoder`: unstacked, in the compute dtype, split over experts and tensor only."""

import dataclasses
import logging
from functools import partial

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import ConfigError, ModelConfig
from moe_jax.layers.moe import RouterState
from moe_jax.layers.separate_experts import separate
from moe_jax.mesh import target_platform
from moe_jax.models.decoder import Decoder
from moe_jax.ops.quantised import format_of
from moe_jax.ops.quantised_tree import Report, quantise_tree
from moe_jax.routing import make_router

_LOG = logging.getLogger(__name__)

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


@dataclasses.dataclass(frozen=True)
class InferenceModel:
    """A model laid out for inference on a mesh: what any number of `Generator`s can share.

    Attributes:
      config: of the model that was trained.
      mesh: where it is.
      weights: (params, router state) of a `Decoder`.
      graphs: a `Decoder`'s for either way to run the experts, by dispatch.
      report: bytes and errors of the weights as they are kept.
    """

    config: ModelConfig
    mesh: jax.sharding.Mesh
    weights: tuple[dict, dict]
    graphs: dict[str, nnx.GraphDef]
    report: Report

    def decoder(self, weights: tuple[dict, dict], dispatch: str) -> Decoder:
        """The model of `weights`, which are these, or what stands for them in a program."""
        return nnx.merge(self.graphs[dispatch], *weights)


def lay_out_for_inference(
    model: ModelConfig, params: dict, router_state: dict, mesh: jax.sharding.Mesh, quantise: str = "none"
) -> InferenceModel:
    """Lays the parameters of a `Transformer` out for inference, beside those that are given, which can go then.

    Args:
      model: of the parameters.
      params, router_state: as `transformer.build` makes them.
      mesh: theirs.
      quantise: format of the matrices, "none", "int8" or "int4:GROUP" (`moe_jax.ops.quantised`).

    Raises:
      ConfigError: an unknown format, or a model that cannot be decoded (`inference_config`).
    """
    how = format_of(quantise, "weights")
    configs = {dispatch: inference_config(model, dispatch) for dispatch in ("dropless", "touched")}
    with jax.set_mesh(mesh):
        plain, state = decoder_weights(model, params, router_state)
        graphs = {dispatch: decoder_graph(config, plain) for dispatch, config in configs.items()}
        params, report = quantise_tree(plain, how, "weights")
    _LOG.info("weights: %s, %.1f MB (before: %.1f MB)", quantise, report.bytes_after / 1e6, report.bytes_before / 1e6)
    return InferenceModel(model, mesh, (params, state), graphs, report)


def decoder_weights(model: ModelConfig, params: dict, router_state: dict) -> tuple[dict, dict]:
    """(params, router state) for `decoder_graph`'s model, on the ambient mesh. Works inside `jax.jit` too."""
    layers, states = {}, {}
    for i in range(model.num_layers):
        stack, index = _place(model, i)
        layers[i] = _layer(_get(params, stack), index, model.dtype, model.is_moe_layer(i) and separates())
        if state := _get(router_state, stack):
            states[i] = _layer(state, index, "float32", False)
    whole = {name: _whole(params[name], model.dtype) for name in ("embed", "final_norm", "head") if name in params}
    return {**whole, "layers": layers}, {"layers": states}


@partial(jax.jit, static_argnums=(2, 3))
def _layer(stack, index, dtype, apart):
    """A layer of a stack; one program for all layers of a kind. With `apart` its experts become arrays of their own."""
    layer = _cast(jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), stack), dtype)
    if apart:
        layer["moe"]["experts"] = separate(layer["moe"]["experts"])
    return layer


@partial(jax.jit, static_argnums=1)
def _whole(tree, dtype):
    return _cast(tree, dtype)


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


def _cast(tree, dtype):
    """The arrays in the compute dtype, without a split over fsdp."""

    def leaf(path, array):
        spec = P(*(None if axes == "fsdp" else axes for axes in jax.typeof(array).sharding.spec))
        return jax.sharding.reshard(array if path[-1].key.startswith(FLOAT32) else array.astype(dtype), spec)

    return jax.tree_util.tree_map_with_path(leaf, tree)
