"""One attention layer, alone on a mesh: its answer and its gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.layers.latent_attention import make_attention
from moe_jax.mesh import batch_spec


def build(config: ModelConfig) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, params) of the layer on the ambient mesh, as `Block` makes it."""

    def make():
        return nnx.split(make_attention(config, config.init_std, jnp.dtype(config.dtype), rngs=nnx.Rngs(0)), nnx.Param)

    graphdef, _ = nnx.eval_shape(make)
    return graphdef, jax.jit(lambda: nnx.to_pure_dict(make()[1]))()


def random_params(config: ModelConfig, mesh: jax.sharding.Mesh, seed: int = 0) -> dict:
    """Parameters far from their initial values, as NumPy arrays: norms are not 1, biases and sinks not 0."""
    rng = np.random.default_rng(seed)
    with jax.set_mesh(mesh):
        _, params = build(config)
    return jax.tree.map_with_path(
        lambda path, p: rng.normal(1.0 if "norm" in str(path) else 0.0, 0.4, p.shape).astype(np.float32), params
    )


def inputs(D: int, rows: int = 4, length: int = 9, seed: int = 1) -> tuple[np.ndarray, ...]:
    """(x_BSD, segment_ids_BS, positions_BS, g_BSD): packed rows of two documents, the last with padding."""
    rng = np.random.default_rng(seed)
    x, g = rng.normal(size=(2, rows, length, D)).astype(np.float32)
    column, first = np.arange(length)[None], rng.integers(2, length - 2, (rows, 1))
    segments, positions = np.where(column < first, 1, 2), np.where(column < first, column, column - first)
    segments[-1, -2:] = 0
    return x, segments.astype(np.int32), positions.astype(np.int32), g


def run(config: ModelConfig, mesh: jax.sharding.Mesh, params: dict, arrays: tuple, sees_all: Any = None) -> tuple[dict, dict]:
    """({y, x's gradient}, gradients of the parameters) of the sum of the answer times g; `arrays` as `inputs` gives them."""
    x, segments, positions, g = arrays
    with jax.set_mesh(mesh):
        graphdef, placed = build(config)
        placed = jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), placed, params)
        x, segments, positions, g = (jax.reshard(jnp.asarray(a), batch_spec(np.ndim(a))) for a in (x, segments, positions, g))

        @jax.jit
        def both(params, x, g, sees_all):
            y, pullback = jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x, segments, positions, sees_all), params, x)
            return y, pullback(g.astype(y.dtype))

        y, (d_params, d_x) = both(placed, x.astype(config.dtype), g, sees_all)
    for old, new in zip(jax.tree.leaves(placed), jax.tree.leaves(d_params), strict=True):
        assert old.sharding == new.sharding
    return {"y": np.asarray(y, np.float32), "x": np.asarray(d_x, np.float32)}, jax.tree.map(np.asarray, d_params)
