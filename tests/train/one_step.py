"""One step of a config under any layout, as NumPy arrays by path: gradients, the routers' next state, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx
from tolerance import assert_close

from moe_jax.config import Config, ModelConfig
from moe_jax.layers.moe import RouterState
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import Transformer, abstract
from moe_jax.train.step import make_gradient_fn


def measure(config: Config) -> dict[str, np.ndarray]:
    """The step of the tiny batch, from the weights and the state of `drawn`."""
    mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
    with jax.set_mesh(mesh):
        graphdef, params, state = drawn(config.model)
        state = jax.tree.map(lambda leaf: leaf + 0.02 * (jnp.arange(leaf.shape[-1]) % 3), state)
        step = jax.jit(make_gradient_fn(config, graphdef, observe=True))
        gradients, state, metrics = step(params, state, shard_batch(mesh, tiny.batch()), jax.random.key(5))
    tree = {"gradient": gradients, "state": state, "metric": metrics}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def drawn(config: ModelConfig, seed: int = 3) -> tuple[nnx.GraphDef, dict, dict]:
    """What `models.transformer.build` returns, with weights that NumPy draws: the same for every layout, and nothing to compile.

    Norms are not 1 and biases not 0, which could be added twice or never without a trace; tokens and routers are far apart, so that
    there are no near ties.
    """
    rng = np.random.default_rng(seed)

    def draw(path, like):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        std = {"table_VD": 1.0, "w_router_DE": 0.6}.get(name, 0.2)
        return jax.device_put(rng.normal(float(name.startswith("scale")), std, like.shape).astype("f4"), like.sharding.spec)

    graphdef, params, _ = abstract(config)
    state = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0)), RouterState)))()
    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(params)), state


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal counts and close numbers, except of what travels, which is what differs."""
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        if path.startswith("['metric']['exchange/"):
            continue
        if value.dtype.kind == "i":
            np.testing.assert_array_equal(actual[path], value, err_msg=path)
        else:
            assert_close(actual[path], value, what=path)
