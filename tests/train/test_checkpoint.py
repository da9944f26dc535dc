"""Checkpoints: bit-equal on any mesh, the last few and the best kept, nothing half-written read, nothing earlier damaged."""

import json
import logging
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from moe_jax.train import stored_arrays
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.validation import CheckpointError

SPECS = {
    "embed": {"table_VD": P("tensor", "fsdp")},
    "blocks": {"w_up_EDF": P("expert", "fsdp", "tensor")},
    "bias_LE": P(),
    "load_LE": P(),
    "key": P(),
}


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed": {"table_VD": rng.normal(size=(8, 4)).astype(np.float32)},
        "blocks": {"w_up_EDF": jnp.asarray(rng.normal(size=(8, 4, 6)), jnp.bfloat16)},
        "bias_LE": np.float32(rng.normal(size=(2, 8)) * 1e-7),
        "load_LE": rng.integers(0, 2**31 - 1, (2, 8)).astype(np.int32),
        "key": jax.random.key(seed, impl="rbg"),
    }


def put(state, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), state, SPECS)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


def save_small(checkpoints, step, loss=None, value=None):
    metrics = {} if loss is None else {"loss": loss}
    value = float(step) if value is None else value
    checkpoints.save(step, {"w": jnp.full(3, value)}, {"metrics": metrics})


SMALL = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}


@pytest.mark.parametrize("shape", [dict(fsdp=2, expert=2, tensor=2), dict(expert=8), dict()], ids=str)
def test_a_checkpoint_travels_to_another_mesh_bit_for_bit(tmp_path, shape):
    saved = put(make_state(), mesh_of(data=8))
    extra = {"data": {"position": [3, 2**40]}, "metrics": {"loss": 0.1 + 0.2}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(7, saved, extra)
        target = abstract(put(make_state(1), mesh_of(**shape)))
        restored, read = checkpoints.restore(7, target)
    assert read == extra
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b, t in zip(*map(jax.tree.leaves, (restored, saved, target)), strict=True):
        assert a.dtype == b.dtype
        assert bits(a) == bits(b)
        assert a.sharding == t.sharding


def test_optimizer_state_and_nnx_state_round_trip(tmp_path):
    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Dict(scale_D=nnx.Param(jnp.arange(4.0)))

    params = nnx.state(Model(), nnx.Param)
    optimizer = optax.adamw(1e-3)
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    state = {"params": params, "opt": opt_state}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert [bits(x) for x in jax.tree.leaves(restored)] == [bits(x) for x in jax.tree.leaves(state)]
    assert int(restored["opt"][0].count) == 1


def test_the_state_may_be_donated_while_the_save_runs(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jnp.zeros((2048, 1024))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        restored, _ = checkpoints.restore(1, state)
    assert float(state["w"].min()) == 5
    assert np.all(np.asarray(restored["w"]) == 0)


def test_the_newest_and_the_best_are_kept_across_processes(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan")}
    for step, loss in losses.items():  # a new object each time, as after a restart
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            save_small(checkpoints, step, loss)
    checkpoints = Checkpoints(tmp_path)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4, 5]
    assert (checkpoints.latest(), checkpoints.best()) == (5, 2)
    assert float(checkpoints.restore(2, SMALL)[0]["w"][0]) == 2.0


def test_best_is_the_newest_of_equals_and_none_without_a_metric(tmp_path):
    with Checkpoints(tmp_path / "a", keep=9) as checkpoints:
        save_small(checkpoints, 1)
        assert checkpoints.best() is None
        save_small(checkpoints, 2, 1.5)
        save_small(checkpoints, 3, 1.5)
        assert checkpoints.best() == 3


def test_reading_an_absent_folder_makes_nothing(tmp_path):
    with Checkpoints(tmp_path / "absent") as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.best() is None
        with pytest.raises(CheckpointError, match=r"No complete checkpoint of step 3 is in .*absent; there are none\."):
            checkpoints.restore(3, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_half_written_checkpoints_are_skipped_with_a_logged_line(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        save_small(checkpoints, 1)
        save_small(checkpoints, 2)
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "2", tmp_path / "4")
    (tmp_path / "4" / "state" / "manifest.ocdbt").unlink()
    shutil.copytree(tmp_path / "2", tmp_path / "5")
    text = (tmp_path / "5" / "_CHECKPOINT_METADATA").read_text()
    (tmp_path / "5" / "_CHECKPOINT_METADATA").write_text(text[: len(text) // 2])
    (tmp_path / "6").mkdir()
    shutil.copytree(tmp_path / "2", tmp_path / "8")
    metadata = json.loads(text) | {"commit_timestamp_nsecs": None}
    (tmp_path / "8" / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "7.backup").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=9)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest() == 2
        assert checkpoints.latest() == 2
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Skipped")]
    assert sorted(pathlib.Path(line.split(":")[0]).name for line in lines) == ["3.orbax-checkpoint-tmp", "4", "5", "6", "8"]
    with checkpoints:  # a save in spite of them, of a step that a broken folder holds
        save_small(checkpoints, 4)
        assert checkpoints.latest() == 4
        assert float(checkpoints.restore(4, SMALL)[0]["w"][0]) == 4.0
    aside = {f"{step}.incomplete" for step in (4, 5, 6, 8)}
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2", "4", "7.backup", "notes.txt"} | aside


def test_an_existing_checkpoint_is_never_saved_over(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, 5, value=1.0)
        for step in (5, 4):
            with pytest.raises(CheckpointError, match="A checkpoint of step 5 is already in"):
                save_small(checkpoints, step, value=2.0)
        with pytest.raises(TypeError):
            checkpoints.save(6, SMALL, {"data": object()})
        assert checkpoints.latest() == 5
        assert float(checkpoints.restore(5, SMALL)[0]["w"][0]) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": (4, 3)}, r"w is float32\[3\] in the checkpoint and float32\[4, 3\] in the model"),
        ({"w": (3,), "extra": (1,)}, r"extra is absent in the checkpoint and float32\[1\] in the model"),
        ({"v": (3,)}, r"v is absent in the checkpoint and float32\[3\] in the model"),
        ({}, r"w is float32\[3\] in the checkpoint and absent in the model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    with Checkpoints(tmp_path / "mine") as checkpoints:
        save_small(checkpoints, 1)
        target = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in change.items()}
        with pytest.raises(CheckpointError, match=rf"The checkpoint in .*mine/1 does not fit the model: {message}; use"):
            checkpoints.restore(1, target)


def test_another_dtype_is_refused_not_cast(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save_small(checkpoints, 1)
        with pytest.raises(CheckpointError, match=r"w is float32\[3\] in the checkpoint and bfloat16\[3\] in the model"):
            checkpoints.restore(1, {"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16)})


KILLED = """
import os, signal, sys, threading
import jax.numpy as jnp
from moe_jax.train.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, {"w": jnp.ones(3)}, {})
checkpoints.wait()
checkpoints.save(2, {"w": jnp.zeros((4096, 4096)), "v": jnp.zeros((4096, 2048))}, {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=pathlib.Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == 1
        assert float(checkpoints.restore(1, SMALL)[0]["w"][0]) == 1.0
        save_small(checkpoints, 2)
        checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_extra_is_plain_json_on_disk(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(3)}, {"metrics": {"loss": 2.5}, "data": {"a": [1]}})
    assert json.loads((tmp_path / "1" / "extra" / "metadata").read_text()) == {"metrics": {"loss": 2.5}, "data": {"a": [1]}}


def test_a_large_array_is_saved_in_chunks_of_one_layer_and_a_part_can_be_restored(tmp_path, monkeypatch):
    """What was not asked for is not read; bfloat16 fills float32 there, and only there."""
    monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 4 * 5 * 4)
    w_LDF, half = jnp.arange(60, dtype=jnp.float32).reshape(3, 4, 5), jnp.arange(4, dtype=jnp.bfloat16)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": {"w": w_LDF}, "half": half, "small": jnp.ones(3)}, {})
        arrays = stored_arrays.StoredArrays(checkpoints.path(1))
        assert arrays["a/w"].chunk_layout.read_chunk.shape == (1, 4, 5)
        assert arrays["small"].chunk_layout.read_chunk.shape == (3,)
        np.testing.assert_array_equal(arrays["a/w"][1].read().result(), w_LDF[1])
        wanted = {"a": {"w": w_LDF}, "half": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=half.sharding)}
        part, _ = checkpoints.restore(1, wanted, part=True)
        assert part["half"].dtype == jnp.float32
        np.testing.assert_array_equal(part["half"], np.arange(4))
        np.testing.assert_array_equal(part["a"]["w"], w_LDF)
        with pytest.raises(CheckpointError, match="half is bfloat16"):
            checkpoints.restore(1, {**wanted, "small": jnp.ones(3)})
