"""Tiny checkpoints of every family, without torch: the published config.json with small sizes, and random numbers."""

import jax
import numpy as np
from flax import nnx
from published_configs import (
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    GLM_45_AIR,
    GPT_OSS_20B,
    GRANITE_1B,
    LLAMA_31_8B,
    MIXTRAL_8X7B,
    OLMOE,
    QWEN3_30B,
    QWEN15_MOE,
)

from moe_jax.convert.hf_config import from_hf
from moe_jax.convert.hugging_face import save_hf
from moe_jax.convert.safetensors_files import write_json
from moe_jax.models.transformer import abstract

SMALL = {
    "vocab_size": 6,
    "hidden_size": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 5,
}
EXPERTS = SMALL | {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 3}
LATENT = EXPERTS | {
    "num_key_value_heads": 2,
    "n_routed_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 3,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 5,
    "n_group": 1,
    "topk_group": 1,
}
del LATENT["head_dim"]
TINY = {
    "llama": LLAMA_31_8B | SMALL | {"attention_bias": True, "tie_word_embeddings": True},
    "mixtral": MIXTRAL_8X7B | EXPERTS,
    "qwen2_moe": QWEN15_MOE | EXPERTS | {"shared_expert_intermediate_size": 7, "mlp_only_layers": [0]},
    "qwen3_moe": QWEN3_30B | EXPERTS | {"mlp_only_layers": [0, 1]},
    "olmoe": OLMOE | EXPERTS,
    "deepseek_v2": DEEPSEEK_V2_LITE | LATENT,
    "deepseek_v3": DEEPSEEK_V3 | LATENT | {"q_lora_rank": 7},
    "glm4_moe": GLM_45_AIR | LATENT | {"head_dim": 8, "use_qk_norm": True},
    "gpt_oss": GPT_OSS_20B | EXPERTS | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite_moe": GRANITE_1B | EXPERTS,
    "granite_moe_shared": GRANITE_1B
    | EXPERTS
    | {"architectures": ["GraniteMoeSharedForCausalLM"], "shared_intermediate_size": 7},
}


def random_arrays(model, seed=0):
    """(params, router state) of random numbers."""
    rng = np.random.default_rng(seed)

    def fill(variable):
        return rng.normal(size=variable.shape).astype(np.float32)

    return tuple(jax.tree.map(fill, nnx.to_pure_dict(state)) for state in abstract(model)[1:])


def written(tmp_path, name, **changes):
    """(folder, model, params, router state) of a tiny checkpoint whose config.json is in the published form."""
    config = TINY[name] | changes
    model = from_hf(config)
    params, router_state = random_arrays(model)
    if name == "deepseek_v2":
        router_state = jax.tree.map(np.zeros_like, router_state)
    save_hf(tmp_path / "model", model, params, router_state, architecture=config["architectures"][0])
    write_json(tmp_path / "model" / "config.json", config)
    return tmp_path / "model", model, params, router_state
