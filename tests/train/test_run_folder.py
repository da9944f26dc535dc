"""A run folder that cannot be written: told before anything is compiled, or in one sentence when the disk fills."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_run

from moe_jax.train import loop, run_folder
from moe_jax.train.run_folder import OutputError


@pytest.mark.parametrize("name", ["absent/deep/run", "there"])
def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path, name):
    (tmp_path / "there" / "checkpoints").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    run_folder.check(str(tmp_path / name))
    assert sorted(tmp_path.rglob("*")) == before


def test_something_else_in_the_way_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            OutputError, match=r"workdir = '.*' needs a folder at '.*/file', where there is none but something else"
        ):
            run_folder.check(str(workdir))
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"needs a file at '.*config\.json'"):
        run_folder.check(str(tmp_path / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").write_text("")
    with pytest.raises(OutputError, match=r"needs a folder at '.*checkpoints'"):
        run_folder.check(str(tmp_path / "other"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"needs a folder at '.*link'"):
        run_folder.check(str(tmp_path / "link"))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["long", "nul"])
def test_what_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(OutputError, match=r"cannot be written \(.*\); give a folder where you may write"):
        run_folder.check(str(tmp_path / name))


@pytest.mark.skipif(not pathlib.Path("/proc/self").is_dir(), reason="a folder of the system's that nobody may write to")
def test_a_read_only_place_is_refused_before_anything_is_made():
    with pytest.raises(OutputError, match=r"workdir = '/proc/runs/one' cannot be written \(/proc: .*\); give a folder"):
        run_folder.check("/proc/runs/one")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_or_read_only_folder_is_refused_before_the_corpus_is_read(tmp_path, monkeypatch, code):
    (tmp_path / "run").mkdir()

    def refuse(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match=rf"cannot be written \(.*/run: {os.strerror(code)}\); give a folder"):
        loop.train(tiny_run.config(tmp_path))  # there is no corpus either
    assert list((tmp_path / "run").iterdir()) == []


def test_a_disk_that_fills_later_is_one_sentence_with_the_last_whole_checkpoint():
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")
    told = {6: r"\. The checkpoint of step 6 is whole; make room", None: r"\. There is no checkpoint yet; make room and run"}
    for last, words in told.items():
        with pytest.raises(OutputError, match=rf"any more \(runs/x/metrics\.jsonl: No space left on device\){words}"):
            raise_inside(full, last)


def raise_inside(error, last=None):
    with run_folder.writing("runs/x", lambda: last):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone"), ValueError("shapes"), ValueError("os_error_code='2'")]
)
def test_faults_of_ours_keep_their_traceback(error):
    with pytest.raises(type(error)) as kept:
        raise_inside(error)
    assert kept.value is error


FILLS = """
import resource, sys
import jax.numpy as jnp, numpy as np
from moe_jax.train import run_folder
from moe_jax.train.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1] + "/checkpoints")
checkpoints.save(1, {"w": jnp.ones(3)}, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
noise = np.random.default_rng(0).normal(size=(256, 256))
try:
    with run_folder.writing(sys.argv[1], checkpoints.latest):
        checkpoints.save(2, {"w": noise}, {})
        checkpoints.wait()
except run_folder.OutputError as error:
    print(error)
checkpoints.close()
"""


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(tmp_path):
    """A limit on the size of files stands in for the full disk: the same call fails in the same place."""
    command = [sys.executable, "-c", FILLS, str(tmp_path)]
    done = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, text=True, check=True)
    assert f"workdir = {str(tmp_path)!r} cannot be written any more (File too large)" in done.stdout
    assert "The checkpoint of step 1 is whole; make room and run the same command again to go on." in done.stdout


@pytest.mark.faults
def test_a_run_whose_disk_fills_ends_with_a_sentence_and_goes_on_when_there_is_room(tmp_path):
    tiny_run.write_corpus(tmp_path)
    command = tiny_run.command("train", *tiny_run.flags(tmp_path))
    command["args"] = ["bash", "-c", 'ulimit -f 40; exec "$@"', "limited", *command["args"]]  # kilobytes a file
    done = subprocess.run(**command, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: workdir = ")
    assert "cannot be written any more (File too large). There is no checkpoint yet" in sentence
    assert tiny_run.program("train", *tiny_run.flags(tmp_path)).returncode == 0
    assert [line["step"] for line in tiny_run.metrics(tmp_path / "run")] == [2, 4, 6, 8]
