import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tolerance import assert_close

from moe_jax.layers.basic import project

ROWS = ("data", "expert")
# subscripts, shapes of x and w, their specs, the answer's spec
HEAD = ("BSD,DV->BSV", (4, 3, 8), (8, 6), P(ROWS, None, None), P(None, "tensor"), None)
IN = ("BSD,DHN->BSHN", (4, 3, 8), (8, 2, 4), P(ROWS, None, None), P(None, "tensor", None), None)
OUT = ("BSHN,HND->BSD", (4, 3, 2, 4), (2, 4, 8), P(ROWS, None, "tensor", None), P("tensor", None, None), P(ROWS, None, None))


@pytest.mark.parametrize("sizes", [dict(data=1), dict(data=2, expert=2, tensor=2)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", [HEAD, IN, OUT], ids=lambda case: case[0])
def test_values_and_gradients_against_numpy_and_laid_out_as_the_arguments(case, sizes, dtype):
    subscripts, x_shape, w_shape, x_spec, w_spec, y_spec = case
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh_of(**sizes)):
        x = jax.reshard(jnp.asarray(rng.normal(size=x_shape), dtype), x_spec)
        w = jax.reshard(jnp.asarray(rng.normal(size=w_shape), dtype), w_spec)
        y, pullback = jax.vjp(lambda x, w: project(subscripts, x, w, y_spec), x, w)
        g = jax.reshard(jnp.asarray(rng.normal(size=y.shape), dtype), jax.typeof(y).sharding.spec)
        g_x, g_w = jax.jit(pullback)(g)
    assert (jax.typeof(g_x), jax.typeof(g_w)) == (jax.typeof(x), jax.typeof(w))
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    (of_x, of_w), of_y = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    assert_close(y, np.einsum(subscripts, x, w), dtype)
    assert_close(g_x, np.einsum(f"{of_y},{of_w}->{of_x}", g, w), dtype)
    assert_close(g_w, np.einsum(f"{of_x},{of_y}->{of_w}", x, g), dtype)
