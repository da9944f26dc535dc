"""Our attention layers against transformers' of gpt-oss, OLMoE, DeepSeek-V2 and V3: the same weights, values and gradients.

Each is one attention module of a published architecture, eager, in miniature; ours runs over two data shards and two of heads.
"""

from dataclasses import replace

import numpy as np
import pytest
from copy_weights import gradients, values
from meshes import mesh_of
from one_attention import inputs, run
from tolerance import assert_close

from moe_jax.config import AttentionConfig, ModelConfig, RopeConfig

pytestmark = pytest.mark.slow

D, EPS = 16, 1e-5
YARN = RopeConfig(theta=100.0, scaling="yarn", factor=4.0, original_length=32, beta_fast=4.0, interleaved=True, amplitude=1.0)
YARN_THEIRS = dict(
    rope_type="yarn",
    rope_theta=100.0,
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=4.0,
    mscale=0.7,
    mscale_all_dim=0.7,
)
LATENT = AttentionConfig(
    num_heads=4, num_kv_heads=4, head_dim=6, kv_rank=8, q_rank=6, rope_head_dim=4, v_head_dim=3, rope=YARN, scale=10**-0.5
)
MSCALE = 0.1 * 0.7 * np.log(4.0) + 1


def _gpt_oss(window):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss import modeling_gpt_oss as theirs

    rope = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=32, truncate=False)
    config = GptOssConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=window,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        attention_bias=True,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    ours = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        sinks=True,
        qkv_bias=True,
        out_bias=True,
        window=window,
        full_every=2,
        rope=RopeConfig(theta=100.0, scaling="yarn", factor=4.0, original_length=32, truncate=False),
    )
    return theirs.GptOssAttention(config, 0), theirs.GptOssRotaryEmbedding(config), ours


def _olmoe():
    from transformers import OlmoeConfig
    from transformers.models.olmoe import modeling_olmoe as theirs

    config = OlmoeConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=EPS,
        clip_qkv=1.0,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attn_implementation="eager",
    )
    ours = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="full", qkv_clip=1.0, rope=RopeConfig(theta=100.0))
    return theirs.OlmoeAttention(config, 0), theirs.OlmoeRotaryEmbedding(config), ours


def _deepseek(version, q_rank, yarn=False):
    import importlib

    import transformers

    theirs = importlib.import_module(f"transformers.models.deepseek_v{version}.modeling_deepseek_v{version}")
    config = getattr(transformers, f"DeepseekV{version}Config")(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_rank or None,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=3,
        rms_norm_eps=EPS,
        rope_parameters=YARN_THEIRS if yarn else {"rope_type": "default", "rope_theta": 100.0},
        attn_implementation="eager",
    )
    attention = getattr(theirs, f"DeepseekV{version}Attention")(config, 0)
    for norm in ("q_a_layernorm", "kv_a_layernorm"):  # whose epsilon is not the config's
        if getattr(attention, norm, None) is not None:
            getattr(attention, norm).variance_epsilon = EPS
    rope = YARN if yarn else RopeConfig(theta=100.0, interleaved=True)
    ours = replace(LATENT, q_rank=q_rank, rope=rope, scale=10**-0.5 * (MSCALE**2 if yarn else 1))
    return attention, getattr(theirs, f"DeepseekV{version}RotaryEmbedding")(config), ours


CASES = {
    "gpt-oss": lambda: _gpt_oss(3),
    "gpt-oss, a layer that sees all": lambda: _gpt_oss(3),
    "olmoe": _olmoe,
    "deepseek v2": lambda: _deepseek(2, 6),
    "deepseek v2 lite": lambda: _deepseek(2, 0),
    "deepseek v3, yarn": lambda: _deepseek(3, 6, yarn=True),
}


def _randomise(module):
    import torch

    rng = np.random.default_rng(0)
    for name, tensor in module.named_parameters():
        tensor.data = torch.tensor(rng.normal(1.0 if "norm" in name else 0.0, 0.4, tensor.shape), dtype=torch.float32)


def _theirs(module, rotary, arrays, window):
    """(y, x's gradient) of their module, whose parameters then have gradients."""
    import torch

    x, segments, positions, g = arrays
    distance = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    sees = (segments[:, :, None] == segments[:, None, :]) & (distance >= 0) & ((distance < window) if window else True)
    mask = torch.tensor(np.where(sees, 0, np.finfo(np.float32).min)[:, None], dtype=torch.float32)
    x = torch.tensor(x, requires_grad=True)
    y, _ = module(
        hidden_states=x, position_embeddings=rotary(x, torch.tensor(positions)), attention_mask=mask, past_key_values=None
    )
    (y * torch.tensor(g)).sum().backward()
    return y.detach().numpy(), x.grad.numpy()


def _our_params(left, a):
    """Their tensors under our names; a linear map, so that it carries gradients too. None may be left over."""
    left = dict(left)
    H, G, N, M = a.num_heads, a.num_kv_heads, a.head_dim, a.v_head_dim

    def heads(name, count):  # [heads N, in] to [in, heads, N]
        weight = left.pop(f"{name}.weight")
        return weight.reshape(count, -1, weight.shape[1]).transpose(2, 0, 1)

    params = {"wo_HND": left["o_proj.weight"].reshape(D, H, -1).transpose(1, 2, 0)}
    del left["o_proj.weight"]
    if a.kv_rank:
        params["wkv_down_DR"], params["wk_rope_DN"] = np.split(left.pop("kv_a_proj_with_mqa.weight").T, [a.kv_rank], axis=1)
        params["wk_up_RHN"], params["wv_up_RHN"] = np.split(heads("kv_b_proj", H), [N], axis=2)
        params["kv_latent_norm"] = {"scale_R": left.pop("kv_a_layernorm.weight")}
        assert params["wv_up_RHN"].shape[2] == M
        if a.q_rank:
            params["wq_down_DR"] = left.pop("q_a_proj.weight").T
            params |= {"q_latent_norm": {"scale_R": left.pop("q_a_layernorm.weight")}, "wq_up_RHN": heads("q_b_proj", H)}
        else:
            params["wq_DHN"] = heads("q_proj", H)
    else:
        params |= {"wq_DHN": heads("q_proj", H), "wk_DGN": heads("k_proj", G), "wv_DGN": heads("v_proj", G)}
    if a.qkv_bias:
        names = {"bq_HN": "q_proj", "bk_GN": "k_proj", "bv_GN": "v_proj"}
        params |= {ours: left.pop(f"{name}.bias").reshape(-1, N) for ours, name in names.items()}
        params["bo_D"] = left.pop("o_proj.bias")
    if a.sinks:
        params["sink_H"] = left.pop("sinks")
    if a.qk_norm == "full":
        params["q_norm"] = {"scale_HN": left.pop("q_norm.weight").reshape(H, N)}
        params["k_norm"] = {"scale_GN": left.pop("k_norm.weight").reshape(G, N)}
    assert not left, f"not copied: {sorted(left)}"
    return params


@pytest.mark.parametrize("case", CASES)
def test_same_values_and_gradients(case):
    module, rotary, attention = CASES[case]()
    sees_all = "sees all" in case
    _randomise(module)
    config, arrays = ModelConfig(d_model=D, norm_eps=EPS, attention=attention), inputs(D)
    rows = arrays[1] != 0  # padding's own rows are nobody's business
    arrays = (*arrays[:3], arrays[3] * rows[..., None])
    params = _our_params(values(module), attention)
    y, d_x = _theirs(module, rotary, arrays, 0 if sees_all else attention.window)
    actual, d_params = run(config, mesh_of(data=2, tensor=2), params, arrays, sees_all if attention.full_every else None)
    assert_close(actual["y"][rows], y[rows])
    assert_close(actual["x"], d_x)
    expected = _our_params(gradients(module), attention)
    assert set(d_params) == set(expected)
    for name, gradient in expected.items():
        ours = d_params[name]
        if isinstance(gradient, dict):
            (gradient,), (ours,) = gradient.values(), ours.values()
        assert_close(ours, gradient, what=name)
