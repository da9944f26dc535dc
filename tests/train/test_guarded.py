"""Guards at work in a run: events on disk, steps that are skipped, a watchdog, a full disk."""

import json
import os
import re
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from moe_jax.processes import RUN_AGAIN
from moe_jax.train import guarded, loop
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.events import EventLog, TrainingError
from moe_jax.train.guarded import Guarded
from moe_jax.train.guards import Guards
from moe_jax.train.optimizer import learning_rate
from moe_jax.train.state import TrainState
from moe_jax.train.watchdog import LENIENCE, Watchdog
from moe_jax.train.writers import MetricWriter

AGES = 600  # seconds that end a hang


def events(workdir):
    path = workdir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    tiny_run.write_corpus(folder)
    return folder


def on_steps(monkeypatch, act):
    """`act(number, batch)` makes the batch of each training step, counted from the start of the process."""
    shard_batch, calls = loop.shard_batch, []

    def counted(mesh, batch):
        calls.append(None)
        return shard_batch(mesh, act(len(calls), batch))

    monkeypatch.setattr(loop, "shard_batch", counted)


def poisoned(*steps):
    nan = np.float32("nan")
    return lambda number, batch: batch | ({"loss_weights": batch["loss_weights"] * nan} if number in steps else {})


def test_a_run_skips_what_is_not_finite_and_says_so(folder, monkeypatch, capsys):
    """Steps 5 and 6 of 8: two of the three that are allowed, in the second of which a checkpoint was due."""
    config = tiny_run.config(folder, "skips", train__log_every=1)
    with monkeypatch.context() as patch:
        on_steps(patch, poisoned(5, 6))
        loop.train(config)
    event, unsaved = events(folder / "skips")
    assert (unsaved["step"], unsaved["guard"], unsaved["action"]) == (6, "non_finite", "warn")
    assert unsaved["sentence"].startswith("step 6: no checkpoint is made while steps are being skipped;")
    assert sorted(entry.name for entry in (folder / "skips" / "checkpoints").iterdir()) == ["3", "8"]
    assert (event["step"], event["guard"], event["action"], event["threshold"]) == (5, "non_finite", "warn", 3)
    assert event["sentence"].startswith("step 5: loss = nan, gradient norm = nan; the step is skipped, and so are up to 2 more")
    assert capsys.readouterr().err.count(event["sentence"]) == 1
    assert b"guards/non_finite" in b"".join(path.read_bytes() for path in (folder / "skips" / "tensorboard").iterdir())
    lines = tiny_run.metrics(folder / "skips")
    assert [line["train/skipped"] for line in lines] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert [line["step"] for line in lines if line["train/loss"] is None] == [5, 6]
    rate = learning_rate(config.optimizer, 8)
    updates = [0, 1, 2, 3, 4, 4, 4, 5]  # made before a step: a skipped one is none
    np.testing.assert_allclose([line["train/learning_rate"] for line in lines], [rate(t) for t in updates], rtol=1e-6)
    state = tiny_run.saved_state(folder / "skips")
    assert int(state["step"]) == 8
    assert {int(value) for name, value in state.items() if name.endswith("count")} == {6}
    assert all(np.isfinite(value).all() for value in state.values() if value.dtype == np.float32)


def test_a_run_stops_when_too_many_are_skipped_in_a_row(folder, monkeypatch):
    config = tiny_run.config(folder, "stops", guards__skip_steps=3)
    with monkeypatch.context() as patch:
        on_steps(patch, poisoned(5, 6, 7, 8))
        with pytest.raises(
            TrainingError, match=r"step 8: .*, in 4 steps in a row; the run is stopped, .*/stops/checkpoints/3; lower"
        ):
            loop.train(config)
    assert [(event["step"], event["action"]) for event in events(folder / "stops")] == [(5, "warn"), (6, "warn"), (8, "stop")]
    assert [entry.name for entry in (folder / "stops" / "checkpoints").iterdir()] == ["3"]
    loop.train(config)
    assert events(folder / "stops") == []  # steps 5 to 8 came again, and were well
    assert len(tiny_run.metrics(folder / "stops")) == 4


def test_a_run_whose_last_steps_are_skipped_stops_there_and_saves_nothing(folder, monkeypatch):
    """Two of the three that are allowed; the same command tries them again."""
    config = tiny_run.config(folder, "ends")
    with monkeypatch.context() as patch:
        on_steps(patch, poisoned(7, 8))
        with pytest.raises(
            TrainingError, match=r"step 8: .*, in the run's last 2 steps; the run is stopped, .*/checkpoints/6; lower"
        ):
            loop.train(config)
    assert [(event["step"], event["action"]) for event in events(folder / "ends")] == [(7, "warn"), (8, "stop")]
    loop.train(config)
    assert int(tiny_run.saved_state(folder / "ends")["step"]) == 8
    assert events(folder / "ends") == []


def test_a_run_that_skips_without_end_says_what_it_ends_with(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        on_steps(patch, poisoned(7, 8))
        loop.train(tiny_run.config(folder, "ends_warned", guards__non_finite="warn"))
    sentence = events(folder / "ends_warned")[-1]["sentence"]
    assert "in the run's last 2 steps; skipped, so that the run ends with the state of step 6; lower" in sentence
    assert sentence in capsys.readouterr().err
    assert int(tiny_run.saved_state(folder / "ends_warned")["step"]) == 8


def test_an_interrupted_run_hears_what_an_uninterrupted_one_hears(folder, monkeypatch):
    """A window of steps 2 to 4, of which the checkpoint is that of step 3; an episode that began before it."""
    sensitive = dict(guards__window=3, guards__warmup_steps=0, guards__gradient_norm_factor=0.0, guards__bias_range=0.0)
    loop.train(tiny_run.config(folder, "whole", **sensitive))
    config = tiny_run.config(folder, "in_two", **sensitive)

    def interrupt(number, batch):
        return batch if number < 6 else 1 / 0

    with monkeypatch.context() as patch:
        on_steps(patch, interrupt)
        with pytest.raises(ZeroDivisionError):
            loop.train(config)
    assert sorted(entry.name for entry in (folder / "in_two" / "checkpoints").iterdir()) == ["3"]
    loop.train(config)
    expected = events(folder / "whole")
    assert {("bias_saturation", 3), ("gradient_norm", 4)} <= {(event["guard"], event["step"]) for event in expected}
    assert events(folder / "in_two") == expected


def test_a_step_that_stalls_is_spoken_of_and_the_run_goes_on(folder, monkeypatch, capfd):
    """Step 6's data come once the watchdog has barked, or after a long time."""
    workdir = folder / "stalls"

    def wait(number, batch):
        end = time.monotonic() + AGES
        while number == 6 and not barked() and time.monotonic() < end:
            time.sleep(0.02)
        return batch

    def barked():
        """Over a step; a slow machine may have it bark over its compilation too."""
        return [event for event in events(workdir) if event["threshold"] == 1]

    on_steps(monkeypatch, wait)
    loop.train(tiny_run.config(folder, "stalls", guards__stall_seconds=1.0))
    event = barked()[-1]
    assert (event["guard"], event["action"]) == ("stall", "warn")
    assert event["value"] >= 1
    assert "in wait" in (workdir / "stacks_0.txt").read_text()
    assert "the run may hang; the stacks of all threads are in" in capfd.readouterr().err
    assert int(tiny_run.saved_state(workdir)["step"]) == 8


def test_events_after_the_checkpoint_are_cut_off(tmp_path):
    log = EventLog(tmp_path)
    assert not (tmp_path / "events.jsonl").exists()
    for step in (3, 4, 9):
        log.write(step, "drop_rate", "warn", "a sentence.", float("inf"), 0.3)
    assert events(tmp_path)[0] == dict(
        step=3, guard="drop_rate", action="warn", sentence="a sentence.", value=None, threshold=0.3
    )
    EventLog(tmp_path, resume_step=4).write(9, "disk", "warn", "another.", 1.0, 2.0)
    assert [(event["step"], event["guard"]) for event in events(tmp_path)] == [(3, "drop_rate"), (4, "drop_rate"), (9, "disk")]
    EventLog(tmp_path, resume_step=2)
    assert not (tmp_path / "events.jsonl").exists()


class Small:
    """Guards, checkpoints and a state of three numbers."""

    def __init__(self, folder, **guards):
        self.workdir, self.said = folder / "small", []
        self.config = tiny_run.config(folder, "small", **{f"guards__{name}": value for name, value in guards.items()})
        self.checkpoints = Checkpoints(self.workdir / "checkpoints")
        self.writer = MetricWriter(self.workdir, tensorboard=False)
        self.guarded = Guarded(self.config, Guards(self.config), self.checkpoints, self.writer, self.said.append, None)

    def save(self, step, *params):
        state = TrainState(jnp.int32(step), {"w": jnp.array(params, jnp.float32)}, {}, {})
        if self.guarded.may_save(step, state):
            self.checkpoints.save(step, state, {})
        return state


def tree(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("action", ["warn", "stop", "off"])
def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, action):
    small = Small(tmp_path, disk=action, disk_factor=2.0)
    with small.checkpoints:
        state = small.save(1, 1.0, 2.0, 3.0)
        small.checkpoints.wait()
        before, needed = tree(small.checkpoints.folder), 2 * 16  # three float32, the step
        monkeypatch.setattr(guarded, "free_bytes", lambda folder: needed)
        small.save(2, 4.0, 5.0, 6.0)
        small.checkpoints.wait()
        assert small.checkpoints.latest() == 2
        before = tree(small.checkpoints.folder)
        monkeypatch.setattr(guarded, "free_bytes", lambda folder: needed - 1)
        if action == "stop":
            with pytest.raises(
                TrainingError, match=r"; the run is stopped, last good checkpoint: .*/small/checkpoints/2; make room"
            ):
                small.save(3, 7.0, 8.0, 9.0)
        else:
            small.save(3, 7.0, 8.0, 9.0)
            assert len(small.said) == (action == "warn")
        assert small.checkpoints.latest() == (3 if action == "off" else 2)
        if action != "off":
            assert tree(small.checkpoints.folder) == before
            (event,) = events(small.workdir)
            assert (event["step"], event["guard"], event["action"]) == (3, "disk", action)
            assert (event["value"], event["threshold"]) == (31, 32)
            assert re.search(r"checkpoints has 0\.0 MB free and a checkpoint wants 0\.0 MB, so that none is", event["sentence"])
        restored, _ = small.checkpoints.restore(1, state)
        np.testing.assert_array_equal(restored.params["w"], [1, 2, 3])


def test_free_space_is_that_of_the_file_system(tmp_path):
    free = guarded.free_bytes(tmp_path / "not" / "there")
    now = os.statvfs(tmp_path)
    assert 0 < free <= now.f_blocks * now.f_frsize
    assert abs(free - now.f_bavail * now.f_frsize) < 0.1 * now.f_blocks * now.f_frsize


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value):
    small = Small(tmp_path, disk="off", non_finite="off")
    with small.checkpoints:
        small.save(1, 1.0, 2.0)
        message = (
            r"step 2: params/w of the state to be saved holds numbers that are not finite; the run is stopped, .*checkpoints/1;"
        )
        with pytest.raises(TrainingError, match=message):
            small.save(2, 1.0, float(value))
        assert small.checkpoints.latest() == 1


def barking(tmp_path, action="warn", seconds=10.0):
    """A watchdog whose thread is not started, and what it says and does."""
    said, ends = [], []
    return Watchdog(seconds, action, tmp_path, lambda *what: said.append(what), 7, ends.append), said, ends


def test_the_watchdog_speaks_once_a_stall_and_again_after_the_next(tmp_path):
    dog, said, ends = barking(tmp_path)
    dog.beat(8)
    start = time.monotonic()
    dog.check(start + 9)
    assert said == []
    for seconds in (11, 12, 500):
        dog.check(start + seconds)
    ((step, sentence, waited, allowed),) = said
    assert (step, allowed) == (8, 10)
    assert 10 <= waited <= 12
    assert sentence.startswith(
        "step 9 has not finished in 11.0 seconds, more than guards.stall_seconds allows (10.0): the run may hang"
    )
    dog.beat(9)
    dog.check(start + 500)
    assert [step for step, *_ in said] == [8, 9]
    assert ends == []


def test_the_watchdog_has_patience_with_what_takes_long(tmp_path):
    dog, said, _ = barking(tmp_path)
    long = 10 * LENIENCE
    dog.check(time.monotonic() + long - 1)
    assert said == []
    dog.check(time.monotonic() + long + 1)
    assert said[-1][1].startswith("step 8, which is compiled first, has not finished")
    dog.beat(8)
    with dog.patient("an evaluation"):
        dog.check(time.monotonic() + long - 1)
        assert len(said) == 1
        dog.check(time.monotonic() + long + 1)
        assert said[-1][1].startswith("an evaluation has not finished")
    dog.check(time.monotonic() + 11)
    assert said[-1][1].startswith("step 9 has not finished")


def test_the_watchdog_dumps_every_thread(tmp_path):
    dog, _, ends = barking(tmp_path, "stop")
    release, there = threading.Event(), threading.Event()

    def hangs_here():
        there.set()
        release.wait(AGES)

    thread = threading.Thread(target=hangs_here)
    thread.start()
    there.wait(AGES)
    dog.check(time.monotonic() + 1000)
    release.set()
    thread.join()
    stacks = (tmp_path / "stacks_0.txt").read_text()
    assert "in hangs_here" in stacks
    assert "in test_the_watchdog_dumps_every_thread" in stacks
    assert ends == [RUN_AGAIN]


def test_the_watchdog_ends_the_process_even_when_it_cannot_say_so(tmp_path, monkeypatch):
    dog, _, ends = barking(tmp_path / "gone", "stop")
    monkeypatch.setattr(dog, "_report", lambda *what: EventLog(tmp_path / "gone").write(1, "stall", "stop", "", 1.0, 1.0))
    with pytest.raises(FileNotFoundError):
        dog.check(time.monotonic() + 1000)
    assert ends == [RUN_AGAIN]


HANGS = """
import sys, time
from moe_jax.train.events import EventLog
from moe_jax.train.watchdog import Watchdog
log = EventLog(sys.argv[1])
report = lambda step, sentence, value, threshold: log.write(step, "stall", "stop", sentence, value, threshold)
with Watchdog(0.05, "stop", sys.argv[1], report) as dog:
    dog.beat(1)
    print("before")
    time.sleep(600)
"""


def test_stop_ends_a_process_whose_main_thread_hangs(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANGS, tmp_path], capture_output=True, text=True, check=False, timeout=AGES)
    assert done.returncode == RUN_AGAIN == 76
    assert done.stdout == "before\n"
    assert "step 2 has not finished in 0." in done.stderr
    assert "the process ends with status 76" in done.stderr
    assert 'File "<string>", line 10 in <module>' in done.stderr
    assert events(tmp_path)[0]["guard"] == "stall"
