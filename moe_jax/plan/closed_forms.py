"""What a step sends, by arithmetic from its parameters' shapes: weights gathered, gradients summed, activations summed over `tensor`.

The rows of the exchange have their closed form in `analysis.bench_comm`. Left out are scalars, the loads of the experts, and what routed
experts sum over `tensor`. With s a parameter's bytes in the dtype it is computed in, on one device before `fsdp` splits it, L layers
included, a device sends

    s (f - 1) / f         over fsdp, each time it is gathered: forward, and again for the backward pass where layers are recomputed
    s 2 (n - 1) / n       over the n devices that split the tokens, for its gradient; a norm's in float32, a router's in float32
                          and twice where the step observes what the routing's losses do to it
    s (f - 1) / f         over fsdp, for the gradient of a routed expert, after s 2 (d - 1) / d over the d replicas (`data`)
    x 2 (t - 1) / t       over tensor, x being the bytes of a device's tokens: what attention and FFN return, and the gradients of
                          their inputs; attention again where layers are recomputed; the gradient of the head's input

An embedding table is gathered over tensor too, and its gradient summed whole. Tied to the head it is gathered once for both where tensor
splits nothing, and its gradients are two.
"""

import math
from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.config import Config
from moe_jax.mesh import BATCH_AXES
from moe_jax.routing import make_router

Key = tuple[str, tuple[str, ...], str]


def weights(config: Config, params: Mapping[str, jax.ShapeDtypeStruct]) -> dict[Key, int]:
    """Bytes a device sends in a step for weights and their gradients, by (kind, axes, dtype); without gradient accumulation.

    Args:
      config: its mesh with all sizes given.
      params: by name, with shardings (`describe.abstract_params`).
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in ("data", "expert_outer", "fsdp", "expert", "tensor")}
    total = Counter()
    for name, array in params.items():
        split = {axis for axes in array.sharding.spec for axis in ((axes,) if isinstance(axes, str) else axes or ())}
        parts = math.prod(sizes[axis] for axis in split - {"fsdp"})
        is_matrix = name.split("/")[-1].startswith(("w", "table")) and "w_router" not in name
        dtype = config.model.dtype if is_matrix else "float32"
        size = array.size * jnp.dtype(dtype).itemsize
        _add(total, config, sizes, name, dtype, size, size // parts, "fsdp" in split)
    return {key: value for key, value in total.items() if value}


def _add(total, config, sizes, name, dtype, whole, own, is_split):
    in_layers = name.split("/")[0] in ("dense", "groups")
    f, t, passes = sizes["fsdp"], sizes["tensor"], 1 + (in_layers and config.model.remat != "none")
    is_table, tied = name == "embed/table_VD", config.model.tied_embeddings
    if is_split:
        times = passes + (is_table and tied and t > 1)
        total["all-gather", ("fsdp",), dtype] += times * own * (f - 1) // f
    if is_table:
        total["all-gather", ("tensor",), dtype] += whole * (t - 1) // t
    if "/experts/" in name:
        total["all-reduce", ("data",), dtype] += _summed(own, sizes["data"])
        total["reduce-scatter", ("fsdp",), dtype] += own * (f - 1) // f
        return
    batch = tuple(axis for axis in BATCH_AXES if sizes[axis] > 1)
    n = math.prod(sizes[axis] for axis in batch)
    gradients = [whole] if is_table else [own] * (2 if "w_router" in name and _observes(config) else 1)
    for size in [*gradients, *[own] * (is_table and tied)]:
        total["all-reduce", batch, dtype] += _summed(size, n)


def _summed(size, n):
    return 2 * (n - 1) * size // n


def _observes(config):
    moe = config.model.moe
    losses = moe.balance_loss_weight > 0 or moe.z_loss_weight > 0
    return config.train.observe and (losses or make_router(moe.router, moe.num_experts).has_loss)


def activations(config: Config) -> dict[Key, int]:
    """Bytes a device sends in a step for activations split over `tensor`, by (kind, axes, dtype), where `model.remat` is "none" or
    "full", without routed experts or gradient accumulation."""
    model, t = config.model, config.mesh.tensor
    tokens = config.data.batch_size * config.data.seq_len // math.prod(getattr(config.mesh, axis) for axis in BATCH_AXES)
    x = tokens * model.d_model * jnp.dtype(model.dtype).itemsize
    in_layers = model.num_layers * (2 + 2 + (model.remat == "full"))
    sums = Counter({("all-reduce", ("tensor",), model.dtype): (in_layers + 1) * _summed(x, t)})
    sums["all-reduce", ("tensor",), "float32"] += 3 * _summed(4 * tokens, t)  # maximum, normaliser and target of each token
    return dict(sums) if t > 1 else {}
