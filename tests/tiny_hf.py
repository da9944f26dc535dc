"""Tiny checkpoints in the form of Hugging Face, written without torch: config.json, safetensors in two dtypes and shards, tokenizer."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from moe_jax.convert.hf_config import from_hf
from moe_jax.convert.hugging_face import save_hf
from moe_jax.convert.safetensors_files import TensorFiles, write_shards
from moe_jax.data.tokenizers import train_bpe
from moe_jax.models.transformer import abstract

BOTH = {
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
    "vocab_size": 288,
}
CONFIGS = {
    "mixtral": BOTH
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "head_dim": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "deepseek_v3": BOTH
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 8,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "rope_scaling": None,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "v_head_dim": 4,
    },
}


def write(folder: pathlib.Path, name: str = "mixtral", seed: int = 0, **changes) -> pathlib.Path:
    """Fills `folder` with a checkpoint of random bfloat16 weights (a balancing bias is float32); `changes` are of its config.json."""
    config = CONFIGS[name] | changes
    model, rng = from_hf(config), np.random.default_rng(seed)

    def fill(variable):
        scale = 0.3 / np.sqrt(variable.shape[-2]) if len(variable.shape) > 2 else 0.1
        return (rng.normal(size=variable.shape) * scale).astype(ml_dtypes.bfloat16).astype(np.float32)

    arrays = [jax.tree.map(fill, nnx.to_pure_dict(state)) for state in abstract(model)[1:]]
    whole = folder.with_name(f"{folder.name}-whole")
    save_hf(whole, model, *arrays, architecture=config["architectures"][0])
    half = {
        key: np.asarray(tensor, np.float32 if key.endswith("bias") else ml_dtypes.bfloat16)
        for key, tensor in TensorFiles(whole).items()
    }
    write_shards(folder, half.items(), max_shard_bytes=20_000)
    tokenizer = train_bpe(["the red house runs, the blue tree sees the red house."] * 3, 280)
    tokenizer.save(folder)
    (folder / "kind.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.eot}))
    return folder


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint."""
    return {name: np.asarray(tensor) for name, tensor in TensorFiles(folder).items()}


def assert_same(folder: pathlib.Path, expected: pathlib.Path) -> None:
    """Names, shapes, dtypes and bits of all tensors are equal."""
    a, b = tensors(folder), tensors(expected)
    assert a.keys() == b.keys()
    for name, array in b.items():
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (array.dtype, array.shape, array.tobytes()), name
