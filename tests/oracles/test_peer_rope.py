"""Our rotary embedding against transformers' Llama: the half-split layout, positions that restart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from moe_jax.ops.rope import apply_rope

pytestmark = pytest.mark.slow


def test_same_rotation_as_llama():
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    x_BSHN = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    positions_BS = np.array([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]])
    rope = {"rope_type": "default", "rope_theta": 100.0}
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8, rope_parameters=rope)
    x = torch.tensor(np.asarray(x_BSHN).transpose(0, 2, 1, 3))
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.tensor(positions_BS))
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert_close(apply_rope(x_BSHN, jnp.asarray(positions_BS), 100.0), expected.numpy().transpose(0, 2, 1, 3))
