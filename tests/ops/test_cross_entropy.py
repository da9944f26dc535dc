import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tolerance import assert_close

from moe_jax.mesh import BATCH_AXES
from moe_jax.ops.cross_entropy import cross_entropy

B, S, V = 8, 3, 10


def _inputs(dtype=jnp.float32):
    logits_BSV = (4 * jax.random.normal(jax.random.key(0), (B, S, V))).astype(dtype)
    return logits_BSV, jax.random.randint(jax.random.key(1), (B, S), 0, V)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("flat", [True, False])
def test_values_and_gradients_against_numpy(dtype, flat):
    logits, targets = _inputs(dtype)
    if flat:
        logits, targets = logits.reshape(-1, V), targets.reshape(-1)
    (nll, z), pullback = jax.vjp(lambda x: cross_entropy(x, targets), logits)
    g_nll, g_z = jax.random.normal(jax.random.key(2), (2, *targets.shape))
    g_z = 0.1 * g_z
    (d_logits,) = pullback((g_nll, g_z))

    x, g_nll, g_z = (np.asarray(a, np.float64) for a in (logits, g_nll, g_z))
    log_z = np.log(np.exp(x).sum(-1))
    probs, onehot = np.exp(x - log_z[..., None]), np.eye(V)[np.asarray(targets)]
    assert nll.dtype == z.dtype == jnp.float32
    assert_close(nll, log_z - (x * onehot).sum(-1))
    assert_close(z, log_z**2)
    assert_close(d_logits, g_nll[..., None] * (probs - onehot) + (g_z * 2 * log_z)[..., None] * probs)
    assert d_logits.dtype == dtype


def test_large_logits_stay_finite():
    logits_TV = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    nll, z = cross_entropy(logits_TV, jnp.asarray([1, 0]))
    np.testing.assert_allclose(nll, [2e4, np.log(3)], rtol=1e-3)
    np.testing.assert_allclose(z, [1e8, (np.log(3) - 1e4) ** 2], rtol=1e-5)


def test_sharded_vocabulary_changes_nothing():
    logits_BSV, targets_BS = _inputs()

    @jax.jit
    def loss_and_gradient(logits_BSV, targets_BS):
        def loss(x):
            nll, z = cross_entropy(x, targets_BS)
            return jnp.sum(nll * nll + z), (nll, z)

        return jax.value_and_grad(loss, has_aux=True)(logits_BSV)

    expected = loss_and_gradient(logits_BSV, targets_BS)
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        spec = P(BATCH_AXES, None, "tensor")
        sharded = jax.reshard(logits_BSV, spec), jax.reshard(targets_BS, P(BATCH_AXES, None))
        program = loss_and_gradient.lower(*sharded).compile()
        actual = program(*sharded)
        assert jax.typeof(actual[1]).sharding.spec == spec
        assert jax.typeof(actual[0][1][0]).sharding.spec == P(BATCH_AXES, None)
    jax.tree.map(assert_close, actual, expected)
    assert "all-reduce" in program.as_text()
    assert "all-gather" not in program.as_text(), "the vocabulary is gathered"


def test_inside_shard_map():
    logits_BSV, targets_BS = _inputs()
    mesh = mesh_of(data=2)
    with jax.set_mesh(mesh):
        island = jax.jit(jax.shard_map(cross_entropy, in_specs=(P("data"), P("data")), out_specs=P("data")))
        nll, _ = island(jax.reshard(logits_BSV, P("data")), jax.reshard(targets_BS, P("data")))
    assert_close(nll, cross_entropy(logits_BSV, targets_BS)[0])
