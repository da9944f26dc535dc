"""kill -9 during training, the same command again: the run that was never killed, to the bit."""

import signal
import subprocess
import time

import pytest
import tiny_run

pytestmark = pytest.mark.slow
LONGER = dict(train__steps=40, train__log_every=1, train__checkpoint_every=4, train__eval_every=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One uninterrupted run, in `folder`/straight."""
    folder = tmp_path_factory.mktemp("kill")
    tiny_run.write_corpus(folder)
    done = tiny_run.program("train", *tiny_run.flags(folder, "straight", **LONGER))
    assert done.returncode == 0, done.stderr
    return folder


def kill_when(folder, workdir, happened):
    """Runs the command and kills it once `happened(checkpoints folder)`; returns the steps of the checkpoints it left."""
    checkpoints = folder / workdir / "checkpoints"
    command = tiny_run.command("train", *tiny_run.flags(folder, workdir, **LONGER))
    with subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not happened(checkpoints):
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    return sorted(entry.name for entry in checkpoints.iterdir()) if checkpoints.exists() else []


def finish(folder, workdir):
    done = tiny_run.program("train", *tiny_run.flags(folder, workdir, **LONGER))
    assert done.returncode == 0, done.stderr
    tiny_run.assert_same_run(folder / workdir, folder / "straight")
    assert [line["step"] for line in tiny_run.metrics(folder / workdir)] == list(range(1, 41))
    return done.stdout


def complete(name):
    return lambda checkpoints: (checkpoints / name).is_dir()


def in_a_save_after(name):
    """A temporary folder of Orbax's stands beside the finished checkpoint `name`."""

    def happened(checkpoints):
        return complete(name)(checkpoints) and any("tmp" in entry.name for entry in checkpoints.iterdir())

    return happened


def logged(step):
    """Steps are being taken, and no checkpoint need be there."""

    def happened(checkpoints):
        metrics = checkpoints.parent / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") >= step

    return happened


def test_killed_between_checkpoints_and_in_a_save(folder):
    kill_when(folder, "twice", complete("8"))
    left = kill_when(folder, "twice", in_a_save_after("16"))
    assert "16" in left
    assert "continuing from step " in finish(folder, "twice")
    assert sorted(entry.name for entry in (folder / "twice" / "checkpoints").iterdir() if "tmp" in entry.name) == []


@pytest.mark.faults  # beside its fifty kills, some of them this early
def test_killed_before_the_first_checkpoint(folder):
    left = kill_when(folder, "early", logged(2))
    out = finish(folder, "early")
    assert ("continuing" in out) == any(name.isdigit() for name in left)
