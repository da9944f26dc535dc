"""Published configs: where each differs from its neighbours, presets that fit their meshes, miniatures that keep what the model has."""

import dataclasses
import importlib
import re

import jax
import numpy as np
import pytest
import tiny
from published_models import NAMES, config

from configs.published import presets
from moe_jax.config import ConfigError
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.sizes import num_params
from moe_jax.train.state import create
from moe_jax.train.step import make_train_step
from moe_jax.validation import check_devices


def test_traps():
    """Where a class default, another release or a neighbour has another number."""
    assert config("olmoe_1b_7b").model.moe.d_ff == 1024
    assert config("qwen3_30b_a3b").model.attention.rope.theta == config("qwen3_235b_a22b").model.attention.rope.theta == 1e6
    assert config("qwen3_30b_a3b").model.vocab_size == 151_936
    assert config("kimi_k2").model.attention.rope.theta == 5e4
    assert [config(f"glm_45{air}").model.attention.qk_norm for air in ("", "_air")] == ["head", "none"]
    assert [config("gpt_oss_20b").model.attention.layer_window(layer) for layer in range(4)] == [128, 0, 128, 0]
    v3, k2, lite = (config(name).model.attention.scale for name in ("deepseek_v3", "kimi_k2", "deepseek_v2_lite"))
    assert v3 == pytest.approx(0.1352337788608801)  # 192^-0.5 (0.1 ln 40 + 1)^2
    assert lite == pytest.approx(192**-0.5 * 1.2608**2, rel=1e-4)
    assert k2 == pytest.approx(192**-0.5 * 1.34657**2, rel=1e-4)


def test_docstrings_name_a_source():
    for name in NAMES:
        text = importlib.import_module(f"configs.published.{name}").__doc__
        assert re.search(r"Source:|2101\.03961", text), name
        assert name.startswith("switch") == ("Not the published model." in text), name


@pytest.mark.parametrize("preset", ["v5p-64", "h100-64"])
@pytest.mark.parametrize("name", NAMES)
def test_presets_fit_64_chips(name, preset):
    run = config(name, preset)
    shape = check_devices(run, 64)
    assert run.model.dtype == "bfloat16"
    assert shape[3] == (4 if run.model.moe.num_experts == 60 else 8 if run.model.moe.num_experts else 1)
    assert run.model == dataclasses.replace(config(name).model, moe=run.model.moe)
    assert run.model.moe == dataclasses.replace(config(name).model.moe, exchange_factor=2.0)


def features(model):
    """What a miniature must have in common with its model: everything but numbers, and which of them are 0."""
    tree = dataclasses.asdict(model)
    kept = {}
    for group, fields in (
        ("", tree),
        ("attention.", tree["attention"]),
        ("moe.", tree["moe"]),
        ("rope.", tree["attention"]["rope"]),
    ):
        for field, value in fields.items():
            if isinstance(value, str | bool):
                kept[group + field] = value
            elif isinstance(value, int | float):
                kept[group + field] = value > 0
    options = model.moe.router.options
    limited = options.get("num_groups", 1) > options.get("top_groups", 1)
    grouped = model.attention.num_kv_heads < model.attention.num_heads
    return kept | {"router": model.moe.router.name, "limited": limited, "grouped": grouped, "dtype": None}


@pytest.mark.parametrize("name", NAMES)
def test_debug_is_the_model_in_miniature(name):
    run = config(name, "debug")
    assert check_devices(run, 8)
    assert num_params(run.model).total < 300_000
    assert features(run.model) == features(config(name).model)
    kinds = [
        [(m.is_moe_layer(i), m.attention.layer_window(i) > 0) for i in range(m.num_layers)]
        for m in (run.model, config(name).model)
    ]
    assert set(kinds[0]) == set(kinds[1])


def test_presets_and_changes_in_order():
    run = config("mixtral_8x7b", "debug,model.num_layers=3,mesh.expert=8,mesh.data=1")
    assert (run.model.num_layers, run.mesh.expert, run.model.d_model) == (3, 8, 32)
    assert config("mixtral_8x7b", "model.num_layers=3,debug").model.num_layers == 2
    assert config("switch_base", "64,debug,model.moe.num_experts=16").model.moe.num_experts == 16
    assert config("switch_base", "64").model.moe.num_experts == 64
    assert config("switch_base", "debug").model.moe.num_experts == 8


@pytest.mark.parametrize(
    ("name", "arg", "sentence"),
    [
        ("mixtral_8x7b", "h100", r"config argument 'h100' is no preset \(v5p-64, h100-64, debug\) and not group.field=value."),
        ("switch_base", "1", "switch_base.py:1 asks for 1 experts; give 2 or more."),
        ("switch_base", "debug,x", "config argument 'x' is no preset"),
    ],
)
def test_bad_arguments_are_one_sentence(name, arg, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config(name, arg)


def test_a_typo_is_told():
    with pytest.raises(AttributeError, match="top_k"):
        config("mixtral_8x7b", "model.moe.router.topk=3")


def test_presets_are_told_in_their_docstring():
    assert all(f"\n{name} " in presets.__doc__ for name in presets.PRESETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss_20b"])
def test_a_miniature_trains(name):
    """On the devices it asks for, the same batch over and over."""
    run = config(name, "debug,model.scan_unroll=1,optimizer.learning_rate=0.01,optimizer.warmup_steps=0")
    mesh = make_mesh(run)
    with jax.set_mesh(mesh):
        graphdef, optimizer, state = create(run)
        step, batch = make_train_step(run, graphdef, optimizer), shard_batch(mesh, tiny.batch(rows=8, seq_len=16))
        start = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
        losses = []
        for _ in range(8):
            state, metrics = step(state, batch, jax.random.key(0))
            losses.append(float(metrics["train/loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.1
    assert all((a != np.asarray(b)).any() for a, b in zip(start, jax.tree.leaves(state.params), strict=True))
