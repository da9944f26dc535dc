"""metrics.jsonl and TensorBoard: each step once, also after a kill; whole files or none."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moe_jax.train.files import write_atomic
from moe_jax.train.writers import MetricWriter


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """(step, tag, value) of every scalar, and purge points as (step, None, None), over the event files in order of writing."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length 8, its crc 4, payload, its crc 4
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                found.append((event.step, None, None))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_scalars_and_arrays_are_exact_json(tmp_path):
    loss = jnp.float32(0.1)
    load = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    with MetricWriter(tmp_path / "new" / "run") as writer:
        writer.write(1, {"loss": loss, "moe/load": load, "tokens": 2**40, "note": "warm-up", "ok": True})
        writer.write(3, {"loss": np.float32("nan"), "each": np.array([1.0, np.inf])})
    first, second = read(tmp_path / "new" / "run")
    assert first == {
        "step": 1,
        "loss": float(np.float32(0.1)),
        "moe/load": [[0, 1, 2], [3, 4, 5]],
        "tokens": 2**40,
        "note": "warm-up",
        "ok": True,
    }
    assert second == {"step": 3, "loss": None, "each": [1.0, None]}


def test_scalars_go_to_tensorboard_and_of_layers_three_and_nothing_of_larger_arrays(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(4, {"loss": 2.5, "moe/load": np.ones((2, 2)), "note": "x", "violation": np.array([0.5, 0.25])})
    assert [e for e in events(tmp_path) if e[1]] == [
        (4, "loss", 2.5),
        (4, "violation/min", 0.25),
        (4, "violation/mean", 0.375),
        (4, "violation/max", 0.5),
    ]


def test_no_tensorboard_folder_unless_asked(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"loss": 1.0})
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_cuts_off_what_came_after_and_a_torn_line(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # killed here
    with MetricWriter(tmp_path, resume_step=20) as writer:
        with pytest.raises(ValueError, match="Metrics of step 20 come after those of step 20"):
            writer.write(20, {"loss": 0.0})
        writer.write(30, {"loss": -1.0})
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    assert (21, None, None) in events(tmp_path)  # TensorBoard hides the first run's step 30


def test_a_fresh_start_begins_an_empty_file(tmp_path):
    for _ in range(2):
        with MetricWriter(tmp_path, tensorboard=False) as writer:
            writer.write(0, {"loss": 1.0})
    assert [line["step"] for line in read(tmp_path)] == [0]


def test_steps_come_once_and_in_order(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(2, {})
        for step in (2, 1):
            with pytest.raises(ValueError, match=f"Metrics of step {step} come after those of step 2"):
                writer.write(step, {})
        with pytest.raises(ValueError, match='A metric is named "step"'):
            writer.write(3, {"step": 3})


def test_a_failed_atomic_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    write_atomic(path, "new")
    assert path.read_text() == "new"
