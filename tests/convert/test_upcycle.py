"""Upcycling: the same function before the first step, experts that can part after it, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from randomised import randomised
from tolerance import assert_close

from moe_jax.config import ConfigError, ModelConfig, MoEConfig, RouterConfig
from moe_jax.convert.upcycle import upcycle, upcycled_config
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.models.transformer import abstract, build, token_ids
from moe_jax.routing import ROUTERS

DENSE = tiny.config(num_experts=0).model  # three layers of F = 24
AHEAD = dataclasses.replace(DENSE, mtp_layers=1)
AFTER = RouterConfig("mixtral", 2)
SIGMOID = RouterConfig("deepseek", 4, {"num_groups": 2, "top_groups": 2, "scale": 2.5})


def moe(router, d_ff=24, **more) -> MoEConfig:
    return MoEConfig(**(dict(num_experts=8, num_shared_experts=0, d_ff=d_ff, router=router) | more))


def with_experts(router, d_ff=24, dense=DENSE, **more) -> ModelConfig:
    return dataclasses.replace(dense, moe=moe(router, d_ff, **more))


def top(k, name="mixtral", **options):
    return RouterConfig(name, k, options)


# method and model: every layer MoE unless it says otherwise
KEPT = {
    "copy after, and a token further": ("copy", with_experts(AFTER, dense=AHEAD)),
    "copy after, later layers": ("copy", with_experts(AFTER, first_dense=1, every=2)),
    "copy sigmoid, shared": ("copy", with_experts(SIGMOID, num_shared_experts=2)),
    "copy after, shared gate and biases": (
        "copy",
        with_experts(AFTER, num_shared_experts=1, shared_gate=True, expert_bias=True, first_dense=2),
    ),
    "split after": ("split", with_experts(top(4), 12)),
    "split after, one token's worth": ("split", with_experts(top(3), 8, num_experts=9, first_dense=2)),
    "split sigmoid, shared": ("split", with_experts(SIGMOID, 8, num_shared_experts=2, shared_d_ff=4)),
    "split sigmoid, shared gate": ("split", with_experts(SIGMOID, 4, num_shared_experts=2, shared_gate=True)),
    "split, all shards active": ("split", with_experts(top(3), 8, num_experts=3)),
    "split into one": ("split", with_experts(AFTER, 16, num_shared_experts=1, shared_d_ff=8)),
}


def one_device():
    return make_mesh(tiny.config(), jax.devices()[:1])


@functools.cache
def dense_params(**changes):
    """Of DENSE with `changes`."""
    model = dataclasses.replace(DENSE, **changes)
    with jax.set_mesh(one_device()):
        return jax.device_get(randomised(build(model, seed=3)[1]))


def run(model, params, router_state, gradients=False):
    """Logits of valid tokens, those of the token after the next too where the model has them; loads [L, E]; gradients of a random sum."""
    mesh, valid_BS = one_device(), tiny.batch(rows=8)["segment_ids"] > 0
    with jax.set_mesh(mesh):
        graphdef, batch = abstract(model)[0], shard_batch(mesh, tiny.batch(rows=8))
        u_BSV = np.random.default_rng(1).normal(size=(8, tiny.SEQ_LEN, tiny.VOCAB)).astype("f4") * valid_BS[..., None]
        u_BSV = shard_batch(mesh, {"u": u_BSV})["u"]

        def outputs(params):
            net = nnx.merge(graphdef, params, router_state)
            inputs = batch["tokens"], batch["segment_ids"], batch["positions"]
            x_BSD, aux = net.hidden(*inputs)
            logits = [net.logits(x_BSD)]
            if model.mtp_layers:
                logits.append(net.ahead(x_BSD, batch["targets"], *inputs[1:], None, token_ids(batch["tokens"]))[0])
            return jnp.sum(logits[0] * u_BSV), (logits, aux and aux.stats.load_E)

        if not gradients:
            _, (logits, load_LE) = jax.device_get(jax.jit(outputs)(params))
            return [array[valid_BS] for array in logits], load_LE
        gradient, (_, load_LE) = jax.device_get(jax.jit(jax.grad(outputs, has_aux=True))(params))
        return gradient, load_LE


@functools.cache
def dense_logits(**changes):
    return run(dataclasses.replace(DENSE, **changes), dense_params(**changes), {})[0]


SLOW = ("split after, one token's worth", "split into one")  # what the others hold too


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in KEPT])
def test_the_function_is_kept(case):
    method, model = KEPT[case]
    dense, changes = (AHEAD, {"mtp_layers": 1}) if model.mtp_layers else (DENSE, {})
    params, state = upcycle(dense, dense_params(**changes), model, seed=1, method=method, router_std=0.5)
    logits, load_LE = run(model, params, state)
    assert (load_LE > 0).sum() > model.moe.router.top_k * len(load_LE) or model.moe.num_experts == model.moe.router.top_k
    for mine, theirs in zip(logits, dense_logits(**changes), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("case", ["copy sigmoid, shared", "split sigmoid, shared"])
def test_chosen_experts_learn(case):
    method, model = KEPT[case]
    params, state = upcycle(DENSE, dense_params(), model, seed=1, method=method, router_std=0.5)
    gradient, load_LE = run(model, params, state, gradients=True)
    layer = gradient["groups"]["moe"]["moe"]
    for array in layer["experts"].values():
        np.testing.assert_array_equal(np.abs(array).max((2, 3)) > 0, load_LE > 0)
    # copies answer alike, so that how they are weighed does not matter yet; shards do not
    router, experts = (np.abs(array).max() for array in (layer["w_router_DE"], layer["experts"]["w_up_EDF"]))
    assert (router < 1e-5 * experts) if method == "copy" else (router > 1e-3 * experts)


def test_the_dense_model_is_not_the_same_without_the_scale():
    method, model = KEPT["copy sigmoid, shared"]
    params, state = upcycle(DENSE, dense_params(), model, seed=1, method=method)
    params["groups"]["moe"]["moe"]["experts"]["w_down_EFD"] *= 2.5
    (logits,), _ = run(model, params, state)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(logits, dense_logits()[0])


def test_copies_are_the_dense_network_to_the_bit():
    params, _ = upcycle(DENSE, dense_params(), KEPT["copy after, later layers"][1], seed=1)
    dense = dense_params()
    np.testing.assert_array_equal(params["dense"]["mlp"]["w_up_DF"], dense["dense"]["mlp"]["w_up_DF"][:1])
    np.testing.assert_array_equal(params["groups"]["dense_0"]["mlp"]["w_up_DF"], dense["dense"]["mlp"]["w_up_DF"][1:2])
    for name in ("w_gate", "w_up", "w_down"):
        (mine,) = (a for key, a in params["groups"]["moe"]["moe"]["experts"].items() if key.startswith(name))
        (theirs,) = (a for key, a in dense["dense"]["mlp"].items() if key.startswith(name))
        for expert in range(8):
            np.testing.assert_array_equal(mine[:, expert], theirs[2:3])


def test_a_virtual_group_has_every_hidden_unit_once():
    params, _ = upcycle(DENSE, dense_params(), KEPT["split sigmoid, shared"][1], seed=1, method="split")
    layer, w_LDF = params["groups"]["moe"]["moe"], dense_params()["dense"]["mlp"]["w_up_DF"]
    w_LEDF, w_router_LDE = layer["experts"]["w_up_EDF"], layer["w_router_DE"]
    for group in range(4):
        shards = [layer["shared"]["w_up_DF"], w_LEDF[:, 2 * group], w_LEDF[:, 2 * group + 1]]
        np.testing.assert_array_equal(np.concatenate(shards, axis=-1), w_LDF)
    np.testing.assert_array_equal(w_router_LDE[..., 0::2], w_router_LDE[..., 1::2])
    assert len(np.unique(w_router_LDE[0, 0])) == 4


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("fraction", [0.5, 1 / 3, 1.0])
def test_drop_draws_that_fraction_anew(activation, fraction):
    dense = dataclasses.replace(DENSE, activation=activation)
    shifted = jax.tree.map(lambda a: 3 * a + 0.7, dense_params(activation=activation))
    model = with_experts(AFTER, dense=dense, first_dense=1)
    params, _ = upcycle(dense, shifted, model, seed=1, method="drop", drop_fraction=fraction)
    mlp, experts = shifted["dense"]["mlp"], params["groups"]["moe"]["moe"]["experts"]
    old = {n: np.broadcast_to(a[1:, None], (2, 8, *a.shape[1:])) for n, a in mlp.items()}
    pairs = [(old["w_up_DF"], experts["w_up_EDF"], 2), (old["w_down_FD"], experts["w_down_EFD"], 3)]
    pairs += [(old["w_gate_DF"], experts["w_gate_EDF"], 2)] if activation == "swiglu" else []
    drawn = [(before != after).any(axis) for before, after, axis in pairs]
    for new_LEF in drawn:
        np.testing.assert_array_equal(new_LEF, drawn[0])
        np.testing.assert_array_equal(new_LEF.sum(-1), round(24 * fraction))
    assert fraction == 1 or len(np.unique(drawn[0].reshape(16, 24), axis=0)) == 16
    for before, after, axis in pairs:
        mask = np.broadcast_to(np.expand_dims(drawn[0], axis), before.shape)
        was, now = before[mask], after[mask]
        error = was.std() / np.sqrt(was.size)  # the statistics are those of each expert's own units, so closer than this
        assert abs(now.mean() - was.mean()) < 4 * error
        assert abs(now.std() - was.std()) < 4 * error
        assert abs(np.corrcoef(was, now)[0, 1]) < 0.2


@pytest.mark.parametrize("method", ["copy", "drop"])
def test_the_seed_decides(method):
    model = with_experts(AFTER)
    first, same, other = (upcycle(DENSE, dense_params(), model, seed=s, method=method)[0] for s in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    one, two = (tree["groups"]["moe"]["moe"] for tree in (first, other))
    assert (one["w_router_DE"] != two["w_router_DE"]).all()
    assert len(np.unique(one["w_router_DE"])) == one["w_router_DE"].size  # no layer has another's
    assert (one["experts"]["w_up_EDF"] != two["experts"]["w_up_EDF"]).any() == (method == "drop")
    assert abs(np.std(one["w_router_DE"]) / DENSE.init_std - 1) < 0.1


def test_the_layout_of_the_dense_model_does_not_matter():
    model, trees = with_experts(AFTER), []
    for mesh in ("one device", "fsdp 2 expert 2 tensor 2"):
        settings = tiny.config(mesh=mesh)
        with jax.set_mesh(make_mesh(settings, jax.devices()[: 1 if mesh == "one device" else 8])):
            trees.append(upcycle(DENSE, build(DENSE, seed=0)[1], model, seed=1))
    jax.tree.map(np.testing.assert_array_equal, *trees)


# Routers whose weights of a token add up to one in evaluation, whoever it is; those of the others have no such number.
TO_ONE = [
    "mixtral",
    "deepseek",
    "noisy_top_k",
    "gshard",
    "st_moe",
    "balanced",
    "all_experts",
    "hash",
    "random",
    "round_robin",
    "reinforce",
]


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_keeps_the_function_or_is_refused(name):
    k = {"switch": 1, "base": 1, "all_experts": 8}.get(name, 2)
    model = with_experts(RouterConfig(name, k, allow_noncausal=True))
    if name not in TO_ONE:
        with pytest.raises(ConfigError, match=rf"model.moe.router.name = '{name}'"):
            upcycle(DENSE, dense_params(), model, seed=1)
        return
    params, _ = upcycle(DENSE, dense_params(), model, seed=1)
    w_LFD = dense_params()["dense"]["mlp"]["w_down_FD"]
    np.testing.assert_array_equal(params["groups"]["moe"]["moe"]["experts"]["w_down_EFD"][:, 0], w_LFD)


def test_raw_probabilities_are_right_on_average_where_asked():
    model = with_experts(top(2, normalize="before"))
    params, _ = upcycle(DENSE, dense_params(), model, seed=1, approximate=True)
    layer = params["groups"]["moe"]["moe"]
    logits_TE = np.random.default_rng(5).normal(size=(4000, 16)) @ layer["w_router_DE"][0]
    probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    mean = np.sort(probs_TE, axis=1)[:, -2:].sum(1).mean()
    scale = dense_params()["dense"]["mlp"]["w_down_FD"] / layer["experts"]["w_down_EFD"][:, 3]
    assert np.ptp(scale) < 1e-5
    assert abs(scale.mean() / mean - 1) < 0.03


@pytest.mark.parametrize(
    ("method", "d_model_ff", "router", "given", "width"),
    [
        ("copy", 24, AFTER, {}, 24),
        ("drop", 24, AFTER, dict(num_shared_experts=1), 24),
        ("split", 24, top(4), {}, 6),
        ("split", 24, top(3), dict(num_shared_experts=1), 6),
        ("split", 24, top(4), dict(num_shared_experts=2, shared_d_ff=4), 4),
    ],
)
def test_the_derived_config(method, d_model_ff, router, given, width):
    dense = dataclasses.replace(DENSE, d_ff=d_model_ff)
    model = upcycled_config(dense, moe(router, d_ff=999, num_experts=12, **{} | given), method)
    assert model == with_experts(router, width, dense=dense, num_experts=12, **given)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (with_experts(AFTER), dict(method="drpo"), "method = 'drpo' is unknown; did you mean 'drop'"),
        (with_experts(AFTER), dict(method="drop", drop_fraction=0.0), "drop_fraction = 0.0 must be"),
        (with_experts(AFTER), dict(method="drop", drop_fraction=1.5), "drop_fraction = 1.5 must be"),
        (with_experts(AFTER), dict(router_std=0.0), "router_std = 0.0 must be"),
        (with_experts(AFTER), dict(seed=-1), "seed = -1 must be"),
        (with_experts(AFTER, 8), {}, "moe.d_ff = 8 is not model.d_ff = 24.*set it to 24"),
        (with_experts(AFTER, num_shared_experts=1, shared_d_ff=8), {}, "shared_d_ff = 8 makes shared experts of width 8"),
        (with_experts(AFTER, 7), dict(method="split"), "moe.d_ff = 7 does not divide the 24 hidden units"),
        (with_experts(AFTER, 32), dict(method="split"), "moe.d_ff = 32 does not divide the 24 hidden units"),
        (with_experts(top(3), 12), dict(method="split"), "router.top_k = 3 is not a multiple of the 2 shards"),
        (with_experts(top(4), 12, num_experts=9), dict(method="split"), "num_experts = 9 is not a multiple of the 2 shards"),
        (with_experts(AFTER, num_experts=0), {}, "num_experts = 0 in the model to make"),
        (with_experts(top(9)), {}, "top_k = 9 is more than"),
        (dataclasses.replace(with_experts(AFTER), vocab_size=0), {}, "vocab_size = 0"),
        (dataclasses.replace(with_experts(AFTER), d_model=32), {}, "model.d_model = 32 but 16 in the dense model"),
        (dataclasses.replace(with_experts(AFTER), mtp_layers=1), {}, "model.mtp_layers = 1 but 0 in the dense model"),
        (
            dataclasses.replace(with_experts(AFTER), attention=dataclasses.replace(DENSE.attention, window=4)),
            {},
            "model.attention.window = 4 but 0 in the dense model",
        ),
        (with_experts(top(1, "switch")), {}, "'switch' as it is set: the weights of a token"),
        (with_experts(top(4, normalize="before"), 12), dict(method="split"), "the weights of the shards"),
        # virtual groups of three experts, each a group of the router's; then virtual groups of four in groups of six
        (
            with_experts(top(3, "deepseek", num_groups=4, top_groups=1), 8, num_experts=12),
            dict(method="split", router_std=1.0),
            None,
        ),
        (
            with_experts(top(4, "deepseek", num_groups=2, top_groups=1), 6, num_experts=12),
            dict(method="split", router_std=1.0),
            "the weights of the shards",
        ),
        (with_experts(RouterConfig("soft_moe", 1, allow_noncausal=True)), dict(method="drop"), "gives experts mixes of tokens"),
    ],
)
def test_refusals(model, arguments, message):
    if message is None:  # a counterpart that is taken
        upcycle(DENSE, dense_params(), model, **({"seed": 0} | arguments))
        return
    with pytest.raises(ConfigError, match=message):
        upcycle(DENSE, dense_params(), model, **({"seed": 0} | arguments))


def test_what_does_not_change_the_function_may_differ():
    attention = dataclasses.replace(DENSE.attention, implementation="xla")
    model = dataclasses.replace(with_experts(AFTER), dtype="bfloat16", remat="dots", init_std=0.3, attention=attention)
    params, _ = upcycle(DENSE, dense_params(), model, seed=1)
    assert abs(np.std(params["groups"]["moe"]["moe"]["w_router_DE"]) / 0.3 - 1) < 0.1


def test_models_that_cannot_be_upcycled():
    model = with_experts(AFTER)
    with pytest.raises(ConfigError, match="num_experts = 8 in the model to upcycle"):
        upcycle(model, dense_params(), model, seed=0)
    wider = jax.tree.map(lambda a: np.concatenate([a, a], axis=-1), dense_params())
    with pytest.raises(ConfigError, match="would have shape"):
        upcycle(DENSE, wider, model, seed=0)
    with pytest.raises(ConfigError, match=r"model\.d_ff = 24 less 0 of shared experts is not a multiple of the 5 experts"):
        upcycled_config(DENSE, moe(top(5)), "split")
    with pytest.raises(ConfigError, match="method = 'plain' is unknown"):
        upcycled_config(DENSE, moe(AFTER), "plain")
