"""From the names and layouts of transformers' models to the tree of our parameters, written out tensor by tensor.

The map is linear and one to one, so what carries the weights over carries their gradients over too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig


def randomise(model: Any, seed: int) -> None:
    """Fills a torch module far from its initialisation, where an error hides: norms are not 1 and biases not 0.

    Routers get 20 times the usual 0.02, as a nearly uniform router hardly notices a wrong choice.
    """
    import torch  # of the slow tier alone

    rng = np.random.default_rng(seed)
    for name, tensor in model.named_parameters():
        std = {"gate": 0.4, "embed_tokens": 0.5}.get(name.split(".")[-2], 0.15)
        centre = 1.0 if "norm" in name else 0.0
        tensor.data = torch.tensor(rng.normal(centre, std, tensor.shape), dtype=torch.float32)


def values(model: Any) -> dict[str, np.ndarray]:
    """A torch module's parameters by name."""
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


def gradients(model: Any) -> dict[str, np.ndarray]:
    """A torch module's gradients by name; every parameter must have one."""
    return {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}


def our_params(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict:
    """The tensors of a Llama-like model of transformers as the nested dict of our `Transformer`; none may be left over."""
    left = dict(tensors)
    blocks = [_block(left, f"model.layers.{i}", config, config.is_moe_layer(i)) for i in range(config.num_layers)]
    params = {"embed": {"table_VD": left.pop("model.embed_tokens.weight")}, "final_norm": _norm(left, "model.norm", "D")}
    if not config.tied_embeddings:
        params["head"] = {"w_DV": left.pop("lm_head.weight").T}
    every, first = config.moe.every, config.moe.first_dense if config.num_moe_layers else config.num_layers
    if first:
        params["dense"] = _stack(blocks[:first])
    if config.num_moe_layers:
        names = [*(f"dense_{i}" for i in range(every - 1)), "moe"]
        params["groups"] = {name: _stack(blocks[first + i :: every]) for i, name in enumerate(names)}
    assert not left, f"not copied: {sorted(left)}"
    return params


def moe_params(left: dict[str, np.ndarray], path: str, shared: bool) -> dict:
    """Takes one MoE layer, whose experts hold gate over up in one tensor [E, 2F, D], out of `left`."""
    gate_EFD, up_EFD = np.split(left.pop(f"{path}experts.gate_up_proj"), 2, axis=1)
    experts = {
        "w_gate_EDF": gate_EFD.transpose(0, 2, 1),
        "w_up_EDF": up_EFD.transpose(0, 2, 1),
        "w_down_EFD": left.pop(f"{path}experts.down_proj").transpose(0, 2, 1),
    }
    params = {"w_router_DE": left.pop(f"{path}gate.weight").T, "experts": experts}
    return params | ({"shared": _mlp(left, f"{path}shared_experts")} if shared else {})


def _block(left, path, config, is_moe):
    ffn = {"moe": moe_params(left, f"{path}.mlp.", False)} if is_moe else {"mlp": _mlp(left, f"{path}.mlp")}
    return {
        "attention_norm": _norm(left, f"{path}.input_layernorm", "D"),
        "attention": _attention(left, f"{path}.self_attn", config),
        "ffn_norm": _norm(left, f"{path}.post_attention_layernorm", "D"),
        **ffn,
    }


def _attention(left, path, config):
    a, D = config.attention, config.d_model
    H, G, N = a.num_heads, a.num_kv_heads, a.head_dim
    params = {
        "wq_DHN": left.pop(f"{path}.q_proj.weight").reshape(H, N, D).transpose(2, 0, 1),
        "wk_DGN": left.pop(f"{path}.k_proj.weight").reshape(G, N, D).transpose(2, 0, 1),
        "wv_DGN": left.pop(f"{path}.v_proj.weight").reshape(G, N, D).transpose(2, 0, 1),
        "wo_HND": left.pop(f"{path}.o_proj.weight").reshape(D, H, N).transpose(1, 2, 0),
    }
    if a.qkv_bias:
        params |= {
            "bq_HN": left.pop(f"{path}.q_proj.bias").reshape(H, N),
            "bk_GN": left.pop(f"{path}.k_proj.bias").reshape(G, N),
            "bv_GN": left.pop(f"{path}.v_proj.bias").reshape(G, N),
        }
    if a.out_bias:
        params["bo_D"] = left.pop(f"{path}.o_proj.bias")
    if a.qk_norm:
        params |= {"q_norm": _norm(left, f"{path}.q_norm", "N"), "k_norm": _norm(left, f"{path}.k_norm", "N")}
    return params


def _mlp(left, path):
    names = {"w_gate_DF": "gate_proj", "w_up_DF": "up_proj", "w_down_FD": "down_proj"}
    return {ours: left.pop(f"{path}.{theirs}.weight").T for ours, theirs in names.items()}


def _norm(left, path, axis):
    return {f"scale_{axis}": left.pop(f"{path}.weight")}


def _stack(blocks):
    first = blocks[0]
    if isinstance(first, dict):
        return {name: _stack([block[name] for block in blocks]) for name in first}
    return np.stack(blocks)
