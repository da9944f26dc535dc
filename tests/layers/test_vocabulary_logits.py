import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tolerance import assert_close

from moe_jax.layers.basic import vocabulary_logits


@pytest.mark.parametrize("sizes", [dict(data=1), dict(data=2, expert=2, tensor=2)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_against_numpy_and_laid_out_as_the_arguments(sizes, dtype):
    rng = np.random.default_rng(0)
    x_BSD, w_DV, g_BSV = (rng.normal(size=shape) for shape in ((4, 3, 8), (8, 6), (4, 3, 6)))
    rows, columns = P(("data", "expert"), None, None), P(None, "tensor")
    with jax.set_mesh(mesh_of(**sizes)):
        x = jax.reshard(jnp.asarray(x_BSD, dtype), rows)
        w = jax.reshard(jnp.asarray(w_DV, dtype), columns)
        y, pullback = jax.vjp(vocabulary_logits, x, w)
        g = jax.reshard(jnp.asarray(g_BSV, dtype), jax.typeof(y).sharding.spec)
        g_x, g_w = jax.jit(pullback)(g)
    assert (jax.typeof(g_x), jax.typeof(g_w)) == (jax.typeof(x), jax.typeof(w))
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    assert_close(y, np.einsum("BSD,DV->BSV", x, w), dtype)
    assert_close(g_x, np.einsum("BSV,DV->BSD", g, w), dtype)
    assert_close(g_w, np.einsum("BSD,BSV->DV", x, g), dtype)
