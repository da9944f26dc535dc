"""A run whose disk fills after a checkpoint: a sentence, status 2, and from that checkpoint on once there is room, to the bit."""

import subprocess
import sys

import pytest
import tiny_run

pytestmark = pytest.mark.faults

# launch.train whose disk fills after the checkpoint of step 3: writes fail, or the system says that there is no room.
WRITES_FAIL = """
def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
"""
NO_ROOM = """
def fill():
    guarded.free_bytes = lambda folder: 1000
"""
PROGRAM = """
import resource, runpy, sys
from moe_jax.train import guarded
from moe_jax.train.checkpoint import Checkpoints

save = Checkpoints.save

def save_and_fill(self, step, *rest):
    save(self, step, *rest)
    self.wait()
    fill()

Checkpoints.save = save_and_fill
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""
SAID = {
    WRITES_FAIL: "cannot be written any more (File too large). The checkpoint of step 3 is whole; make room and run the same",
    NO_ROOM: "checkpoints has 0.0 MB free and a checkpoint wants 0.2 MB, so that none is written; the run is stopped, last good",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run whose disk never fills, in `folder`/straight."""
    folder = tmp_path_factory.mktemp("disk")
    tiny_run.write_corpus(folder)
    done = tiny_run.program("train", *tiny_run.flags(folder, "straight", train__log_every=1))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("fill", [WRITES_FAIL, NO_ROOM], ids=["writes_fail", "no_room"])
def test_a_run_goes_on_from_the_checkpoint_before_the_disk_was_full(folder, request, fill):
    name = request.node.callspec.id
    arguments = tiny_run.flags(folder, name, train__log_every=1)
    command = tiny_run.command("train", *arguments)
    command["args"] = [sys.executable, "-c", fill + PROGRAM, *arguments]
    done = subprocess.run(**command, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert SAID[fill] in sentence
    assert "in _target_setting_result" not in done.stderr, "stacks of Orbax's threads drown the sentence"
    done = tiny_run.program("train", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"continuing from step 3 of {folder / name}" in done.stdout
    tiny_run.assert_same_run(folder / name, folder / "straight")
    assert [line["step"] for line in tiny_run.metrics(folder / name)] == list(range(1, 9))
