"""Published models: parameters to the digit, against the publishers, the papers' formulas and transformers' own classes."""

import dataclasses

import pytest
from published_models import NAMES, config

from moe_jax.analysis.describe import abstract_params, parts_of
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from moe_jax.mesh import abstract_mesh
from moe_jax.sizes import cache_size, num_params

# Exact: the elements of transformers' own classes at these sizes (`test_transformers_counts_the_same`); DeepSeekMoE, Grok-1 and the
# Switch decoders by formula alone. Active, in billions: with the input embedding, without it.
COUNTS = {
    "mixtral_8x7b": (46_702_792_704, 12.88, 12.75),
    "mixtral_8x22b": (140_620_634_112, 39.15, 38.96),
    "deepseek_moe_16b": (16_375_728_128, 2.83, 2.62),
    "deepseek_v2_lite": (15_706_484_224, 2.66, 2.45),
    "deepseek_v2": (235_741_434_880, 21.38, 20.85),
    "deepseek_v3": (671_026_419_200 - 14_848, 37.55, 36.63),  # published with the bias of 58 layers of 256 experts
    "kimi_k2": (1_026_408_209_408, 32.86, 31.69),
    "qwen15_moe_a27b": (14_315_784_192, 2.69, 2.38),
    "qwen3_30b_a3b": (30_532_122_624, 3.35, 3.04),
    "qwen3_235b_a22b": (235_093_634_560, 22.19, 21.57),
    "olmoe_1b_7b": (6_919_161_856, 1.28, 1.18),
    "gpt_oss_20b": (20_914_757_184, 4.19, 3.61),
    "gpt_oss_120b": (116_829_156_672, 5.71, 5.13),
    "glm_45": (352_797_814_784, 33.63, 32.86),
    "glm_45_air": (106_852_245_504, 13.42, 12.80),
    "dbrx": (131_596_523_520, 36.47, 35.85),
    "grok_1": (315_684_820_992, 83.76, 83.76),  # the table is the head, which every token uses
    "phi_35_moe": (41_873_153_344, 6.64, 6.51),
    "llama2_70b": (68_976_648_192, 68.98, 68.71),
    "llama2_13b": (13_015_864_320, 13.02, 12.85),
    "llama3_8b": (8_030_261_248, 8.03, 7.50),
    "switch_base": (619_339_008 - 28_322_304, 0.19, 0.19),
    "switch_c": (1_571_088_224_160, 1.51, 1.44),
}

# What the publishers say, in billions: total, active, and whether the active ones have the input embedding.
CLAIMS = {
    "mixtral_8x7b": ("46.7", "12.9", "with"),
    "mixtral_8x22b": ("141", "39", "with"),
    "deepseek_moe_16b": ("16.4", "2.8", "with"),
    "deepseek_v2_lite": ("15.7", "2.4", "without"),
    "deepseek_v2": ("236", "21", "with"),
    "deepseek_v3": ("671", "37", "with"),
    "qwen15_moe_a27b": ("14.3", "2.7", "with"),
    "qwen3_30b_a3b": ("30.5", "3.3", "with"),
    "qwen3_235b_a22b": ("235", "22", "with"),
    "olmoe_1b_7b": ("6.9", "1.3", "with"),
    "gpt_oss_20b": ("20.91", "3.61", "without"),
    "gpt_oss_120b": ("116.83", "5.13", "without"),
    "glm_45_air": ("106", "12", "without"),
    "dbrx": ("132", "36", "with"),
    "phi_35_moe": ("42", "6.6", "with"),
}
# Published totals that the published sizes do not give: 1.04 T; 355 B (352.8 without, 356.8 with the layer of one token more); 314 B.
UNEXPLAINED = {"kimi_k2": 1040, "glm_45": 355, "grok_1": 314}


def test_every_config_has_its_counts():
    assert sorted(COUNTS) == NAMES
    assert set(CLAIMS) | set(UNEXPLAINED) | {name for name in NAMES if name.startswith(("llama", "switch"))} == set(NAMES)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_to_the_digit(name):
    total, active, without = COUNTS[name]
    count = num_params(config(name).model)
    assert count.total == total
    assert count.active == pytest.approx(active * 1e9, abs=0.0051e9)
    assert count.active_without_embedding == pytest.approx(without * 1e9, abs=0.0051e9)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_the_arrays_that_are_counted(name):
    run = config(name)
    parts = parts_of(abstract_params(run, abstract_mesh(run, 1)))
    assert {part: getattr(num_params(run.model), part) for part in parts} == parts


@pytest.mark.parametrize("name", CLAIMS)
def test_published_figures(name):
    """Within one unit of the last published digit: some round, some cut off."""
    count = num_params(config(name).model)
    total, active, embedding = CLAIMS[name]
    ours = count.active if embedding == "with" else count.active_without_embedding
    for figure, value in ((total, count.total), (active, ours)):
        assert abs(value / 1e9 - float(figure)) < 10 ** -len(figure.partition(".")[2])


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_published_totals_that_do_not_follow_from_the_sizes(name):
    """Were one of them to, it would belong to the claims."""
    count = num_params(config(name).model)
    assert min(abs(total / 1e9 - UNEXPLAINED[name]) for total in (count.total, count.total + count.mtp)) > 1


def test_what_deepseek_v3_and_glm_count_besides():
    """The balancing bias, 256 of 58 layers and 128 of 45; the layer of one token more, 14 B with a table and a head of its own."""
    v3, air = (num_params(config(name).model) for name in ("deepseek_v3", "glm_45_air"))
    assert v3.total + v3.router_state == 671_026_419_200
    assert (air.total, air.router_state) == (106_852_245_504, 5_760)
    assert round((v3.mtp + v3.embedding + v3.head) / 1e9, 1) == 13.5
    assert num_params(config("deepseek_v3", "model.mtp_layers=0").model).total == v3.total


def test_parts_of_gpt_oss_120b():
    """Its model card, table 1: MLP 114.71 B, attention 0.96 B, embedding and head 1.16 B."""
    count = num_params(config("gpt_oss_120b").model)
    assert round((count.experts + count.router) / 1e9, 2) == 114.71
    assert round(count.attention / 1e9, 2) == 0.96
    assert round((count.embedding + count.head) / 1e9, 2) == 1.16


def t5(vocab, d_model, layers, heads, d_ff, experts, every, matrices=2, tied=True, head_dim=64):
    """Parameters of a T5 encoder and decoder of `layers` layers each, the last of every `every` FFNs with `experts` experts.

    RMS norms before each sublayer and at both ends, no biases, 32 relative positions a head in either half.
    """
    attention = 4 * d_model * heads * head_dim
    ffns = layers // every * (experts * matrices * d_model * d_ff + experts * d_model)
    ffns += (layers - layers // every) * matrices * d_model * d_ff
    encoder = layers * (attention + 2 * d_model) + ffns
    decoder = layers * (2 * attention + 3 * d_model) + ffns
    return encoder + decoder + 2 * d_model + 2 * 32 * heads + (1 if tied else 2) * vocab * d_model


# experts -> (billions, from published figures of the paper's table 7 or computed, see the decimals)
SWITCH_BASE = {8: "0.62", 16: "1.1", 32: "2.0", 64: "3.8", 128: "7.41", 256: "14.7"}


def test_t5_base():
    """The dense model: Hugging Face counts 222,903,552."""
    assert t5(32_128, 768, 12, 12, 3072, experts=0, every=13) == 222_903_552


@pytest.mark.parametrize("experts", SWITCH_BASE)
def test_switch_base_as_published_and_as_a_decoder(experts):
    whole = t5(32_128, 768, 12, 12, 3072, experts, every=2)
    figure = SWITCH_BASE[experts]
    assert abs(whole / 1e9 - float(figure)) < 10 ** -len(figure.partition(".")[2])
    cross_attentions, positions = 12 * (4 * 768 * 768 + 768), 2 * 32 * 12
    assert num_params(config("switch_base", str(experts)).model).total == whole - cross_attentions - positions - 768


def test_switch_xxl_and_switch_c_as_published():
    xxl = t5(32_128, 4096, 24, 64, 10_240, 128, every=2, matrices=3, tied=False)
    assert round(xxl / 1e9) == 395
    whole = t5(32_128, 2080, 15, 30, 6144, 2048, every=1, tied=False)
    assert round(whole / 1e9) == 1571
    cross_attentions, positions = 15 * (4 * 2080 * 1920 + 2080), 2 * 32 * 30
    assert num_params(config("switch_c").model).total == whole - cross_attentions - positions - 2080


def test_gshard_600b_has_no_config_but_a_count():
    """An encoder and decoder of 18 layers each (2006.16668, section 4); 600 B in the paper's table, where all are experts but 1 B."""
    assert round(t5(64_000, 1024, 18, 16, 8192, 2048, every=2, head_dim=128) / 1e9) == 619
    experts = 18 * 2048 * 2 * 1024 * 8192
    assert experts / 1e9 == pytest.approx(618.5, abs=0.05)


def jetmoe(experts, V=32_000, D=2048, F=5632, layers=24):
    """JetMoE-8B (2404.07413), whose heads are experts too, with so many of its 8 experts in both halves of a layer."""
    attention = 2 * experts * D * D + 2 * D * D + 8 * D + D  # queries and outputs of the experts, keys and values, router, bias
    ffn = 3 * experts * D * F + 8 * D + D
    return layers * (attention + ffn + 2 * D) + D + V * D


def test_jetmoe_has_no_config_but_a_count():
    assert [round(jetmoe(experts) / 1e9, 2) for experts in (8, 2)] == [8.52, 2.33]


@pytest.mark.slow
def test_transformers_counts_jetmoe_the_same():
    import torch
    import transformers

    sizes = dict(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_local_experts=8)
    heads = dict(num_key_value_heads=16, kv_channels=128, tie_word_embeddings=True)
    with torch.device("meta"):
        theirs = transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**sizes, **heads))
    assert jetmoe(8) == sum(parameter.numel() for parameter in theirs.parameters())


LLAMA_4 = ModelConfig(  # the text models; sizes as MaxText and their own repository carry them
    vocab_size=202_048,
    d_model=5120,
    num_layers=48,
    d_ff=16_384,
    attention=AttentionConfig(num_heads=40, num_kv_heads=8, head_dim=128),
    moe=MoEConfig(num_experts=16, d_ff=8192, num_shared_experts=1, router=RouterConfig("switch", 1)),
)


def test_llama_4_has_no_config_but_a_count():
    """Scout 109 B with its vision part, 17 B active; Maverick, with experts in every other layer, 400 B."""
    maverick = dataclasses.replace(LLAMA_4, moe=dataclasses.replace(LLAMA_4.moe, num_experts=128, every=2))
    counts = [num_params(model) for model in (LLAMA_4, maverick)]
    assert [round(count.total / 1e9, 2) for count in counts] == [107.77, 400.71]
    assert [round(count.active / 1e9, 1) for count in counts] == [17.2, 17.2]


def test_caches_of_published_models():
    """V3 keeps 576 numbers a layer; Mixtral's keys and values are 2,048; half of gpt-oss's layers keep 128 tokens at most."""
    assert cache_size(config("deepseek_v3").model).growth == 61 * 576
    assert cache_size(config("mixtral_8x7b").model).growth == 32 * 2048
    oss = cache_size(config("gpt_oss_120b").model)
    assert (oss.growth, oss.window_growth, oss.window) == (18 * 1024, 18 * 1024, 128)


def _latent(model):
    a = model.attention
    widths = {"kv_lora_rank": a.kv_rank, "q_lora_rank": a.q_rank or None, "v_head_dim": a.v_head_dim}
    return widths | {"qk_nope_head_dim": a.head_dim, "qk_rope_head_dim": a.rope_head_dim}


def _routed(model):
    moe = model.moe
    experts = {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "moe_intermediate_size": moe.d_ff,
    }
    return experts | {"num_experts_per_tok": moe.router.top_k, "first_k_dense_replace": moe.first_dense}


def _local(model):
    return {"intermediate_size": model.moe.d_ff, "num_local_experts": model.moe.num_experts}


def _sparse(model):
    return {"moe_intermediate_size": model.moe.d_ff, "num_experts": model.moe.num_experts}


def _dbrx(model):
    a, D = model.attention, model.d_model
    experts = {"ffn_hidden_size": model.moe.d_ff, "moe_num_experts": model.moe.num_experts, "moe_top_k": 4, "hidden_size": D}
    sizes = {"d_model": D, "n_heads": a.num_heads, "n_layers": model.num_layers, "vocab_size": model.vocab_size}
    return sizes | {"attn_config": {"kv_n_heads": a.num_kv_heads, "rope_theta": a.rope.theta}, "ffn_config": experts}


# name -> (class, what it calls its own way)
THEIRS = {
    "mixtral_8x7b": ("Mixtral", _local),
    "mixtral_8x22b": ("Mixtral", _local),
    "deepseek_v2_lite": ("DeepseekV2", lambda m: _latent(m) | _routed(m)),
    "deepseek_v2": ("DeepseekV2", lambda m: _latent(m) | _routed(m)),
    "deepseek_v3": ("DeepseekV3", lambda m: _latent(m) | _routed(m)),
    "kimi_k2": ("DeepseekV3", lambda m: _latent(m) | _routed(m)),
    "qwen15_moe_a27b": ("Qwen2Moe", lambda m: _sparse(m) | {"shared_expert_intermediate_size": m.moe.shared_d_ff}),
    "qwen3_30b_a3b": ("Qwen3Moe", lambda m: _sparse(m) | {"head_dim": 128}),
    "qwen3_235b_a22b": ("Qwen3Moe", lambda m: _sparse(m) | {"head_dim": 128}),
    "olmoe_1b_7b": ("Olmoe", lambda m: {"intermediate_size": m.moe.d_ff, "num_experts": m.moe.num_experts}),
    "gpt_oss_20b": ("GptOss", lambda m: _local(m) | {"head_dim": 64}),
    "gpt_oss_120b": ("GptOss", lambda m: _local(m) | {"head_dim": 64}),
    "glm_45": ("Glm4Moe", lambda m: _routed(m) | {"head_dim": 128, "attention_bias": True, "use_qk_norm": True}),
    "glm_45_air": ("Glm4Moe", lambda m: _routed(m) | {"head_dim": 128, "attention_bias": True}),
    "phi_35_moe": ("Phimoe", lambda m: _local(m) | {"attention_bias": True, "lm_head_bias": True}),
    "dbrx": ("Dbrx", _dbrx),
    "llama2_70b": ("Llama", lambda m: {}),
    "llama2_13b": ("Llama", lambda m: {}),
    "llama3_8b": ("Llama", lambda m: {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
def test_transformers_counts_the_same(name):
    """Their modules at these sizes, made without memory."""
    import torch
    import transformers

    model = config(name).model
    family, own = THEIRS[name]
    sizes = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_heads,
        "num_key_value_heads": model.attention.num_kv_heads,
        "tie_word_embeddings": model.tied_embeddings,
    }
    sizes = own(model) if family == "Dbrx" else sizes | own(model)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    assert num_params(model).total == sum(parameter.numel() for parameter in theirs.parameters())
