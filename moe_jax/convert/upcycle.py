"""A dense model made into a mixture of experts, from which training goes on (sparse upcycling).

    moe_model = upcycled_config(dense_model, MoEConfig(num_experts=8, num_shared_experts=0, router=RouterConfig("mixtral", 2)))
    params, router_state = upcycle(dense_model, params, moe_model, seed=0)

`copy`: every expert is the dense FFN, the router is new (Komatsuzaki et al., 2212.05055). `drop`: as copy, then in every expert a
random part of the hidden units is drawn anew (Drop-Upcycling, 2502.19261, section 3). `split`: experts are shards of the dense FFN,
all shards of it a virtual group that starts with one router column, so that a token chooses all of them or none (2410.07524,
section 3). Beyond the package's letters: `G` shards in a virtual group (1 where experts are whole), `W` hidden width of the shared experts.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.config import Config, ConfigError, ModelConfig, MoEConfig
from moe_jax.convert.upcycle_layer import Recipe, shared_width
from moe_jax.models.transformer import abstract
from moe_jax.routing import language_router
from moe_jax.routing.contract import Router, SoftRouting, Tokens
from moe_jax.train.paths import leaf_names

METHODS = ("copy", "drop", "split")
_TRIALS = 512  # tokens by which a router's weights are told to be the same for all
_FREE = (
    "init_std",
    "dtype",
    "remat",
    "scan_unroll",
    "logit_z_loss_weight",
    "mtp_loss_weight",
)  # of the model: not its function
_SAME = 1e-5  # relative: float32 sums of up to some hundred weights


def upcycled_config(dense_model: ModelConfig, moe: MoEConfig, method: str = "copy") -> ModelConfig:
    """`dense_model` with the experts of `moe`, whose hidden widths are those that a token's experts need to do the dense FFN's work.

    That is model.d_ff for every expert; with "split" what the shared experts leave of it, over the top_k experts of a token, which
    then costs what it did. The other fields of `moe` stay. `upcycle` takes other configs too.

    Raises:
      ConfigError: as `upcycle`.
    """
    _check_method(method)
    width = dense_model.d_ff
    if method == "split":
        whole, parts = width - moe.num_shared_experts * moe.shared_d_ff, moe.router.top_k
        parts += 0 if moe.shared_d_ff else moe.num_shared_experts
        if whole <= 0 or whole % parts:
            raise ConfigError(
                f"model.d_ff = {width} less {width - whole} of shared experts is not a multiple of the {parts} experts of a token; change"
                " model.moe.router.top_k, num_shared_experts or shared_d_ff."
            )
        width = whole // parts
    model = dataclasses.replace(dense_model, moe=dataclasses.replace(moe, d_ff=width))
    _check(dense_model, model, method)
    return model


def upcycle(
    dense_model: ModelConfig,
    params: Mapping[str, Any],
    moe_model: ModelConfig,
    *,
    seed: int,
    method: str = "copy",
    drop_fraction: float = 0.5,
    router_std: float | None = None,
    approximate: bool = False,
) -> tuple[dict, dict]:
    """The parameters of `moe_model` that start from those of `dense_model`, and the state of its routers.

    With "copy" and "split" the MoE model computes, in evaluation and without dropped tokens, what the dense model does: `w_down` of the
    experts is divided by what a token's routing weights of a shard add up to (1 for softmax after the choice, the scale for normalised
    sigmoids; 1 / G and scale / G over G shards). What that is, and that it is the same for every token, is found by routing random
    tokens. Where it is not, as for raw probabilities, no constant will do: such a router is refused, or with `approximate` its mean over
    tokens of standard normal numbers is used.

    Shared experts: with "copy" and "drop" they are n = W / model.d_ff copies of the FFN as it is, which with the routed sum make n + 1
    equal parts of the answer. With "split" they are its first W hidden units, and the virtual groups have the others. A shared gate
    starts at zero, where it halves, and the shared `w_down` is doubled. Biases of experts start at zero.

    Where all experts of a token are copies and its weights add up to a constant, their answers are equal and the language-model loss has
    no gradient for the router in the first step; experts part by the tokens that they see, and the router follows.

    Args:
      dense_model: without experts.
      params: as `transformer.build` returns them; arrays of numpy or jax, whole on this host.
      moe_model: `dense_model` but for `moe` and for what does not change the function (dtype, remat, ...).
      seed: of the routers and of "drop".
      method: "copy", "drop" or "split".
      drop_fraction: for "drop": the part of every expert's hidden units drawn anew (0.5 is best in 2502.19261, figure 3), rounded to
        whole units; its gate and up columns and down rows together, each matrix with mean and deviation of what is replaced in it.
      router_std: standard deviation of the routers' weights; None for model.init_std.
      approximate: take routers whose weights have no constant sum too, so that the function is only near the dense model's.

    Returns:
      (params, router_state) as `transformer.build(moe_model, ...)` returns them, of numpy arrays: float32, layers stacked. Those that do
        not change may share memory with `params`.

    Raises:
      ConfigError: configs that do not fit each other or the method, or a router with which the function cannot be kept.
    """
    shards = _check(dense_model, moe_model, method)
    std = moe_model.init_std if router_std is None else router_std
    if not 0 < std < math.inf:
        raise ConfigError(f"router_std = {std} must be greater than 0 and finite; None takes model.init_std.")
    if method == "drop" and not 0 < drop_fraction <= 1:
        raise ConfigError(f"drop_fraction = {drop_fraction} must be greater than 0 and at most 1; method='copy' drops nothing.")
    if seed < 0:
        raise ConfigError(f"seed = {seed} must be 0 or more.")
    moe = moe_model.moe
    router = language_router(moe.router, moe.num_experts)
    recipe = Recipe(
        moe_model,
        router,
        method == "split",
        shards,
        round(drop_fraction * moe.d_ff) if method == "drop" else 0,
        seed,
        std,
        weight=1.0,
    )
    weight = _shard_weight(recipe, must_be_constant=method != "drop" and not approximate)
    tree = _layers(dataclasses.replace(recipe, weight=weight), jax.tree.map(_float32, dict(params)))
    state = _router_state(moe_model, router)
    _, params_like, state_like = abstract(moe_model)
    _check_shapes(tree, params_like)
    _check_shapes(state, state_like)
    return tree, state


def _float32(array):
    return np.asarray(array, np.float32)


def _shard_weight(recipe: Recipe, must_be_constant: bool) -> float:
    """What a token's weights of the experts with one shard add up to, the mean over random tokens and shards.

    Raises:
      ConfigError: the experts are not given tokens, or no weight; or it is not the same for all and must be.
    """
    name, rng = recipe.model.moe.router.name, np.random.default_rng(0)
    places = np.arange(_TRIALS, dtype=np.int32)
    x_TD = rng.standard_normal((_TRIALS, recipe.model.d_model), np.float32)
    tokens = Tokens(x_TD, np.ones(_TRIALS, bool), places, vocabulary_T=places % recipe.model.vocab_size)
    with jax.set_mesh(jax.sharding.Mesh(jax.local_devices()[:1], ("one",))):
        routing = jax.jit(recipe.router.__call__)(tokens, recipe.router_params(0), recipe.router.init_state())
    if isinstance(routing, SoftRouting):
        raise ConfigError(
            f"model.moe.router.name = {name!r} gives experts mixes of tokens, which a dense FFN has never seen; choose a router that sends"
            " tokens."
        )
    weight_TG = np.zeros((_TRIALS, recipe.shards))
    sent_A = np.asarray(routing.expert_A) < recipe.router.num_experts
    where = np.asarray(routing.token_A)[sent_A], np.asarray(routing.expert_A)[sent_A] % recipe.shards
    np.add.at(weight_TG, where, np.asarray(routing.weight_A, np.float64)[sent_A])
    mean, low, high = weight_TG.mean(), weight_TG.min(), weight_TG.max()
    if not mean > 0:
        raise ConfigError(f"model.moe.router.name = {name!r} gives experts no weight; choose another router.")
    if must_be_constant and (high - low > _SAME * mean or routing.beside_TD is not None):
        whose = "of the shards of a virtual group are" if recipe.shards > 1 else "of a token add up to what is"
        raise ConfigError(
            f"model.moe.router.name = {name!r} as it is set: the weights {whose} not the same for all ({low:.3g} to {high:.3g} of random"
            " tokens), so the dense model's function cannot be kept; choose a router that normalises its weights and leaves groups whole"
            " (mixtral with normalize='after', deepseek with normalize=True), or approximate=True."
        )
    return float(f"{mean:.7g}")  # 1 where it is 1 but for rounding: copies are then equal to the bit


def _layers(recipe: Recipe, dense: dict) -> dict:
    """The tree of the MoE model out of the dense model's: stacks cut and put together as `models.transformer` has them."""
    model, first = recipe.model, recipe.model.moe.first_dense
    params = {name: tree for name, tree in dense.items() if name not in ("dense", "mtp")}

    def every(start):
        return jax.tree.map(lambda array: array[start :: model.moe.every].copy(), dense["dense"])

    if first:
        params["dense"] = jax.tree.map(lambda array: array[:first].copy(), dense["dense"])
    last = model.moe.every - 1
    params["groups"] = {f"dense_{i}": every(first + i) for i in range(last)} | {
        "moe": _upcycle_stack(recipe, every(first + last), 0)
    }
    if model.mtp_layers:
        params["mtp"] = dense["mtp"] | {"block": _upcycle_stack(recipe, dense["mtp"]["block"], model.num_moe_layers)}
    return params


def _upcycle_stack(recipe, block, start):
    """Stacked dense blocks as MoE blocks, of which the first is the MoE layer `start`."""
    mlp = block["mlp"]
    layers = [recipe.layer({name: w[i] for name, w in mlp.items()}, start + i) for i in range(len(mlp["w_up_DF"]))]
    rest = {name: tree for name, tree in block.items() if name != "mlp"}
    return rest | {"moe": jax.tree.map(lambda *arrays: np.stack(arrays), *layers)}


def _router_state(model: ModelConfig, router: Router) -> dict:
    state = {name: np.asarray(value) for name, value in router.init_state().items()}
    if not state:
        return {}

    def stacked(length):
        return {"moe": {name: np.stack([value] * length) for name, value in state.items()}}

    mtp = {"mtp": {"block": stacked(1)}} if model.mtp_layers else {}
    return {"groups": {"moe": stacked(model.num_moe_layers)}} | mtp


def _check_method(method):
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(METHODS)}."
        raise ConfigError(f"method = {method!r} is unknown; {hint}")


def _check(dense: ModelConfig, model: ModelConfig, method: str) -> int:
    """Refuses models that do not fit each other or the method; returns the number of shards of a virtual group."""
    _check_method(method)
    Config(model=model)  # the rules
    moe = model.moe
    if not model.vocab_size:
        raise ConfigError("model.vocab_size = 0 when the model was upcycled; set it to the tokenizer's size.")
    if dense.num_moe_layers:
        raise ConfigError(
            f"model.moe.num_experts = {dense.moe.num_experts} in the model to upcycle, which has experts already; give a dense one."
        )
    if not model.num_moe_layers:
        raise ConfigError("model.moe.num_experts = 0 in the model to make; give it at least one expert.")
    _check_alike(dense, model)
    language_router(moe.router, moe.num_experts)
    width = shared_width(moe)
    return _check_split(model, width) if method == "split" else _check_whole(model, width, method)


def _check_alike(dense, model):
    """Refuses models that differ in more than experts and `_FREE`."""
    same = {name: getattr(dense, name) for name in (*_FREE, "moe")}
    attention = dataclasses.replace(model.attention, implementation=dense.attention.implementation)
    was, wanted = (dataclasses.asdict(m) for m in (dense, dataclasses.replace(model, attention=attention, **same)))
    groups = [("model", was, wanted), ("model.attention", was.pop("attention"), wanted.pop("attention"))]
    for group, ours, theirs in groups:
        for name, value in ours.items():
            if theirs[name] != value:
                raise ConfigError(
                    f"{group}.{name} = {theirs[name]!r} but {value!r} in the dense model; the weights are for that, so change the config."
                )


def _check_whole(model, width, method):
    if model.moe.d_ff != model.d_ff:
        raise ConfigError(
            f"model.moe.d_ff = {model.moe.d_ff} is not model.d_ff = {model.d_ff}, and with method={method!r} every expert starts as the"
            f" whole FFN; set it to {model.d_ff}, or use method='split'."
        )
    if width % model.d_ff:
        raise ConfigError(
            f"model.moe.shared_d_ff = {model.moe.shared_d_ff} makes shared experts of width {width} in all, not a multiple of model.d_ff ="
            f" {model.d_ff}, and with method={method!r} they are copies of the FFN; set it to 0."
        )
    return 1


def _check_split(model, width):
    moe = model.moe
    shards, rest = divmod(model.d_ff - width, moe.d_ff)
    if shards < 1 or rest:
        raise ConfigError(
            f"model.moe.d_ff = {moe.d_ff} does not divide the {model.d_ff - width} hidden units that shared experts leave of model.d_ff ="
            f" {model.d_ff}; choose a divisor of them."
        )
    for field, value in (("router.top_k", moe.router.top_k), ("num_experts", moe.num_experts)):
        if value % shards:
            raise ConfigError(
                f"model.moe.{field} = {value} is not a multiple of the {shards} shards of {moe.d_ff} hidden units that make one FFN; a"
                " token has all shards of a virtual group or none."
            )
    return shards


def _check_shapes(tree, like):
    """Refuses arrays that are not those of the model; `like` is an abstract nnx.State."""
    like = nnx.to_pure_dict(like)
    found, wanted = (
        {name: tuple(leaf.shape) for name, leaf in zip(leaf_names(t), jax.tree.leaves(t), strict=True)} for t in (tree, like)
    )
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{name} would have shape {found.get(name)} and the MoE model's is {wanted.get(name)}; the parameters are not those of the"
                " dense model."
            )
