"""A config.json as a `ModelConfig` and back.

What a config.json says of training that is none of the model's arithmetic (dropout, caches, ids of special tokens, dtypes) is not
read; a file written for an imported model has it still.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.config import ModelConfig, from_dict
from moe_jax.convert import quantised
from moe_jax.convert.families import FAMILIES, LIST
from moe_jax.convert.family import Family
from moe_jax.convert.fields import nested
from moe_jax.convert.rope_fields import magnitude
from moe_jax.routing import default_options, language_router
from moe_jax.validation import CheckpointError

# Fields of ours that are not the function a model computes, but how it is computed or trained; a conversion may change them.
FREE = {
    "": "init_std dtype remat scan_unroll logit_z_loss_weight mtp_layers mtp_loss_weight",
    "moe.": "balance_loss_weight balance_loss_scope balance_loss_accumulation z_loss_weight dispatch capacity_factor"
    " capacity_priority exchange exchange_factor exchange_overflow exchange_chunks send_once dispatch_wire combine_wire"
    " remat_exchange grouped_matmul",
    "attention.": "implementation",
    "moe.router.": "allow_noncausal module",
}
# What routers compute in evaluation, where several of ours compute the same; of others the options say it.
ROUTERS = {
    "mixtral": lambda options: _router("softmax", options["normalize"] == "after", bias=options["bias"]),
    "switch": lambda options: _router("softmax", False),
    "deepseek_moe": lambda options: _router("softmax", False),
    "deepseek": lambda options: _router(
        options["score"],
        options["normalize"],
        options["scale"],
        (options["num_groups"], options["top_groups"], options["group_best"]),
    ),
}


def family_of(theirs: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises CheckpointError when it is none of ours."""
    names = theirs.get("architectures") or []
    by_type = {family.model_type: family for family in LIST}
    found = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if found is None and not names:
        found = by_type.get(theirs.get("model_type"))
    if found is None:
        raise CheckpointError(
            f"config.json: architectures = {names!r} (model_type = {theirs.get('model_type')!r}) is none that can be converted;"
            f" these can: {', '.join(FAMILIES)}."
        )
    return found


def from_hf(theirs: Mapping[str, Any], family: Family | None = None) -> ModelConfig:
    """The model that a config.json describes, validated.

    Raises:
      CheckpointError: an unknown architecture, a field that is missing, or one whose value we have nothing for.
      ConfigError: values that make no model.
    """
    family = family or family_of(theirs)
    ours: dict[str, Any] = {}
    for relation in family.relations:
        ours |= relation.read(theirs, ours)
    model = from_dict({"model": nested(ours)}).model
    if model.num_moe_layers:
        language_router(model.moe.router, model.moe.num_experts)
    return model


def to_hf(model: ModelConfig, family: Family, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of `model` as one of `family`.

    Args:
      model: what to describe.
      family: as which architecture.
      original: a config.json of the family that the model came from. Its fields stay as they are, also those that we do not know,
        but where the model has become another, and `quantization_config`: what is written is not quantised.

    Raises:
      CheckpointError: the family cannot say what the model computes.
    """
    theirs = _written(model, family)
    if original is not None:
        before = _written(from_hf(original, family), family)
        changed = {name: value for name, value in theirs.items() if not _same(value, before.get(name))}
        other_names = {getattr(line, "theirs", ""): getattr(line, "also", None) for line in family.relations}
        renamed = {other_names.get(name) if other_names.get(name) in original else name: changed[name] for name in changed}
        theirs = {name: value for name, value in original.items() if name != quantised.FIELD} | renamed
    if wrong := differences(from_hf(theirs, family), model):
        field, (said, meant) = next(iter(wrong.items()))
        raise CheckpointError(
            f"model.{field} = {meant!r} cannot be said in a config.json of {family.architecture} (it would be read as {said!r});"
            " export as another architecture, or change the model."
        )
    return theirs


def find_family(model: ModelConfig) -> Family:
    """The first family that can say what `model` computes.

    Raises:
      CheckpointError: there is none; the message says why not, family by family.
    """
    why = []
    for family in LIST:
        try:
            to_hf(model, family)
        except ValueError as error:
            why.append(f"{family.architecture}: {error}")
        else:
            return family
    raise CheckpointError("No architecture on Hugging Face that we know computes what this model does.\n" + "\n".join(why))


def differences(found: ModelConfig, wanted: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """{field: (found, wanted)} where two models compute different functions; fields by dotted path, some made explicit."""
    found, wanted = _function(found), _function(wanted)
    paths = [path for path in dict.fromkeys([*wanted, *found]) if not _same(found.get(path), wanted.get(path))]
    return {path: (found.get(path), wanted.get(path)) for path in paths}


def _written(model, family):
    theirs: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for relation in family.relations:
        theirs |= relation.write(model)
    return theirs


def _same(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return a == b


def _function(model):
    """What the model computes, by dotted path: free fields left out, defaults filled in, fields without effect left out."""
    flat = _flatten(dataclasses.asdict(model))
    for group, names in FREE.items():
        for name in names.split():
            del flat[group + name]
    layers = range(model.num_layers)
    flat |= _attention_function(model, flat)
    flat["attention.window"] = [model.attention.layer_window(i) for i in layers]
    del flat["attention.full_every"]
    if model.activation != "swiglu_clamped":
        del flat["activation_limit"]
    is_moe = [model.is_moe_layer(i) for i in layers]
    if all(is_moe):
        del flat["d_ff"]
    return {path: value for path, value in flat.items() if not path.startswith("moe.")} | _moe_function(model, flat, is_moe)


def _attention_function(model, flat):
    a, rope = model.attention, model.attention.rope
    stretched = rope.scaling != "none"
    return {
        "attention.scale": a.scale or (a.head_dim + a.rope_head_dim) ** -0.5,
        "attention.v_head_dim": a.v_head_dim or a.head_dim,
        "attention.latent_norm_eps": a.latent_norm_eps or model.norm_eps,
        "attention.rope.dim": rope.dim or a.rope_head_dim or a.head_dim,
        "attention.rope.factor": rope.factor if stretched else 1.0,
        "attention.rope.original_length": rope.original_length if rope.scaling in ("wavelength", "yarn") else 0,
        **{
            f"attention.rope.{name}": flat[f"attention.rope.{name}"] if rope.scaling == scaling else None
            for scaling, names in {
                "wavelength": ("low_frequency_factor", "high_frequency_factor"),
                "yarn": ("beta_fast", "beta_slow", "truncate"),
            }.items()
            for name in names
        },
        "attention.rope.amplitude": (rope.amplitude or magnitude(rope.factor)) if rope.scaling == "yarn" else 1.0,
    }


def _moe_function(model, flat, is_moe):
    moe = model.moe
    if not any(is_moe):
        return {"moe.num_experts": 0}
    own = {path: value for path, value in flat.items() if path.startswith("moe.") and not path.startswith("moe.router.options")}
    for name in ("first_dense", "every", "num_shared_experts", "shared_d_ff"):
        del own[f"moe.{name}"]
    options = default_options().get(moe.router.name, {}) | dict(moe.router.options)
    del own["moe.router.name"]
    other = ROUTERS.get(moe.router.name, lambda options: {"name": moe.router.name} | options)
    own |= {f"moe.router.{name}": value for name, value in other(options).items()}
    return own | {
        "moe.layers": is_moe,
        "moe.shared_width": moe.num_shared_experts * (moe.shared_d_ff or moe.d_ff),
    }


def _router(score, normalize, scale=1.0, groups=(1, 1, 0), bias=False):
    limited = groups if groups[1] < groups[0] else (1, 1, 0)
    return {"score": score, "normalize": normalize, "scale": scale, "groups": limited, "bias": bias}


def _flatten(tree, path=""):
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return flat
