"""Schedules against NumPy, AdamW against NumPy in float64, the decay rules, and sharded against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from tolerance import assert_close

from moe_jax.config import ConfigError, OptimizerConfig
from moe_jax.train.optimizer import learning_rate, make_optimizer, weight_decay_mask
from moe_jax.train.paths import leaf_names

NAMES = {  # every parameter a model can have, and whether it decays
    "embed/table_VD": False,
    "blocks/attention_norm/scale_D": False,
    "blocks/attention/wq_DHN": True,
    "blocks/attention/wk_DGN": True,
    "blocks/attention/wv_DGN": True,
    "blocks/attention/wo_HND": True,
    "blocks/attention/bq_HN": False,
    "blocks/attention/bk_GN": False,
    "blocks/attention/bv_GN": False,
    "blocks/attention/bo_D": False,
    "blocks/attention/q_norm/scale_N": False,
    "blocks/attention/k_norm/scale_N": False,
    "blocks/attention/q_norm/scale_HN": False,
    "blocks/attention/k_norm/scale_GN": False,
    "blocks/attention/sink_H": False,
    "blocks/attention/wq_down_DR": True,
    "blocks/attention/q_latent_norm/scale_R": False,
    "blocks/attention/wq_up_RHN": True,
    "blocks/attention/wkv_down_DR": True,
    "blocks/attention/wk_rope_DN": True,
    "blocks/attention/kv_latent_norm/scale_R": False,
    "blocks/attention/wk_up_RHN": True,
    "blocks/attention/wv_up_RHN": True,
    "blocks/ffn_norm/scale_D": False,
    "blocks/ffn_norm/bias_D": False,
    "blocks/ffn_post_norm/scale_D": False,
    "dense/mlp/w_gate_DF": True,
    "dense/mlp/w_up_DF": True,
    "dense/mlp/w_down_FD": True,
    "blocks/moe/w_router_DE": True,
    "blocks/moe/experts/w_gate_EDF": True,
    "blocks/moe/experts/w_up_EDF": True,
    "blocks/moe/experts/w_down_EFD": True,
    "blocks/moe/experts/b_gate_EF": False,
    "blocks/moe/experts/b_up_EF": False,
    "blocks/moe/experts/b_down_ED": False,
    "blocks/moe/b_router_E": False,
    "blocks/moe/shared/w_up_DF": True,
    "blocks/moe/w_shared_gate_D": True,
    "final_norm/scale_D": False,
    "final_norm/bias_D": False,
    "head/w_DV": True,
    "head/b_V": False,
    "mtp/hidden_norm/scale_D": False,
    "mtp/embed_norm/scale_D": False,
    "mtp/final_norm/scale_D": False,
    "mtp/w_hidden_DD": True,
    "mtp/w_embed_DD": True,
    "mtp/block/moe/experts/w_up_EDF": True,
}
SIZES = {"V": 16, "D": 8, "H": 4, "G": 2, "N": 6, "F": 12, "E": 8, "R": 3}
SPECS = {  # how the model shards them
    "embed/table_VD": P("tensor", "fsdp"),
    "blocks/attention/wq_DHN": P("fsdp", "tensor", None),
    "blocks/moe/experts/w_up_EDF": P("expert", "fsdp", "tensor"),
    "blocks/moe/experts/w_down_EFD": P("expert", "tensor", "fsdp"),
    "blocks/moe/w_router_DE": P(None, None),
    "final_norm/scale_D": P(None),
}


def nest(by_name):
    tree = {}
    for name, value in by_name.items():
        *groups, last = name.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


def arrays(names, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(SIZES[letter] for letter in name.rsplit("_", 1)[1]) for name in names}
    return nest({name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()})


def schedule_by_hand(config, steps, t):
    warm = min(1.0, (t + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        p = max(0.0, (t + 1 - config.warmup_steps) / (steps - config.warmup_steps))
        shape = 0.5 * (1 + np.cos(np.pi * p))
    elif config.schedule == "wsd":
        n = round(config.decay_fraction * steps)
        shape = 1 - np.sqrt(max(0.0, (t + 1 - (steps - n)) / n))
    else:
        shape = 1.0
    return config.learning_rate * warm * (config.final_fraction + (1 - config.final_fraction) * shape)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_the_formulas(schedule, warmup):
    config = OptimizerConfig(learning_rate=0.3, schedule=schedule, warmup_steps=warmup, decay_fraction=0.25, final_fraction=0.1)
    rate = learning_rate(config, 40)
    actual = jax.vmap(rate)(jnp.arange(40))
    assert actual.dtype == jnp.float32
    assert_close(actual, np.array([schedule_by_hand(config, 40, t) for t in range(40)]))


def test_a_schedule_starts_above_zero_peaks_and_ends_where_it_says():
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=4, decay_fraction=0.5, final_fraction=0.2)
    rates = [float(learning_rate(config, 16)(t)) for t in range(16)]
    assert rates[0] == 0.25
    assert rates[3:8] == [1.0] * 5
    assert rates[8] == pytest.approx(0.2 + 0.8 * (1 - (1 / 8) ** 0.5))
    assert rates[15] == pytest.approx(0.2)


def test_overlapping_warmup_and_decay_are_refused():
    config = OptimizerConfig(schedule="wsd", warmup_steps=90, decay_fraction=0.2)
    with pytest.raises(ConfigError, match=r"warmup_steps = 90 and the last 20 steps of optimizer.decay_fraction = 0.2"):
        learning_rate(config, 100)


def test_the_rules_cover_every_parameter():
    mask = weight_decay_mask(arrays(NAMES, 0))
    assert dict(zip(leaf_names(mask), jax.tree.leaves(mask), strict=True)) == NAMES


def test_the_rules_read_an_nnx_state():
    class Block(nnx.Module):
        def __init__(self):
            self.attention_norm = nnx.Dict(scale_D=nnx.Param(jnp.ones(4)))
            self.wo_HND = nnx.Param(jnp.ones((1, 2, 4)))

    class Model(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([Block(), Block()])

    state = nnx.state(Model(), nnx.Param)
    assert leaf_names(state) == [f"blocks/{i}/{name}" for i in (0, 1) for name in ("attention_norm/scale_D", "wo_HND")]
    assert jax.tree.leaves(weight_decay_mask(state)) == [False, True, False, True]
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10, state)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, state), optimizer.init(state), state)
    assert [float(x.min()) for x in jax.tree.leaves(updates)] == [0.0, -0.5, 0.0, -0.5]


@pytest.mark.parametrize("name", ["blocks/attention/w_new_DD", "embed/table_VD2", "blocks/norms/scale_D", "blocks/moe/bias_E"])
def test_an_uncovered_parameter_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"Parameter {name} is covered by no rule"):
        make_optimizer(OptimizerConfig(), 100, nest({"head/w_DV": np.ones((2, 2)), name: np.ones((2, 2))}))


def test_a_doubly_covered_parameter_is_refused(monkeypatch):
    monkeypatch.setattr("moe_jax.train.optimizer.WEIGHT_DECAY_RULES", ((r"w\w*", True), (r".*_DF", False)))
    with pytest.raises(ConfigError, match=r"Parameter w_DF is covered by rules .* and .* of WEIGHT_DECAY_RULES"):
        weight_decay_mask({"w_DF": np.ones(2)})


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_three_updates_are_adamw_by_hand(clip_norm):
    config = OptimizerConfig(
        learning_rate=0.05, schedule="cosine", warmup_steps=2, b1=0.8, b2=0.9, eps=1e-4, weight_decay=0.3, clip_norm=clip_norm
    )
    names = ["head/w_DV", "final_norm/scale_D", "blocks/moe/experts/w_up_EDF"]
    params = arrays(names, 0)
    optimizer = make_optimizer(config, 10, params)
    state, actual = optimizer.init(params), params
    expected = [np.float64(x) for x in jax.tree.leaves(params)]
    decays = [NAMES[name] for name in leaf_names(params)]
    m = v = [0.0] * 3
    for t in range(3):
        grads = arrays(names, t + 1, scale=0.1)
        updates, state = optimizer.update(grads, state, actual)
        actual = optax.apply_updates(actual, updates)
        g = [np.float64(x) for x in jax.tree.leaves(grads)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        assert norm > 0.7
        g = [x * min(1.0, clip_norm / norm) if clip_norm else x for x in g]
        m = [0.8 * a + 0.2 * b for a, b in zip(m, g, strict=True)]
        v = [0.9 * a + 0.1 * b**2 for a, b in zip(v, g, strict=True)]
        rate = schedule_by_hand(config, 10, t)
        for i, decay in enumerate(decays):
            adam = m[i] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[i] / (1 - 0.9 ** (t + 1))) + 1e-4)
            expected[i] = expected[i] - rate * (adam + 0.3 * decay * expected[i])
    for a, e, name in zip(jax.tree.leaves(actual), expected, leaf_names(params), strict=True):
        assert_close(a, e, what=name)


def test_a_gradient_below_the_norm_is_not_touched():
    config = OptimizerConfig(clip_norm=1.0, learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0)
    params = {"head": {"w_DV": np.zeros((2, 2), np.float32)}}
    small = {"head": {"w_DV": np.full((2, 2), 0.25, np.float32)}}  # norm 0.5
    state = make_optimizer(config, 10, params).init(params)
    _, state = make_optimizer(config, 10, params).update(small, state, params)
    mu = optax.tree.get(state, "mu")
    assert_close(mu["head"]["w_DV"], 0.1 * small["head"]["w_DV"])


@pytest.mark.parametrize("shape", [dict(data=8), dict(fsdp=2, expert=2, tensor=2), dict(data=2, expert=4)], ids=str)
def test_sharded_updates_equal_one_device_and_moments_lie_with_their_parameters(shape):
    config = OptimizerConfig(clip_norm=0.5, warmup_steps=0, learning_rate=0.01)
    params, grads = arrays(SPECS, 0), arrays(SPECS, 1)
    optimizer = make_optimizer(config, 10, params)

    @jax.jit
    def two_updates(params, grads):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, optax.tree.get(state, "mu"), optax.tree.get(state, "nu")

    expected = two_updates(params, grads)
    mesh = mesh_of(**shape)
    with jax.set_mesh(mesh):
        put = lambda tree: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, nest(SPECS))  # noqa: E731
        sharded = put(params)
        actual = two_updates(sharded, put(grads))
        eager = optimizer.init(sharded)
    for part in (*actual, optax.tree.get(eager, "mu"), optax.tree.get(eager, "nu")):
        jax.tree.map(lambda x, p: _same_sharding(x, p), part, sharded)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, np.asarray(e))


def _same_sharding(x, parameter):
    assert x.sharding.is_equivalent_to(parameter.sharding, x.ndim), (x.sharding, parameter.sharding)
