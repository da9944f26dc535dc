import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.sort import sort_by_expert


@pytest.mark.parametrize(("num_rows", "num_experts"), [(21, 4), (2**16, 2**15)])  # the second overflows one int32 key
def test_sort_by_expert(num_rows, num_experts):
    expert_A = np.random.default_rng(0).integers(0, num_experts + 1, num_rows).astype(np.int32)
    order_A, inverse_A, sizes_E = jax.jit(sort_by_expert, static_argnums=1)(expert_A, num_experts)
    expected = np.argsort(expert_A, kind="stable")
    np.testing.assert_array_equal(order_A, expected)
    np.testing.assert_array_equal(inverse_A, np.argsort(expected))
    np.testing.assert_array_equal(sizes_E, np.bincount(expert_A, minlength=num_experts + 1)[:-1])
    assert order_A.dtype == inverse_A.dtype == sizes_E.dtype == jnp.int32
