"""Every exchange with every dispatch, on eight devices, against the one-device oracle and a plain model of the drops."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from claim_model import deliver
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerance import assert_close

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.dispatch.capacity import capacity
from moe_jax.dispatch.einsum import EinsumDispatch
from moe_jax.exchange.all_to_all import peer_rows
from moe_jax.exchange.expert_parallel import moe_island
from moe_jax.exchange.plan import make_exchange
from moe_jax.mesh import AXES, BATCH_AXES
from moe_jax.routing.contract import Routing, token_choice
from moe_jax.routing.losses import routing_sums

B, S, D, F, E, K = 16, 4, 4, 6, 8, 2
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # many programs, tiny shapes
MESHES = {"expert8": (1, 1, 8, 1), "data2_expert4": (2, 1, 4, 1), "fsdp2_expert2_tensor2": (1, 2, 2, 2)}


@dataclass(frozen=True)
class BiasRouter:
    """Top-K of probabilities plus the bias, which therefore steers the choice."""

    causal, has_bias, uses_noise = True, True, False

    def __call__(self, x_TD, w_DE, bias_E, mask_T, *, noise_key=None, token_id_T=None):
        logits_TE = jnp.einsum("TD,DE->TE", x_TD.astype(jnp.float32), w_DE)
        if noise_key is not None:
            noise = lambda token_id: jax.random.gumbel(jax.random.fold_in(noise_key, token_id), (E,))  # noqa: E731
            logits_TE += jax.vmap(noise)(token_id_T)
        probs_TE = jax.nn.softmax(logits_TE)
        _, expert_TK = jax.lax.top_k(probs_TE + bias_E, K)
        return token_choice(expert_TK, jnp.take_along_axis(probs_TE, expert_TK, 1), probs_TE, logits_TE, mask_T)


def make_expert_fn(weights):
    """A tanh FFN an expert, ragged rows by a one-hot of their expert: independent of ops.grouped_matmul."""

    def expert_fn(x, group_sizes_E=None):
        if group_sizes_E is None:
            h_ECF = jnp.tanh(jnp.einsum("ECD,EDF->ECF", x, weights["w_up_EDF"]))
            return jnp.einsum("ECF,EFD->ECD", h_ECF, weights["w_down_EFD"])
        end_E = jnp.cumsum(group_sizes_E)
        row_A = jnp.arange(x.shape[0])[:, None]
        mine_AE = ((row_A < end_E) & (row_A >= end_E - group_sizes_E)).astype(x.dtype)
        h_AEF = jnp.tanh(jnp.einsum("AD,EDF->AEF", x, weights["w_up_EDF"]))
        return jnp.einsum("AEF,AE,EFD->AD", h_AEF, mine_AE, weights["w_down_EFD"])

    return expert_fn


def moe_config(**changes):
    return MoEConfig(num_experts=E, router=RouterConfig(name="test", top_k=K), **changes)


def make_mesh(name):
    return jax.make_mesh(MESHES[name], AXES, axis_types=(AxisType.Explicit,) * 4)


def inputs(case):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    bias_E, mask_BS = np.zeros(E, np.float32), np.ones((B, S), bool)
    if case == "one_expert":
        bias_E[5] = 10.0  # every first choice
    if case == "empty_experts":
        bias_E[[0, 3, 4, 6]] = -10.0
    if case == "padding":
        mask_BS[: B // 2] = False  # several devices see nothing but padding
        mask_BS[-1, 1:] = False
    params = dict(x=normal(B, S, D), router=normal(D, E), w_up_EDF=normal(E, D, F) / 2, w_down_EFD=normal(E, F, D) / 2)
    return params, jnp.asarray(mask_BS), jnp.asarray(bias_E), normal(B, S, D)


def loss(y, sums, target):
    """Touches every differentiable output."""
    return jnp.sum(y * target) + jnp.sum(sums.prob_sum_E**2) * 1e-2 + sums.z_sum * 1e-2 + sums.sequence_balance_sum


@jax.jit
def oracle(params, mask, bias, target, noise_key=None):
    def forward(params):
        x_TD, mask_T = params["x"].reshape(-1, D), mask.reshape(-1)
        routing = BiasRouter()(x_TD, params["router"], bias, mask_T, noise_key=noise_key, token_id_T=jnp.arange(B * S))
        y_TD, stats = EinsumDispatch()(x_TD, routing, make_expert_fn(params))
        sums, y = routing_sums(routing, mask_T, B, sequence_balance=True), y_TD.reshape(B, S, D)
        return loss(y, sums, target), (y, sums, stats)

    return jax.value_and_grad(forward, has_aux=True)(params)


def island_step(mesh, moe):
    token_id = jnp.arange(B * S, dtype=jnp.int32).reshape(B, S)
    batch = NamedSharding(mesh, P(BATCH_AXES, None))
    shardings = dict(
        x=NamedSharding(mesh, P(BATCH_AXES, None, None)),
        router=NamedSharding(mesh, P()),
        w_up_EDF=NamedSharding(mesh, P("expert", "fsdp", "tensor")),
        w_down_EFD=NamedSharding(mesh, P("expert", "tensor", "fsdp")),
    )

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def step(params, mask, bias, target, noise_key):
        def forward(params):
            weights = {name: params[name] for name in ("w_up_EDF", "w_down_EFD")}
            ids = jax.sharding.reshard(token_id, P(BATCH_AXES, None))
            y, sums, stats = moe_island(
                *(params["x"], mask, ids, params["router"], bias, weights, noise_key),
                **dict(router=BiasRouter(), moe=moe, make_expert_fn=make_expert_fn),
            )
            return loss(y, sums, target), (y, sums, stats)

        return jax.value_and_grad(forward, has_aux=True)(params)

    def run(params, mask, bias, target, noise_key=None):
        with jax.set_mesh(mesh):
            params = {name: jax.device_put(array, shardings[name]) for name, array in params.items()}
            mask, target = jax.device_put(mask, batch), jax.device_put(target, shardings["x"])
            return step(params, mask, jax.device_put(bias, shardings["router"]), target, noise_key)

    return run


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("dispatch", ["einsum", "capacity", "dropless"])
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_equals_one_device(exchange, dispatch, mesh_name):
    mesh = make_mesh(mesh_name)
    moe = moe_config(exchange=exchange, dispatch=dispatch, capacity_factor=E / K, balance_loss_scope="sequence")
    step = island_step(mesh, moe)
    for case in ("balanced", "one_expert", "empty_experts", "padding"):
        data = inputs(case)
        (value, (y, sums, stats)), grads = step(*data)
        (want_value, (want_y, want_sums, want_stats)), want_grads = oracle(*data)
        assert_close(value, want_value, what=f"{case} loss")
        assert_close(y, want_y, what=f"{case} y")
        for name in grads:
            assert_close(grads[name], want_grads[name], what=f"{case} gradient of {name}")
        jax.tree.map(functools.partial(assert_close, dtype="float32", what=f"{case} sums"), sums, want_sums)
        np.testing.assert_array_equal(stats.load_E, want_stats.load_E)
        np.testing.assert_array_equal(stats.load_E, sums.load_E)
        assert int(stats.load_E.sum()) == int(data[1].sum()) * K
        assert int(stats.padding) == int((~data[1]).sum()) * K
        assert int(stats.dropped_capacity) == int(stats.dropped_sender) == int(stats.dropped_receiver) == 0
        assert not np.any(np.asarray(y)[~np.asarray(data[1])])


def test_noise_does_not_see_the_layout():
    step = island_step(make_mesh("fsdp2_expert2_tensor2"), moe_config(exchange="all_to_all"))
    data = inputs("padding")
    (_, (y, _, stats)), _ = step(*data, jax.random.key(3))
    (_, (want_y, _, want_stats)), _ = oracle(*data, jax.random.key(3))
    assert_close(y, want_y)
    np.testing.assert_array_equal(stats.load_E, want_stats.load_E)
    assert np.any(np.asarray(stats.load_E) != np.asarray(oracle(*data)[0][1][2].load_E))


def test_bfloat16():
    step = island_step(make_mesh("fsdp2_expert2_tensor2"), moe_config(exchange="all_to_all", balance_loss_scope="sequence"))
    params, *rest = inputs("balanced")
    params = {name: array if name == "router" else array.astype(jnp.bfloat16) for name, array in params.items()}
    (_, (y, _, _)), grads = step(params, *rest)
    (_, (want_y, _, _)), want_grads = oracle({name: array.astype(jnp.float32) for name, array in params.items()}, *rest)
    assert y.dtype == jnp.bfloat16
    assert_close(y, want_y, what="y")
    for name in grads:
        assert grads[name].dtype == params[name].dtype
        error = np.asarray(grads[name], np.float32) - np.asarray(want_grads[name])
        assert np.sqrt(np.mean(error**2) / np.mean(want_grads[name] ** 2)) < 2e-2, name


def run_exchange(mesh, moe, x_TD, expert_TK, weight_TK, token_choice_list=True):
    """One exchange of tokens split over the batch axes; expert e scales by e + 1. Returns y, stats and d sum(y) / d weight."""

    def body(x_TD, expert_TK, weight_TK):
        probs_TE = jnp.zeros((x_TD.shape[0], E))
        routing = token_choice(expert_TK, weight_TK, probs_TE, probs_TE, expert_TK[:, 0] < E)
        if not token_choice_list:  # backwards, so that no rule can rely on where a token's assignments are
            lists = [array_A[::-1] for array_A in (routing.token_A, routing.expert_A, routing.weight_A)]
            routing = Routing(*lists, probs_TE, probs_TE)
        num_local = E // mesh.shape["expert"]
        scale_E = jax.lax.axis_index("expert") * num_local + jnp.arange(1.0, num_local + 1)

        def expert_fn(x, group_sizes_E=None):
            if group_sizes_E is None:
                return x * scale_E[:, None, None]
            return x * jnp.repeat(scale_E, group_sizes_E, total_repeat_length=x.shape[0])[:, None]

        y_TD, stats = make_exchange(moe, mesh.shape["expert"])(x_TD, routing, expert_fn)
        return y_TD, jax.tree.map(lambda count: count[None], stats)

    tokens = P(BATCH_AXES, None)
    exchange = jax.shard_map(body, in_specs=(tokens, tokens, tokens), out_specs=(tokens, P(BATCH_AXES)))

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def step(x_TD, expert_TK, weight_TK):
        def forward(weight_TK):
            y_TD, stats = exchange(x_TD, expert_TK, weight_TK)
            return y_TD.sum(), (y_TD, stats)

        (_, (y_TD, stats)), g_TK = jax.value_and_grad(forward, has_aux=True)(weight_TK)
        return y_TD, stats, g_TK

    with jax.set_mesh(mesh):
        put = lambda array: jax.device_put(array, NamedSharding(mesh, tokens))  # noqa: E731
        return jax.tree.map(np.asarray, step(put(x_TD), put(expert_TK), put(weight_TK)))


@pytest.mark.parametrize(
    ("settings", "mesh_name"),
    [
        (dict(exchange="all_to_all", dispatch="capacity"), "expert8"),
        (dict(exchange="all_to_all", dispatch="capacity", capacity_priority="probability"), "data2_expert4"),
        (dict(exchange="all_to_all", dispatch="dropless", exchange_factor=0.8), "data2_expert4"),
        (dict(exchange="all_to_all", dispatch="capacity", exchange_factor=1.0), "data2_expert4"),
        (dict(exchange="all_gather", dispatch="capacity", capacity_priority="probability"), "expert8"),
        (dict(exchange="all_gather", dispatch="capacity"), "data2_expert4"),
        (dict(exchange="auto", dispatch="capacity"), "data8"),
    ],
)
def test_drops_are_those_of_the_model(settings, mesh_name):
    mesh = jax.make_mesh({**MESHES, "data8": (8, 1, 1, 1)}[mesh_name], AXES, axis_types=(AxisType.Explicit,) * 4)
    n, tokens = mesh.shape["expert"], 12  # tokens a device
    rng = np.random.default_rng(1)
    popularity_E = np.array([8, 5, 1, 1, 3, 1, 0.01, 1])
    expert_TK = np.stack([rng.choice(E, K, replace=False, p=popularity_E / popularity_E.sum()) for _ in range(8 * tokens)])
    expert_TK[rng.random(8 * tokens) < 0.2] = E  # padding
    weight_TK = rng.choice([0.125, 0.25, 0.5, 0.75], expert_TK.shape).astype(np.float32)  # with many ties
    x_TD = rng.uniform(1.0, 2.0, (8 * tokens, D)).astype(np.float32)
    moe = moe_config(capacity_factor=0.9, **settings)
    y_TD, stats, g_TK = run_exchange(mesh, moe, jnp.asarray(x_TD), jnp.asarray(expert_TK, jnp.int32), jnp.asarray(weight_TK))

    rows = None
    if moe.exchange_factor:
        rows = peer_rows(tokens, tokens * K, E, n, moe.exchange_factor)
        assert rows == {0.8: 5, 1.0: 6}[moe.exchange_factor]  # ceil(factor * 12 * 2 / 4)
    buffer = capacity(n * tokens, K, E, 0.9) if moe.dispatch == "capacity" else None
    assert buffer in (None, {8: 22, 4: 11, 1: 3}[n])  # ceil(0.9 * n * 12 * 2 / 8)
    delivered_TK, sender, full = np.zeros(expert_TK.shape, bool), 0, 0
    for start in range(0, 8 * tokens, n * tokens):  # the groups that share buffers
        group = slice(start, start + n * tokens)
        shape = (n, tokens, K)
        model = dict(num_experts=E, capacity=buffer, peer_rows=rows, priority=moe.capacity_priority)
        result = deliver(expert_TK[group].reshape(shape), weight_TK[group].reshape(shape), **model)
        delivered_TK[group] = result[0].reshape(-1, K)
        sender, full = sender + result[1], full + result[2]
    assert sender + full > 0

    np.testing.assert_array_equal(g_TK != 0, delivered_TK)
    want_TD = np.einsum("TK,TD->TD", delivered_TK * weight_TK * (expert_TK + 1), x_TD)
    assert_close(y_TD, want_TD, dtype="float32")
    assert stats.dropped_sender.sum() == sender
    assert stats.dropped_capacity.sum() == full
    assert stats.dropped_receiver.sum() == 0
    np.testing.assert_array_equal(stats.load_E.sum(0), np.bincount(expert_TK.ravel(), minlength=E + 1)[:E])
    assert stats.load_E.sum() == delivered_TK.sum() + sender + full
    metadata = 4 * (2 + (moe.capacity_priority == "probability"))  # expert, choice, and the weight where it decides
    sent = {
        "auto": 0,
        "all_gather": (n - 1) * tokens * (D * (4 + 4) + K * (4 + 4)),
        "all_to_all": (n - 1) * peer_rows(tokens, tokens * K, E, n, moe.exchange_factor) * (2 * D * 4 + metadata),
    }
    np.testing.assert_array_equal(stats.bytes_sent, np.full(8, sent[moe.exchange], np.float32))


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_lists_that_are_not_token_choice(exchange):
    rng = np.random.default_rng(2)
    expert_TK = np.stack([rng.choice(E + 1, K, replace=False) for _ in range(32)]).astype(np.int32)
    weight_TK, x_TD = (rng.uniform(0.5, 1.0, shape).astype(np.float32) for shape in ((32, K), (32, D)))
    expert_TK[expert_TK[:, 0] == E] = E
    data = [jnp.asarray(array) for array in (x_TD, expert_TK, weight_TK)]
    y_TD, stats, g_TK = run_exchange(make_mesh("data2_expert4"), moe_config(exchange=exchange), *data, token_choice_list=False)
    scaled_TK = np.where(expert_TK < E, expert_TK + 1, 0)
    assert_close(y_TD, np.einsum("TK,TD->TD", weight_TK * scaled_TK, x_TD), dtype="float32")
    assert_close(g_TK, scaled_TK * x_TD.sum(1, keepdims=True), dtype="float32")
    assert stats.load_E.sum() == (expert_TK < E).sum()
    assert stats.dropped_sender.sum() == 0


@pytest.mark.parametrize(
    ("factor", "want"),
    [(0.0, 20), (1.0, 8), (1.35, 11), (0.01, 1), (100.0, 20)],  # 10 tokens x 3 choices over 4 peers of 2 experts
)
def test_peer_rows(factor, want):
    assert peer_rows(10, 30, 8, 4, factor) == want


def test_global_bytes_count_every_device():
    moe = moe_config(exchange="all_to_all", dispatch="dropless")
    _, (_, _, stats) = island_step(make_mesh("fsdp2_expert2_tensor2"), moe)(*inputs("balanced"))[0]
    rows = B * S // 4 * K  # of a device to its one peer, worst case
    assert float(stats.bytes_sent) == 8 * rows * (2 * D * 4 + 2 * 4)


def test_auto_is_the_dispatch_alone_without_an_expert_axis():
    moe = moe_config(dispatch="dropless")
    assert type(make_exchange(moe, 1)).__name__ == "DroplessDispatch"
    assert type(make_exchange(moe, 2)).__name__ == "AllToAll"
