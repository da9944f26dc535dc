"""Every ordered pair of eight meshes: saved on one, restored on the other, the same state to the bit and the same next losses."""

import functools
import itertools

import jax
import mesh_pairs
import numpy as np
import pytest
import tiny
from tolerance import RELATIVE_TO_RMS, assert_close

from moe_jax.mesh import shard_batch
from moe_jax.train.state import create
from moe_jax.train.step import make_train_step

pytestmark = pytest.mark.faults
BEFORE, AFTER = range(2), range(2, 4)  # steps before the checkpoint and after it, each on a batch of its own


@functools.cache
def program(name):
    """(fresh state, step function)"""
    config, mesh = mesh_pairs.layout(name)
    with jax.set_mesh(mesh):
        graphdef, optimizer, state = create(config)
        return state, make_train_step(config, graphdef, optimizer)


def advance(name, state, steps):
    """The state and the losses, [step]."""
    _, mesh = mesh_pairs.layout(name)
    losses = []
    with jax.set_mesh(mesh):
        for number in steps:
            state, metrics = program(name)[1](state, shard_batch(mesh, tiny.batch(number)), jax.random.key(0))
            losses.append(float(metrics["train/loss"]))
    return state, np.array(losses, np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By layout: the folder with the checkpoint after `BEFORE`, the state's bits, the losses of `AFTER`."""
    found = {}
    for name in mesh_pairs.LAYOUTS:
        folder = tmp_path_factory.mktemp("pairs")
        state, _ = advance(name, program(name)[0], BEFORE)
        bits = mesh_pairs.bits(state)
        mesh_pairs.save(folder, len(BEFORE), state)
        found[name] = folder, bits, advance(name, state, AFTER)[1]
    return found


def test_every_ordered_pair(saved, record_property):
    differences = {}
    for a, b in itertools.product(mesh_pairs.LAYOUTS, repeat=2):
        folder, bits, expected = saved[a]
        state = mesh_pairs.restore(folder, b)
        assert mesh_pairs.bits(state) == bits, f"{a} to {b}: the state differs"
        _, losses = advance(b, state, AFTER)
        assert_close(losses, expected, what=f"{a} to {b}: the losses of the next steps")
        differences[a, b] = np.max(np.abs(losses - expected) / expected)
        if a == b:
            assert losses.tolist() == expected.tolist()
    record_property("figures", table(differences))


def table(differences):
    names = list(mesh_pairs.LAYOUTS)
    lines = [
        f"{len(differences)} pairs, state equal to the bit in all; largest difference of the next {len(AFTER)} losses, in units of 1e-7"
        f" of the loss (tolerance {RELATIVE_TO_RMS['float32'] * 1e7:.0f})",
        f"saved at, restored at | {' | '.join(names)}",
        "---|" * len(names) + "---",
    ]
    lines += [f"{a} | {' | '.join(f'{differences[a, b] * 1e7:.1f}' for b in names)}" for a in names]
    return "\n".join(lines)
