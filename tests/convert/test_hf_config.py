"""config.json files in and out: published ones against published sizes and our own configs, every refusal by name and value."""

import dataclasses
import importlib
import math
import pathlib

import pytest
from published_configs import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GLM_45_AIR,
    GPT_OSS_20B,
    LLAMA_31_8B,
    MIXTRAL_8X7B,
    PUBLISHED,
    QWEN3_30B,
)

from moe_jax import sizes
from moe_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, RouterConfig, from_dict
from moe_jax.convert.families import FAMILIES
from moe_jax.convert.hf_config import differences, family_of, find_family, from_hf, to_hf
from moe_jax.convert.layer_fields import expert_layers
from moe_jax.validation import CheckpointError

ROOT = pathlib.Path(__file__).parents[2]


def test_every_family_has_a_published_config():
    tested = {family_of(config).architecture for config, _ in PUBLISHED.values()}
    assert set(FAMILIES) - tested == {"MistralForCausalLM", "GraniteMoeSharedForCausalLM"}


@pytest.mark.parametrize("name", [name for name, (_, params) in PUBLISHED.items() if params])
def test_published_size(name):
    config, params = PUBLISHED[name]
    assert sizes.num_params(from_hf(config)).total == params


@pytest.mark.parametrize(("eps", "latent"), [(1e-6, 0.0), (1e-5, 1e-6)])
def test_norms_of_latents_keep_their_epsilon(eps, latent):
    model = from_hf(DEEPSEEK_V3 | {"rms_norm_eps": eps})
    assert (model.norm_eps, model.attention.latent_norm_eps) == (eps, latent)


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_again_is_the_same(name):
    config, _ = PUBLISHED[name]
    assert to_hf(from_hf(config), family_of(config), config) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_anew_says_the_same(name):
    """A config.json of our own has other fields and spellings, in which every release of transformers finds the model."""
    config, _ = PUBLISHED[name]
    model, family = from_hf(config), family_of(config)
    new = to_hf(model, family)
    assert differences(from_hf(new), model) == {}
    for dropped in ("rope_parameters", ("rope_theta", "rope_scaling")):
        fewer = {key: value for key, value in new.items() if key not in dropped and key != dropped}
        assert differences(from_hf(fewer), model) == {}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if (ROOT / f"configs/published/{name}.py").exists()])
def test_our_published_config_is_the_same_model(name):
    ours = importlib.import_module(f"configs.published.{name}").get_config().to_dict()["model"]
    assert differences(from_hf(PUBLISHED[name][0]), from_dict({"model": ours}).model) == {}


def test_latent_attention_by_hand():
    """DeepSeek-V2-Lite: its softmax scale is 192^-1/2 (0.1 * 0.707 ln 40 + 1)^2, and sine and cosine keep their size."""
    a = from_hf(DEEPSEEK_V2_LITE).attention
    assert (a.kv_rank, a.q_rank, a.head_dim, a.rope_head_dim, a.v_head_dim) == (512, 0, 128, 64, 128)
    assert math.isclose(a.scale, 192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    assert (a.rope.scaling, a.rope.factor, a.rope.original_length, a.rope.amplitude) == ("yarn", 40.0, 4096, 1.0)
    assert a.rope.interleaved


def test_balance_loss_weight():
    """2 experts, 32 layers: 0.02 there, where the loss is 2 at balance, is 0.04 / 32 a layer here."""
    assert math.isclose(from_hf(MIXTRAL_8X7B).moe.balance_loss_weight, 0.02 * 2 / 32)
    model = from_hf(DEEPSEEK_V3)
    assert (model.moe.balance_loss_weight, model.moe.balance_loss_scope) == (0.001, "sequence")


def test_windows_alternate():
    a = from_hf(GPT_OSS_20B).attention
    assert [a.layer_window(i) for i in range(4)] == [128, 0, 128, 0]
    same = from_hf({key: value for key, value in GPT_OSS_20B.items() if key != "layer_types"})
    assert differences(same, from_hf(GPT_OSS_20B)) == {}


@pytest.mark.parametrize(
    ("is_moe", "expected"),
    [
        ([1, 1, 1], (0, 1)),
        ([0, 1, 1], (1, 1)),
        ([0, 1, 0, 1], (0, 2)),
        ([0, 0, 1, 0, 1], (1, 2)),
        ([0, 0, 0, 1], (3, 1)),
        ([1, 0, 1], None),
        ([0, 1, 0], None),
        ([0, 1, 1, 0, 1], None),
        ([0, 0], None),
    ],
)
def test_layers_with_experts(is_moe, expected):
    assert expert_layers([bool(i) for i in is_moe]) == expected
    if expected:
        moe = MoEConfig(num_experts=4, first_dense=expected[0], every=expected[1])
        assert [ModelConfig(num_layers=len(is_moe), moe=moe).is_moe_layer(i) for i in range(len(is_moe))] == is_moe


@pytest.mark.parametrize(("step", "dense"), [(2, [1]), (2, []), (1, [0, 1]), (3, [])])
def test_sparse_steps(step, dense):
    config = QWEN3_30B | {"decoder_sparse_step": step, "mlp_only_layers": dense}
    model = from_hf(config)
    assert [model.is_moe_layer(i) for i in range(48)] == [(i + 1) % step == 0 and i not in dense for i in range(48)]
    assert to_hf(model, family_of(config), config) == config
    assert differences(from_hf(to_hf(model, family_of(config))), model) == {}


REFUSED = {
    "architecture": (MIXTRAL_8X7B | {"architectures": ["JambaForCausalLM"]}, "JambaForCausalLM"),
    "quantised": (DEEPSEEK_V3 | {"quantization_config": {"quant_method": "gptq"}}, "of a kind other than fp8 and mxfp4"),
    "activation": (MIXTRAL_8X7B | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "missing": ({k: v for k, v in MIXTRAL_8X7B.items() if k != "hidden_size"}, "no hidden_size"),
    "jitter": (MIXTRAL_8X7B | {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    "rope type": (LLAMA_31_8B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "rope field": (LLAMA_31_8B | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no low_freq_factor"),
    "partial": (LLAMA_31_8B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "biased FFN": (LLAMA_31_8B | {"mlp_bias": True}, "mlp_bias = True"),
    "window": (QWEN3_30B | {"use_sliding_window": True}, "use_sliding_window = True"),
    "layers": (QWEN3_30B | {"mlp_only_layers": [5]}, r"mlp_only_layers = \[5\]"),
    "groups of experts": (DEEPSEEK_V2_LITE | {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
    "biases of latents": (DEEPSEEK_V3 | {"attention_bias": True}, "attention_bias = True"),
    "score": (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    "layer order": (GPT_OSS_20B | {"layer_types": ["full_attention", "sliding_attention"] * 12}, "layer_types"),
    "gate": (GPT_OSS_20B | {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    "top 1": (MIXTRAL_8X7B | {"num_experts_per_tok": 1}, "normalize = 'after'"),
    "groups": (DEEPSEEK_V3 | {"n_group": 7}, "num_groups = 7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_value(name):
    config, message = REFUSED[name]
    with pytest.raises((CheckpointError, ConfigError), match=message):
        from_hf(config)


def test_a_changed_model_changes_its_fields_alone():
    """Under the names that the original uses."""
    original = QWEN3_30B | {"num_local_experts": 128}
    del original["num_experts"]
    model = from_hf(original)
    model = dataclasses.replace(model, vocab_size=1000, moe=dataclasses.replace(model.moe, num_experts=64))
    written = to_hf(model, family_of(original), original)
    assert written == original | {"vocab_size": 1000, "num_local_experts": 64}


def test_what_a_family_cannot_say():
    model = from_hf(GLM_45_AIR)
    with pytest.raises(CheckpointError, match=r"cannot be said in a config\.json of MixtralForCausalLM"):
        to_hf(model, FAMILIES["MixtralForCausalLM"])
    alone = dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_shared_experts=0))
    with pytest.raises(CheckpointError, match=r"shared_width = 0"):
        to_hf(alone, FAMILIES["Glm4MoeForCausalLM"])
    odd = dataclasses.replace(model, logit_softcap=30.0)
    with pytest.raises(CheckpointError, match=r"logit_softcap = 30\.0"):
        find_family(odd)


def test_our_own_models_find_a_family():
    small = ModelConfig(vocab_size=64, attention=AttentionConfig(qk_norm="head"))
    assert find_family(small).architecture == "Glm4MoeForCausalLM"  # our defaults: sigmoid, bias, a shared expert
    softmax = MoEConfig(num_shared_experts=0, router=RouterConfig("mixtral", 2, {"normalize": "before"}))
    assert find_family(dataclasses.replace(small, moe=softmax)).architecture == "Qwen3MoeForCausalLM"
    assert (
        find_family(dataclasses.replace(small, moe=MoEConfig(num_experts=0), attention=AttentionConfig())).model_type == "llama"
    )


def test_training_may_differ_and_the_function_may_not():
    model = from_hf(MIXTRAL_8X7B)
    moe = dataclasses.replace(model.moe, dispatch="capacity", balance_loss_weight=1.0)
    assert differences(model, dataclasses.replace(model, dtype="bfloat16", remat="dots", moe=moe)) == {}
    rope = dataclasses.replace(model.attention.rope, theta=10000.0)
    other = dataclasses.replace(model, attention=dataclasses.replace(model.attention, rope=rope))
    assert differences(model, other) == {"attention.rope.theta": (1e6, 1e4)}
