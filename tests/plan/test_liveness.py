"""Bytes at the worst moment of small programs, by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.plan.dataflow import dataflow
from moe_jax.plan.liveness import worst

N = 64
SQUARE = 4 * N * N  # bytes of a float32 matrix


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def needed(f, *arguments, platform="gpu"):
    """Bytes beside the arguments."""
    return worst(dataflow(jax.make_jaxpr(f)(*arguments)), platform).bytes


def test_a_chain_of_products_holds_two_at_a_time():
    assert needed(lambda x: x @ x @ x @ x @ x, shape(N, N)) == 2 * SQUARE


def test_what_is_elementwise_is_computed_where_it_is_read():
    assert needed(lambda x: jnp.sum(jnp.exp(x * 2.0) + 1.0), shape(N, N)) == 4
    assert needed(lambda x: jnp.exp(x * 2.0 + 1.0) @ x, shape(N, N)) == 2 * SQUARE  # but a product wants its operand in memory


def test_elementwise_results_write_over_an_operand_that_dies():
    vector = 4 * N
    assert needed(lambda x, v: jnp.tanh(x @ x) @ v, shape(N, N), shape(N)) == SQUARE + vector
    assert (
        needed(lambda x, v: (x @ x).T @ (x @ x @ v), shape(N, N), shape(N)) == SQUARE + 2 * vector
    )  # a transpose is not stored


def test_a_cast_is_stored_in_its_own_size():
    assert needed(lambda x: x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16), shape(N, N)) == SQUARE // 2 + SQUARE // 2


def test_the_same_product_twice_is_kept_from_the_first_use_to_the_last():
    def recomputed(x, w):
        y = jnp.tanh(x @ w) @ w @ w @ w
        return y * (x @ w)

    def once(x, w):
        return jnp.tanh(x @ w) @ w @ w @ w

    assert needed(recomputed, shape(N, N), shape(N, N)) == needed(once, shape(N, N), shape(N, N)) + SQUARE


def test_what_nobody_reads_is_not_there():
    def f(x):
        unused = jnp.concatenate([x @ x] * 9)  # noqa: F841
        return x @ x

    assert needed(f, shape(N, N)) == SQUARE


def test_a_loop_holds_its_stack_its_carry_and_its_body():
    def f(x, w_LDD):
        def body(x, w_DD):
            y = jnp.tanh(x @ w_DD)
            return y, x  # the carry is kept for later

        return jax.lax.scan(body, x @ x, w_LDD)

    layers = 5
    # the stack of carries, the carry and the product that becomes the next, and the layer's weight cut out of its stack
    assert needed(f, shape(N, N), shape(layers, N, N)) == (layers + 3) * SQUARE


def test_a_stack_that_nobody_reads_is_not_there_nor_what_it_was_made_of():
    def f(x, w_LDD, u_LDD):
        def body(x, w_and_u):
            w_DD, u_DD = w_and_u
            return jnp.tanh(x @ w_DD), u_DD @ u_DD

        return jax.lax.scan(body, x, (w_LDD, u_LDD @ u_LDD))[0]

    # the carry is the argument's copy; the product that becomes the next, and the layer's weight
    assert needed(f, shape(N, N), shape(5, N, N), shape(5, N, N)) == 3 * SQUARE


def test_gradients_of_a_loop_need_what_it_stacked():
    def loss(w_LDD, x):
        body = jax.checkpoint(lambda x, w_DD: (jnp.tanh(x @ w_DD), None))
        return jnp.sum(jax.lax.scan(body, x, w_LDD)[0])

    layers = 50
    bytes_ = needed(jax.grad(loss), shape(layers, N, N), shape(N, N), platform="")
    assert 2 * layers * SQUARE <= bytes_ <= (2 * layers + 6) * SQUARE  # inputs of the layers, gradients of the weights


def test_branches_count_by_the_larger_one():
    def f(which, x):
        return jax.lax.cond(which, lambda x: x @ x, lambda x: jnp.concatenate([x @ x, x @ x @ x])[:N] @ x, x)

    def larger(x):
        return jnp.concatenate([x @ x, x @ x @ x])[:N] @ x

    index = 4
    assert needed(f, shape(dtype=bool), shape(N, N)) == needed(larger, shape(N, N)) + index


def mesh(**sizes):
    return jax.sharding.AbstractMesh((*sizes.values(),), (*sizes,), axis_types=(AxisType.Explicit,) * len(sizes))


def test_sizes_are_one_devices_own():
    where = mesh(a=4, b=2)

    def island(x):
        return jax.lax.all_gather(x @ x.T, "a", tiled=True)

    with jax.sharding.use_abstract_mesh(where):
        x = jax.ShapeDtypeStruct((8 * N, N), jnp.float32, sharding=NamedSharding(where, P("a", None)))
        f = jax.shard_map(island, in_specs=P("a"), out_specs=P("a"))
        local = 4 * (2 * N) ** 2
        assert needed(f, x) == local + 4 * local
        product = lambda x: jnp.einsum("tn,tm->nm", x, x, out_sharding=P("b", None))  # noqa: E731
        assert needed(product, x) == 4 * N * N // 2
        assert needed(lambda x: jax.sharding.reshard(x, P(None, None)), x) == 4 * 8 * N * N


@pytest.mark.parametrize(
    ("platform", "axis", "copy"),
    [("gpu", 1, 1.0), ("gpu", 0, 0.0), ("tpu", 1, 0.5), ("tpu", 0, 0.5), ("cpu", 1, 0.0)],
)
def test_second_copies_of_stacks(platform, axis, copy):
    """GPUs: float32, where the gathered axis is not the first; TPUs: in bfloat16."""
    where, layers = mesh(a=4), 64

    def f(x, w_LDD):
        def body(x, w_DD):
            w_DD = jax.sharding.reshard(w_DD.astype(jnp.bfloat16), P(None, None))
            return jnp.tanh(x @ w_DD), None

        return jax.lax.scan(body, x, w_LDD)[0]

    with jax.sharding.use_abstract_mesh(where):
        spec = P(None, *(("a", None) if axis == 0 else (None, "a")))
        x = jax.ShapeDtypeStruct((N, N), jnp.bfloat16, sharding=NamedSharding(where, P(None, None)))
        w_LDD = jax.ShapeDtypeStruct((layers, N, N), jnp.float32, sharding=NamedSharding(where, spec))
        stack = layers * SQUARE // 4
        assert needed(f, x, w_LDD, platform=platform) - needed(f, x, w_LDD, platform="") == copy * stack


def test_donated_arguments_are_written_over():
    assert needed(lambda x, g: (x - 0.1 * g, x * 0.9 + g), shape(N, N), shape(N, N)) == 0
