"""The fault that the ablation measures is the fault that it says: own counts, own bias, and nothing else."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_cases import B, D, E, S, T
from tolerance import assert_close

from moe_jax.routing.contract import Tokens
from moe_jax.routing.losses import routing_sums


@pytest.fixture
def fault(faults):
    import unsynchronised

    return unsynchronised.Unsynchronised(E, 2, replicas=4, sequences=B, bias_speed=0.5)


def problem():
    rng = np.random.default_rng(0)
    x_TD, w_DE = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((T, D), (D, E)))
    tokens = Tokens(x_TD, jnp.arange(T) % 5 > 0, jnp.arange(T), num_sequences=B, training=True)
    return tokens, {"w_router_DE": w_DE}, jnp.asarray(rng.normal(size=(4, E)), jnp.float32)


def test_each_replica_routes_and_counts_by_itself(fault):
    tokens, params, bias_GE = problem()
    together = fault(tokens, params, {"bias_GE": bias_GE})
    sums = routing_sums(together, tokens.mask_T, B)
    moved = fault.update({"bias_GE": bias_GE}, sums)["bias_GE"]
    healthy = fault.synchronised()
    for replica in range(4):
        rows = slice(replica * T // 4, (replica + 1) * T // 4)
        part = jax.tree.map(lambda x, rows=rows: x[rows], tokens).replace(num_sequences=B // 4)
        alone = healthy(part, params, {"bias_E": bias_GE[replica]})
        np.testing.assert_array_equal(together.expert_A.reshape(2, T)[:, rows], alone.expert_A.reshape(2, -1))
        assert_close(together.weight_A.reshape(2, T)[:, rows], alone.weight_A.reshape(2, -1))
        own = routing_sums(alone, part.mask_T, B // 4)
        np.testing.assert_array_equal(moved[replica], healthy.update({"bias_E": bias_GE[replica]}, own)["bias_E"])
    assert len(np.unique(np.asarray(moved - bias_GE), axis=0)) > 1  # they do drift apart


def test_with_equal_biases_nothing_is_different(fault):
    tokens, params, bias_GE = problem()
    same_GE = jnp.tile(bias_GE[:1], (4, 1))
    healthy = fault.synchronised()(tokens, params, {"bias_E": bias_GE[0]})
    for training in (True, False):
        faulty = fault(tokens.replace(training=training), params, {"bias_GE": same_GE})
        np.testing.assert_array_equal(faulty.expert_A, healthy.expert_A)
        assert_close(faulty.weight_A, healthy.weight_A)
    assert S * B == T
    none = SimpleNamespace(own={"load_GE": jnp.zeros((4, E), jnp.int32)})
    np.testing.assert_array_equal(fault.update({"bias_GE": same_GE}, none)["bias_GE"], same_GE)
