"""The edge: what a config file and its flags become, and what is refused in which words."""

import dataclasses
import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import base
from moe_jax import routing
from moe_jax.config import Config, ConfigError, from_dict, to_dict
from moe_jax.validation import CHOICES, FRACTIONS, NOT_NEGATIVE, POSITIVE, check_devices


def make(**overrides):
    config = base.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return from_dict(config)


def leaves(tree, path=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def test_base_states_every_field_with_the_dataclasses_defaults():
    stated = dict(leaves(base.get_config().to_dict()))
    for family, options in routing.default_options().items():
        for name in options:
            assert stated.pop(f"model.moe.router.{family}.{name}") == options[name]
    defaults = to_dict(Config())
    defaults["model"]["moe"]["router"].pop("deepseek")
    expected = {name: tuple(v) if isinstance(v, list) else v for name, v in leaves(defaults)}
    assert stated == expected


def test_every_field_of_base_has_a_trailing_comment():
    with open(base.__file__) as file:
        assignments = [line for line in file if re.match(r"    (config|[a-z]+)\.[a-z0-9_]+ = (?!.*ConfigDict|_\w+\(\)$)", line)]
    assert len(assignments) > 60
    assert [line for line in assignments if "  # " not in line] == []


def test_round_trip_through_plain_types():
    config = make(model__moe__router__name="switch", model__moe__router__top_k=1)
    assert from_dict(to_dict(config)) == config


def test_command_line_style_override_reaches_the_dataclass():
    config = base.get_config("debug,train.steps=7,model.moe.router.deepseek.scale=2.5")
    config.data.update(corpus="files", paths=("a", "b"))
    built = from_dict(config)
    assert built.train.steps == 7
    assert built.model.moe.router.options["scale"] == 2.5
    assert built.data.paths == ("a", "b")


def test_typo_is_answered_with_the_nearest_field():
    with pytest.raises(AttributeError, match="top_k"):
        base.get_config("model.moe.router.topk=2")
    with pytest.raises(ConfigError, match=re.escape("model.d_modl is not a field of the config; did you mean model.d_model?")):
        from_dict({"model": {"d_modl": 3}})


def test_config_argument_that_is_no_assignment_is_refused():
    with pytest.raises(ValueError, match="'tiny' is neither 'debug' nor"):
        base.get_config("tiny")


REFUSED = {
    "top_k over experts": (
        dict(model__moe__router__top_k=9),
        r"model\.moe\.router\.top_k = 9 .*num_experts = 8.*choose top_k <= 8",
    ),
    "top_k zero": (dict(model__moe__router__top_k=0), r"model\.moe\.router\.top_k = 0 .*num_experts=0"),
    "heads": (dict(model__attention__num_heads=3), r"num_heads = 3 is not a multiple of .*num_kv_heads = 2"),
    "odd head": (dict(model__attention__head_dim=7), r"head_dim = 7 is odd"),
    "latent without its field": (dict(model__attention__v_head_dim=8), r"v_head_dim = 8 belongs to .*kv_rank too"),
    "latent without positions": (dict(model__attention__kv_rank=8), r"rope_head_dim = 0 must be at least 2"),
    "latent with sinks": (
        dict(model__attention__kv_rank=8, model__attention__rope_head_dim=4, model__attention__sinks=True),
        r"model\.attention\.sinks = True is not there for latent attention",
    ),
    "latent with shared heads": (
        dict(model__attention__kv_rank=8, model__attention__rope_head_dim=4),
        r"num_kv_heads = 2 must be model\.attention\.num_heads = 4",
    ),
    "more rotates than there is": (dict(model__attention__rope__dim=40), r"rope\.dim = 40 is more than .*head_dim = 32"),
    "half a pair rotates": (dict(model__attention__rope__dim=5), r"rope\.dim = 5 is odd"),
    "stretch of nothing": (dict(model__attention__rope__scaling="yarn"), r"original_length = 0 while .*'yarn'"),
    "amplitude without yarn": (dict(model__attention__rope__amplitude=1.2), r"rope\.amplitude = 1\.2 is yarn's"),
    "waves the wrong way": (
        dict(
            model__attention__rope__scaling="wavelength",
            model__attention__rope__original_length=8,
            model__attention__rope__high_frequency_factor=1.0,
        ),
        r"high_frequency_factor = 1\.0 must be more than",
    ),
    "betas the wrong way": (
        dict(
            model__attention__rope__scaling="yarn",
            model__attention__rope__original_length=8,
            model__attention__rope__beta_slow=40.0,
        ),
        r"beta_fast = 32\.0 must be at least beta_slow = 40\.0",
    ),
    "exceptions to no window": (dict(model__attention__full_every=2), r"full_every = 2 makes exceptions"),
    "gate of no shared expert": (
        dict(model__moe__shared_gate=True, model__moe__num_shared_experts=0),
        r"shared_gate = True while .*num_shared_experts = 0",
    ),
    "two tokens ahead": (dict(model__mtp_layers=2), r"mtp_layers = 2 must be 0 or 1"),
    "pattern": (dict(model__moe__every=3), r"num_layers = 4 .* multiple of model\.moe\.every = 3"),
    "no moe layer": (dict(model__moe__first_dense=4), r"first_dense = 4 leaves none of the 4 layers"),
    "two fills": (dict(mesh__expert=-1), r"more than one -1"),
    "zero axis": (dict(mesh__expert=0), r"mesh\.expert = 0 must be at least 1"),
    "accumulation": (dict(train__accumulation=3), r"data\.batch_size = 16 is not a multiple of train\.accumulation = 3"),
    "no files": (dict(data__corpus="files"), r"data\.paths is empty"),
    "files not asked for": (
        dict(data__paths=("a.txt",)),
        r"data\.paths = \('a\.txt',\) is given while data\.corpus = 'builtin'",
    ),
    "warm-up": (dict(optimizer__warmup_steps=2000), r"warmup_steps = 2000 is more than train\.steps = 1000"),
    "final fraction": (dict(optimizer__final_fraction=1.5), r"final_fraction = 1\.5 must be between 0 and 1"),
    "expert width": (dict(model__moe__d_ff=0), r"model\.moe\.d_ff = 0 must be greater than 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_field_value_and_fix(name):
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as refusal:
        make(**overrides)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", CHOICES)
def test_unknown_choices_are_refused(path):
    with pytest.raises(ConfigError, match=re.escape(f"{path} = 'zzz' is unknown; choose one of")):
        make(**{path.replace(".", "__"): "zzz"})


@pytest.mark.parametrize(
    ("path", "value"), [*((p, 0) for p in POSITIVE), *((p, -1) for p in NOT_NEGATIVE), *((p, 1.0) for p in FRACTIONS)]
)
def test_ranges_are_kept(path, value):
    tree = to_dict(Config())
    *groups, leaf = path.split(".")
    node = tree
    for group in groups:
        node = node[group]
    node[leaf] = value
    with pytest.raises(ConfigError, match=re.escape(path)):
        from_dict(tree)


def test_wrong_type_is_refused():
    with pytest.raises(ConfigError, match=r"train\.steps = 'ten' is a str; give a int"):
        from_dict({"train": {"steps": "ten"}})


@pytest.mark.parametrize(
    ("overrides", "devices", "message"),
    [
        (dict(mesh__expert=3), 6, r"num_experts = 8 is not a multiple of mesh\.expert = 3|batch_size"),
        (dict(mesh__expert=5, data__batch_size=40), 5, r"model\.moe\.num_experts = 8 is not a multiple of mesh\.expert = 5"),
        (dict(mesh__tensor=4), 4, r"num_kv_heads = 2 is not a multiple of mesh\.tensor = 4"),
        (dict(mesh__fsdp=3, data__batch_size=15), 3, r"model\.d_model = 128 is not a multiple of mesh\.fsdp = 3"),
        (
            dict(mesh__tensor=2, model__moe__shared_d_ff=33),
            2,
            r"num_shared_experts x shared_d_ff = 33 is not a multiple of mesh\.tensor = 2",
        ),
        (dict(mesh__data=3, data__batch_size=16), 3, r"data\.batch_size = 16 .*3 data shards.*use a multiple of 3"),
        (dict(mesh__expert=4), 6, r"does not fit 6 devices"),
        (dict(mesh__data=2, mesh__expert=2), 8, r"data 2 x fsdp 1 x expert 2 x tensor 1 does not fit 8 devices"),
        (dict(train__accumulation=4), 8, r"over train\.accumulation = 4 is 4 sequences"),
    ],
)
def test_what_does_not_divide_over_the_mesh_is_refused(overrides, devices, message):
    with pytest.raises(ConfigError, match=message):
        check_devices(make(**overrides), devices)


def test_minus_one_fills_the_mesh():
    assert check_devices(make(mesh__expert=4), 8) == (2, 1, 1, 4, 1)
    assert check_devices(make(mesh__data=1, mesh__fsdp=-1, mesh__tensor=2), 8) == (1, 1, 4, 1, 2)


def test_layer_pattern():
    model = make(model__num_layers=7, model__moe__first_dense=1, model__moe__every=3).model
    assert [model.is_moe_layer(i) for i in range(7)] == [False, False, False, True, False, False, True]
    assert make(model__moe__num_experts=0).model.num_moe_layers == 0


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().model.d_model = 3


def test_flags_take_nested_fields(monkeypatch):
    arguments = ["train", f"--config={base.__file__}:debug", "--config.model.moe.router.top_k=3"]
    monkeypatch.setattr(sys, "argv", arguments)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    values(arguments)
    assert from_dict(holder.value).model.moe.router.top_k == 3
