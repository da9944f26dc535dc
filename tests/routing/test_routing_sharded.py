"""Routing inside shard_map over the data axes, eight devices against one: values, gradients, sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from router_oracle import CASES
from routes import routed
from tolerance import assert_close

from moe_jax.config import RouterConfig
from moe_jax.mesh import BATCH_AXES
from moe_jax.routing import make_router
from moe_jax.routing.losses import balance_loss, routing_sums, sequence_balance_loss, z_loss

B, S, D, E = 16, 3, 5, 8


def problem():
    """48 tokens in 16 sequences, two a device; the second device has only padding."""
    rng = np.random.default_rng(0)
    mask_BS = rng.random((B, S)) < 0.8
    mask_BS[2:4] = False
    arrays = (rng.normal(size=(B * S, D)), rng.normal(size=(D, E)), rng.normal(size=E) * 0.1)
    return *(jnp.asarray(a, jnp.float32) for a in arrays), jnp.asarray(mask_BS.reshape(-1)), jnp.arange(B * S)


def make_loss(router, axes):
    """A loss of the weights and of the global balance, z and sequence terms; `axes` are those that split the tokens."""

    def loss(w_DE, x_TD, bias_E, mask_T, id_T, key):
        routing = routed(router, x_TD, w_DE, bias_E, mask_T, noise_key=key, token_id_T=id_T)
        num_sequences = B // (8 if axes else 1)
        sums = jax.lax.psum(routing_sums(routing, mask_T, num_sequences, sequence_balance=True), axes)
        direct = jax.lax.psum(jnp.sum(jnp.sin(routing.weight_A * jnp.cos(routing.expert_A))), axes)
        total = (
            direct
            + balance_loss(sums.load_E, sums.prob_sum_E, sums.num_tokens)
            + z_loss(sums.z_sum, sums.num_tokens)
            + sequence_balance_loss(sums.sequence_balance_sum, sums.num_sequences)
        )
        return total, sums

    return loss


@pytest.mark.parametrize("case", ["switch_jitter", "mixtral", "deepseek_groups"])
def test_eight_devices_agree_with_one(case):
    family, top_k, options = CASES[case]
    router = make_router(RouterConfig(family, top_k, options), E)
    x_TD, w_DE, bias_E, mask_T, id_T = problem()
    key = jax.random.key(3)
    alone = jax.jit(jax.value_and_grad(make_loss(router, ()), argnums=(0, 1), has_aux=True))
    (value, sums), grads = alone(w_DE, x_TD, bias_E, mask_T, id_T, key)

    mesh = mesh_of(data=2, fsdp=2, expert=2)
    rows, whole = P(BATCH_AXES), P()
    with jax.set_mesh(mesh):
        place = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip((w_DE, x_TD, bias_E, mask_T, id_T, key), (whole, rows, whole, rows, rows, whole), strict=True)
        ]
        loss = jax.shard_map(
            make_loss(router, BATCH_AXES),
            in_specs=(whole, rows, whole, rows, rows, whole),
            out_specs=(whole, whole),
        )
        (sharded_value, sharded_sums), sharded_grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*place)

    np.testing.assert_array_equal(sharded_sums.load_E, sums.load_E)
    assert int(sums.load_E.sum()) == top_k * int(mask_T.sum())
    assert int(sharded_sums.num_tokens) == int(sums.num_tokens)
    assert int(sharded_sums.num_sequences) == int(sums.num_sequences)
    for name in ("prob_sum_E", "z_sum", "entropy_sum", "sequence_balance_sum"):
        assert_close(getattr(sharded_sums, name), getattr(sums, name), what=name)
    assert_close(sharded_value, value)
    assert_close(sharded_grads[0], grads[0], what="gradient of w")
    assert_close(sharded_grads[1], grads[1], what="gradient of x")


def test_sums_can_be_the_carry_of_a_scan_inside_shard_map():
    """Gradient accumulation on every device: a scan over microbatches, each the first or second sequence of a device."""
    router = make_router(RouterConfig("mixtral", 2), E)
    x_TD, w_DE, bias_E, mask_T, _ = problem()

    def body(x_TD, mask_T):
        def one(x_TD, mask_T):
            return routing_sums(routed(router, x_TD, w_DE, bias_E, mask_T), mask_T, 1)

        first = one(x_TD[:S], mask_T[:S])

        def step(sums, microbatch):
            return sums + one(*microbatch), None

        sums, _ = jax.lax.scan(step, first, (x_TD[None, S:], mask_T[None, S:]))
        return jax.lax.psum(sums, BATCH_AXES)

    mesh = mesh_of(data=2, fsdp=2, expert=2)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(BATCH_AXES))
        run = jax.jit(jax.shard_map(body, in_specs=(P(BATCH_AXES), P(BATCH_AXES)), out_specs=P()))
        sums = run(jax.device_put(x_TD, rows), jax.device_put(mask_T, rows))
    expected = routing_sums(routed(router, x_TD, w_DE, bias_E, mask_T), mask_T, B)
    np.testing.assert_array_equal(sums.load_E, expected.load_E)
    assert_close(sums.prob_sum_E, expected.prob_sum_E)
