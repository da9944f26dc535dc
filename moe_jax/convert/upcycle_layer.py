"""One layer of experts made of one feed-forward network: what `upcycle` does to each.

Beyond the package's letters: `G` shards in a virtual group (1 where experts are whole), `W` hidden width of the shared experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.layers.mlp import GATED
from moe_jax.routing.contract import ParamSpec, Router

_ROUTER, _DROP = 0, 1  # streams of random numbers


def shared_width(moe: MoEConfig) -> int:
    """W, of all shared experts together."""
    return moe.num_shared_experts * (moe.shared_d_ff or moe.d_ff)


@dataclass(frozen=True)
class Recipe:
    """How one FFN becomes a layer of experts.

    Attributes:
      model: of the MoE model.
      router: its router.
      splits: whether experts, the shared ones too, are parts of the FFN and not the whole of it.
      shards: G.
      dropped: hidden units of every expert that are drawn anew.
      seed: of routers and of what is drawn anew.
      std: of the routers' weights.
      weight: what a token's weights of a shard add up to.
    """

    model: ModelConfig
    router: Router
    splits: bool
    shards: int
    dropped: int
    seed: int
    std: float
    weight: float

    def router_params(self, layer: int) -> dict[str, np.ndarray]:
        """New parameters of a layer's router; those of the shards of a virtual group, which are neighbours, are equal."""
        rng = np.random.default_rng([self.seed, _ROUTER, layer])
        specs = self.router.params(self.model.d_model)
        return {name: _draw_router(rng, name, spec, self.shards, self.std) for name, spec in specs.items()}

    def layer(self, mlp: Mapping[str, np.ndarray], layer: int) -> dict[str, Any]:
        """The parameters of `layers.moe.MoE` out of those of `layers.mlp.MLP`; `layer` counts the MoE layers."""
        moe, gated = self.model.moe, self.model.activation in GATED
        inward = ("gate", "up") if gated else ("up",)
        hidden = {name: mlp[f"w_{name}_DF"].T for name in inward} | {"down": mlp["w_down_FD"]}  # [F, D] all
        width = shared_width(moe)
        copies = 0 if self.splits else width // self.model.d_ff
        routed = {name: self._experts(w_FD[width:] if self.splits else w_FD) for name, w_FD in hidden.items()}
        if self.dropped:
            _drop(routed, self.dropped, np.random.default_rng([self.seed, _DROP, layer]))
        routed["down"] = routed["down"] / np.float32(self.weight * (copies + 1))
        params: dict[str, Any] = self.router_params(layer)
        params["experts"] = {f"w_{name}_EDF": _exchanged(routed[name]) for name in inward} | {"w_down_EFD": routed["down"]}
        if moe.expert_bias:
            biases = {f"b_{name}_EF": np.zeros((moe.num_experts, moe.d_ff), np.float32) for name in inward}
            params["experts"] |= biases | {"b_down_ED": np.zeros((moe.num_experts, self.model.d_model), np.float32)}
        if width:
            shared = {name: w_FD[:width] if self.splits else np.tile(w_FD, (copies, 1)) for name, w_FD in hidden.items()}
            part = np.float32((2 if moe.shared_gate else 1) / (copies + 1))
            params["shared"] = {f"w_{name}_DF": shared[name].T for name in inward} | {"w_down_FD": shared["down"] * part}
        if moe.shared_gate:
            params["w_shared_gate_D"] = np.zeros(self.model.d_model, np.float32)
        return params

    def _experts(self, w_FD):
        """[E, f, D]: expert e has shard e % G."""
        moe = self.model.moe
        w_GFD = w_FD.reshape(self.shards, moe.d_ff, -1)
        return np.tile(w_GFD, (moe.num_experts // self.shards, 1, 1))


def _exchanged(w_EFD):
    return np.ascontiguousarray(w_EFD.transpose(0, 2, 1))


def _draw_router(rng: np.random.Generator, name: str, spec: ParamSpec, shards: int, std: float) -> np.ndarray:
    if spec.value is not None:
        return np.full(spec.shape, spec.value, np.float32)
    letters = name.rpartition("_")[2]
    shape = [size // shards if letter == "E" else size for letter, size in zip(letters, spec.shape, strict=True)]
    array = std * rng.standard_normal(shape, np.float32)
    return np.repeat(array, shards, axis=letters.index("E")) if "E" in letters else array


def _drop(routed: dict[str, np.ndarray], count: int, rng: np.random.Generator) -> None:
    """Draws `count` hidden units of every expert anew, in place; matrices are [E, F, D] (2502.19261, section 3.2)."""
    experts, width = routed["down"].shape[:2]
    for expert in range(experts):
        units = rng.choice(width, count, replace=False)
        for w_EFD in routed.values():
            replaced = w_EFD[expert, units]
            w_EFD[expert, units] = rng.normal(replaced.mean(), replaced.std(), replaced.shape)
