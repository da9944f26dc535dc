"""The train step: compiled once, the state donated, the bias moved once, the router's gradient alive, the noise of the step."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from moe_jax.config import OptimizerConfig, TrainConfig
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.train.state import create
from moe_jax.train.step import make_train_step

SPEED = tiny.ROUTERS["deepseek"].options["bias_speed"]


class Trainer:
    """A config's compiled step, with a fresh state for each test."""

    def __init__(self, config):
        self.mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
        self.config = config
        with jax.set_mesh(self.mesh):
            graphdef, optimizer, self._start = create(config)
            self.compiled = make_train_step(config, graphdef, optimizer)
            self.batch = shard_batch(self.mesh, tiny.batch())

    def fresh(self, step=0):
        state = jax.tree.map(jnp.copy, self._start)
        return state.replace(step=state.step + step)

    def step(self, state, **changes):
        with jax.set_mesh(self.mesh):
            return self.compiled(state, self.batch | changes, jax.random.key(7))


@functools.cache
def trainer(router="deepseek", mesh="fsdp 2 expert 2 tensor 2", accumulation=4, **moe):
    """Without warm-up and decay, so that a step's number matters to the noise alone."""
    config = tiny.config(router, mesh, accumulation=accumulation, **moe)
    optimizer = OptimizerConfig(learning_rate=0.03, schedule="constant", warmup_steps=0, weight_decay=0.0)
    return Trainer(dataclasses.replace(config, optimizer=optimizer, train=TrainConfig(accumulation=accumulation)))


def test_further_steps_do_not_recompile():
    """Shardings, dtypes and weak types of the state that comes out are those of the state that went in."""
    made = trainer()
    state = made.fresh()
    before = jax.tree.map(lambda x: (x.sharding, x.dtype, x.shape, x.weak_type), state)
    for _ in range(3):
        state, _ = made.step(state)
    assert made.compiled._cache_size() == 1
    assert int(state.step) == 3
    after = jax.tree.map(lambda x: (x.sharding, x.dtype, x.shape, x.weak_type), state)
    jax.tree.map(lambda x, a, b: _same(x, a, b), state, before, after)


def _same(x, before, after):
    assert after[0].is_equivalent_to(before[0], x.ndim)
    assert after[1:] == before[1:]


def test_the_state_is_donated():
    made = trainer()
    state = made.fresh()
    batch = dict(made.batch)
    made.step(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state, state.router_state)))
    assert not any(leaf.is_deleted() for leaf in batch.values())


def test_the_bias_moves_once_a_step_by_its_speed():
    """Four microbatches, one move: b + u sign(mean load - load), from the loads of all of them."""
    made = trainer()
    start = made.fresh()
    first, metrics = made.step(start)
    load_LE = np.asarray(metrics["router/load"])
    assert load_LE.sum() == load_LE.shape[0] * 3 * int((tiny.batch()["segment_ids"] > 0).sum())  # K = 3, every microbatch
    moves_LE = np.float32(SPEED) * np.sign(load_LE.sum(-1, keepdims=True) - 8 * load_LE.astype(np.int64)).astype(np.float32)
    assert np.abs(moves_LE).max() > 0
    np.testing.assert_array_equal(jax.tree.leaves(first.router_state)[0], moves_LE)
    np.testing.assert_array_equal(metrics["router/bias"], moves_LE)
    bias_LE = np.asarray(moves_LE)
    _, metrics = made.step(first)
    load_LE = np.asarray(metrics["router/load"])
    moves_LE = np.float32(SPEED) * np.sign(load_LE.sum(-1, keepdims=True) - 8 * load_LE.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(metrics["router/bias"], bias_LE + moves_LE)


def test_the_optimizer_does_not_know_the_bias():
    state = trainer().fresh()
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))]
    assert any("w_router_DE" in name for name in names)
    assert not any("bias_E" in name for name in names)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("value", ["nan", "inf", "3e38"])
def test_a_step_that_is_not_finite_leaves_all_but_its_number_as_it_was(value):
    """Parameters, both moments, their counts, the bias; 3e38 is a finite weight of a token whose gradients are not."""
    made = trainer()
    state, metrics = made.step(made.fresh())
    assert metrics["train/skipped"] == 0
    before, params, number = bits(state.replace(step=jnp.int32(0))), bits(state.params), int(state.step)
    bad, metrics = made.step(state, loss_weights=made.batch["loss_weights"] * np.float32(value))
    assert metrics["train/skipped"] == 1
    assert not (np.isfinite(metrics["train/loss"]) and np.isfinite(metrics["train/gradient_norm"]))
    assert int(bad.step) == number + 1
    assert bits(bad.replace(step=jnp.int32(0))) == before
    assert made.compiled._cache_size() == 1
    after, _ = made.step(bad)
    straight, _ = made.step(made.step(made.fresh())[0])
    assert bits(after.replace(step=jnp.int32(0))) == bits(straight.replace(step=jnp.int32(0)))
    assert bits(after.params) != params


def switch_trainer():
    return trainer("switch", "expert 8", 1, balance_loss_weight=0.0, z_loss_weight=0.0)


def test_one_expert_a_token_leaves_the_router_a_gradient():
    """Switch without any auxiliary loss: the language-model loss alone reaches the router of every layer."""
    made = switch_trainer()
    state, _ = made.step(made.fresh())
    first_moment = optax.tree.get(state.opt_state, "mu")  # (1 - b1) times the clipped gradient
    router_LDE, expert_LEDF = (first_moment["groups"]["moe"]["moe"][k] for k in ("w_router_DE", "experts"))
    assert router_LDE.shape == (2, 16, 8)
    rms_L = np.sqrt(np.mean(np.square(router_LDE), axis=(1, 2)))
    assert (rms_L > 0.01 * np.sqrt(np.mean(np.square(expert_LEDF["w_up_EDF"])))).all()


def test_noise_is_a_function_of_the_step():
    made = switch_trainer()
    losses = [float(made.step(made.fresh(step))[1]["train/loss"]) for step in (0, 0, 1, 2)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    assert made.compiled._cache_size() == 1
    without = trainer()
    assert len({float(without.step(without.fresh(step))[1]["train/loss"]) for step in (0, 1)}) == 1


def test_one_batch_is_learned_by_heart():
    made = trainer()
    state, losses = made.fresh(), []
    for _ in range(40):
        state, metrics = made.step(state)
        losses.append(float(metrics["train/loss"]))
    assert losses[0] > 0.9 * np.log(tiny.VOCAB)
    assert losses[-1] < 0.5 * losses[0]


def test_tree_mode_works_too():
    """Flax NNX without graph mode and graph updates, in a process of its own: the flags are read at import."""
    flags = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    check = "from flax.configurations import config; assert not (config.nnx_graph_mode or config.nnx_graph_updates)"
    test = f"{__file__}::{test_the_bias_moves_once_a_step_by_its_speed.__name__}"
    program = f"{check}; import pytest; raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', {test!r}]))"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
