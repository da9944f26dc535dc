"""A tiny model of transformers for every family, with every feature of the family that changes its numbers."""

import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 38
ROWS, SEQ_LEN = 4, 13
FOLDER = tempfile.TemporaryDirectory(prefix="hf-models-")  # gone when the process ends
# Sizes that divide over experts 4 x tensor 2, and otherwise over as little as possible.
BALANCE_WEIGHT = 0.2
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    rms_norm_eps=3e-3,
    initializer_range=0.03,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)
LATENT = SIZES | dict(
    num_key_value_heads=4,
    kv_lora_rank=8,
    q_lora_rank=None,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    rms_norm_eps=1e-6,
    intermediate_size=22,
    moe_intermediate_size=6,
    n_routed_experts=8,
    n_shared_experts=2,
    first_k_dense_replace=1,
    num_experts_per_tok=3,
    routed_scaling_factor=1.7,
)
del LATENT["head_dim"]
GRANITE = SIZES | dict(
    intermediate_size=10,
    num_local_experts=8,
    num_experts_per_tok=3,
    attention_bias=True,
    embedding_multiplier=3.0,
    logits_scaling=0.7,
    residual_multiplier=0.6,
    attention_multiplier=0.3,
    tie_word_embeddings=True,
)
CASES = {
    "llama": (
        "Llama",
        SIZES
        | dict(
            intermediate_size=22,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=100.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=3.0,
                original_max_position_embeddings=16,
            ),
        ),
    ),
    "mistral": ("Mistral", SIZES | dict(intermediate_size=22, sliding_window=5, hidden_act="gelu_pytorch_tanh")),
    "mixtral": ("Mixtral", SIZES | dict(intermediate_size=10, num_local_experts=8, sliding_window=5)),
    "qwen2_moe": (
        "Qwen2Moe",
        SIZES
        | dict(
            intermediate_size=22,
            moe_intermediate_size=6,
            shared_expert_intermediate_size=14,
            num_experts=8,
            num_experts_per_tok=3,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
        ),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        SIZES
        | dict(
            num_hidden_layers=5,
            intermediate_size=22,
            moe_intermediate_size=6,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            attention_bias=True,
            mlp_only_layers=[0, 1, 3],
            rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.0),
        ),
    ),
    "olmoe": ("Olmoe", SIZES | dict(head_dim=6, hidden_size=24, intermediate_size=10, num_experts=8, clip_qkv=0.8)),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.9), max_position_embeddings=16),
    ),
    "deepseek_v2_groups": (
        "DeepseekV2",
        LATENT
        | dict(
            q_lora_rank=9,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            rms_norm_eps=1e-3,
            rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.9),
            max_position_embeddings=16,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT
        | dict(
            q_lora_rank=9,
            n_group=4,
            topk_group=2,
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
        ),
    ),
    "glm4_moe": (
        "Glm4Moe",
        SIZES
        | dict(
            head_dim=8,
            intermediate_size=22,
            moe_intermediate_size=6,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=3,
            routed_scaling_factor=1.7,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            attention_bias=True,
            use_qk_norm=True,
        ),
    ),
    "gpt_oss": (
        "GptOss",
        SIZES
        | dict(
            num_hidden_layers=4,
            intermediate_size=10,
            num_local_experts=8,
            num_experts_per_tok=3,
            sliding_window=5,
            swiglu_limit=0.9,
            rope_parameters=YARN | dict(truncate=False),
        ),
    ),
    "granite_moe": ("GraniteMoe", GRANITE),
    "granite_moe_shared": ("GraniteMoeShared", GRANITE | dict(shared_intermediate_size=14)),
}


@dataclass(frozen=True)
class Theirs:
    """A model of transformers after a forward and a backward pass over `batch`.

    Attributes:
      model: the torch module.
      folder: where `save_pretrained` wrote it.
      logits: [B, S, V].
      choices: for every MoE layer the chosen experts [B, S, K].
      aux_loss: its auxiliary loss; None where the family has none.
      loss: the mean over the tokens, and BALANCE_WEIGHT times `balance`.
      gradients: of the loss, by the names of the parameters in memory.
    """

    model: Any
    folder: Path
    logits: np.ndarray
    choices: list[np.ndarray]
    aux_loss: float | None
    loss: float
    gradients: dict[str, np.ndarray]


def build(name: str, seed: int) -> Any:
    """The torch module of a case, far from its initialisation, where an error hides: norms are not 1, biases not 0.

    Routers have 20 times the usual weights, as a nearly uniform router hardly notices a wrong choice.
    """
    import torch
    import transformers

    torch.set_num_threads(1)
    prefix, fields = CASES[name]
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**fields, **eager))
    rng = np.random.default_rng(seed)
    tensors = dict(model.named_parameters()) | {k: v for k, v in model.named_buffers() if k.endswith("e_score_correction_bias")}
    for path, tensor in sorted(tensors.items()):
        of = path.split(".")[-2]
        std = {"gate": 0.4, "router": 0.4, "embed_tokens": 0.5}.get(of, 0.15)
        values = rng.normal(1.0 if "norm" in path else 0.0, std, tensor.shape)
        tensor.data = torch.tensor(values, dtype=torch.float32)
    return model


def batch(seed: int = 7) -> dict[str, np.ndarray]:
    """Rows with padding: none, on the right, on the left, on both sides. In our form."""
    rng = np.random.default_rng(seed)
    column = np.arange(SEQ_LEN)[None]
    start, stop = np.array([[0], [0], [4], [2]]), np.array([[SEQ_LEN], [9], [SEQ_LEN], [11]])
    valid = (column >= start) & (column < stop)
    integers = {
        "tokens": rng.integers(0, VOCAB, (ROWS, SEQ_LEN)),
        "targets": rng.integers(0, VOCAB, (ROWS, SEQ_LEN)),
        "segment_ids": valid,
        "positions": np.clip(column - start, 0, None),
    }
    return {key: array.astype(np.int32) for key, array in integers.items()} | {"loss_weights": valid.astype(np.float32)}


@functools.cache
def theirs(name: str, seed: int = 0) -> Theirs:
    """A case, run and saved."""
    import torch

    model, rows, choices = build(name, seed), batch(), []
    folder = Path(FOLDER.name) / f"{name}-{seed}"
    model.save_pretrained(folder)

    def keep(module, inputs, output):
        choices.append(output[2].numpy().reshape(ROWS, SEQ_LEN, -1))

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter") or type(module).__name__.endswith("TopkRouter"):
            module.register_forward_hook(keep)
    ids, positions = (torch.tensor(rows[key], dtype=torch.long) for key in ("tokens", "positions"))
    mask = torch.tensor(rows["segment_ids"], dtype=torch.long)
    extra = {"output_router_logits": True} if has_aux_loss(model) else {}
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **extra)
    valid = mask.bool()
    targets = torch.tensor(rows["targets"], dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(out.logits[valid], targets[valid])
    if has_aux_loss(model):
        loss = loss + BALANCE_WEIGHT * balance(model, out.router_logits, mask)
    loss.backward()
    gradients = {path: tensor.grad.numpy() for path, tensor in model.named_parameters()}
    aux_loss = out.aux_loss.item() if has_aux_loss(model) else None
    return Theirs(model, folder, out.logits.detach().numpy(), choices, aux_loss, loss.item(), gradients)


def has_aux_loss(model: Any) -> bool:
    """Whether transformers gives the model one; it has none for DeepSeek's and GLM's."""
    return hasattr(model.config, "router_aux_loss_coef")


def balance(model: Any, router_logits: Any, mask: Any) -> Any:
    """Their function of one layer at a time, in our normalisation: theirs is top_k at perfect balance, ours 1 for each layer."""
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    experts, top_k = router_logits[0].shape[-1], model.config.num_experts_per_tok
    return sum(function((layer,), experts, top_k, mask) for layer in router_logits) / top_k
