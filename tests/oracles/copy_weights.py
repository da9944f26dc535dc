"""From transformers' models in memory to the tree of our parameters, by the tables of `moe_jax.convert`.

The map is linear and one to one, so what carries the weights over carries their gradients over too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.convert.families import FAMILIES
from moe_jax.convert.plan import Plan


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


def our_params(tensors: Mapping[str, np.ndarray], config: ModelConfig, architecture: str) -> dict:
    """The tensors of a model of transformers as the nested dict of our `Transformer`; none may be left over."""
    plan = Plan(config, FAMILIES[architecture])
    plan.check(tensors)
    return plan.read_all(tensors)[0]


def moe_params(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict:
    """The tensors of one MoE block with shared experts as the nested dict of our `MoE`."""
    plan = Plan(replace(config, num_layers=1, vocab_size=1), FAMILIES["Glm4MoeForCausalLM"])
    named = {f"model.layers.0.mlp.{name}": tensor for name, tensor in tensors.items()}
    params: dict = {}
    for leaf in plan.leaves:
        if leaf.tree == "params" and leaf.key.startswith("moe."):
            *groups, name = leaf.key.split(".")[1:]
            branch = params
            for group in groups:
                branch = branch.setdefault(group, {})
            branch[name] = plan.read(leaf, 0, named)
    return params
