"""Our rotary embedding against transformers': frequencies and amplitudes of every stretch, rotations of its models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from moe_jax.config import RopeConfig
from moe_jax.ops.rope import amplitude, apply_rope, frequencies

pytestmark = pytest.mark.slow

POSITIONS_BS = np.array([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
# published: Llama 3.1, gpt-oss, DeepSeek-V2-Lite and V3 (mscale and mscale_all_dim are equal: no amplitude), Qwen3 for long contexts
STRETCHES = {
    "linear": (64, {"rope_type": "linear", "factor": 4.0}, dict(scaling="linear", factor=4.0)),
    "llama 3.1": (
        128,
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        dict(theta=500000.0, scaling="wavelength", factor=8.0, original_length=8192),
    ),
    "gpt-oss": (
        64,
        dict(
            rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
        ),
        dict(theta=150000.0, scaling="yarn", factor=32.0, original_length=4096, truncate=False),
    ),
    "deepseek": (
        64,
        dict(rope_type="yarn", factor=40.0, mscale=0.707, mscale_all_dim=0.707, original_max_position_embeddings=4096),
        dict(scaling="yarn", factor=40.0, original_length=4096, amplitude=1.0),
    ),
    "qwen 3": (
        128,
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
        dict(theta=1000000.0, scaling="yarn", factor=4.0, original_length=32768),
    ),
    "borders": (  # a range of pairs that starts below 0 and has no length
        8,
        dict(rope_type="yarn", factor=4.0, beta_fast=200.0, beta_slow=190.0, original_max_position_embeddings=64),
        dict(scaling="yarn", factor=4.0, original_length=64, beta_fast=200.0, beta_slow=190.0),
    ),
    "given amplitude": (
        32,
        dict(
            rope_type="yarn",
            factor=4.0,
            beta_fast=8.0,
            beta_slow=2.0,
            attention_factor=1.5,
            original_max_position_embeddings=256,
        ),
        dict(scaling="yarn", factor=4.0, beta_fast=8.0, beta_slow=2.0, original_length=256, amplitude=1.5),
    ),
}


def _llama_config(width, rope):
    from transformers import LlamaConfig

    parameters = {"rope_theta": 10000.0} | rope
    return LlamaConfig(
        hidden_size=3 * width, num_attention_heads=3, head_dim=width, max_position_embeddings=131072, rope_parameters=parameters
    )


@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("name", STRETCHES)
def test_same_frequencies_and_amplitude(name, partial):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width, theirs, ours = STRETCHES[name]
    rope = RopeConfig(**ours)
    theirs = theirs | {"rope_theta": rope.theta, "partial_rotary_factor": partial}
    expected, attention_factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](_llama_config(width, theirs), "cpu")
    actual = frequencies(rope, int(width * partial))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)
    assert amplitude(rope) == pytest.approx(attention_factor, rel=1e-6)


@pytest.mark.parametrize("name", [None, *STRETCHES])
def test_same_rotation_as_llama(name):
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    width, theirs, ours = STRETCHES[name] if name else (8, {"rope_type": "default", "rope_theta": 100.0}, {"theta": 100.0})
    rope = RopeConfig(**ours)
    x_BSHN = jax.random.normal(jax.random.key(0), (2, 5, 3, width))
    x = torch.tensor(np.asarray(x_BSHN).transpose(0, 2, 1, 3))
    config = _llama_config(width, theirs | {"rope_theta": rope.theta})
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.tensor(POSITIONS_BS))
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert_close(apply_rope(x_BSHN, jnp.asarray(POSITIONS_BS), rope), expected.numpy().transpose(0, 2, 1, 3))


def test_same_interleaved_rotation_as_deepseek_v2():
    import torch
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

    rope = RopeConfig(theta=100.0, interleaved=True)
    x_BSHN = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    x = torch.tensor(np.asarray(x_BSHN).transpose(0, 2, 1, 3))
    angles = torch.tensor(POSITIONS_BS[..., None] * 100.0 ** (-np.arange(4) / 4), dtype=torch.float32)
    expected, _ = apply_rotary_emb(x, x, torch.polar(torch.ones_like(angles), angles))
    assert_close(apply_rope(x_BSHN, jnp.asarray(POSITIONS_BS), rope), expected.numpy().transpose(0, 2, 1, 3))


def test_same_partial_rotation_as_glm_4_moe():
    import torch
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb

    x_BSHN = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    x = torch.tensor(np.asarray(x_BSHN).transpose(0, 2, 1, 3))
    parameters = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    config = Glm4MoeConfig(hidden_size=24, num_attention_heads=3, head_dim=8, rope_parameters=parameters)
    cos, sin = Glm4MoeRotaryEmbedding(config)(x, torch.tensor(POSITIONS_BS))
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    actual = apply_rope(x_BSHN, jnp.asarray(POSITIONS_BS), RopeConfig(theta=100.0, dim=4))
    assert_close(actual, expected.numpy().transpose(0, 2, 1, 3))
