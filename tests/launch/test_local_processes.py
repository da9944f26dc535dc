"""Real processes on this machine that train together: the numbers of one process, checkpoints for any number of them, and an end for all
when one dies.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny_run
from state_digest import digest
from tolerance import RELATIVE_TO_RMS

from moe_jax import processes

ROOT = pathlib.Path(__file__).parents[2]
# experts on all eight devices, so that the all-to-all crosses from process to process
SPREAD = dict(mesh__data=1, mesh__expert=8, model__moe__exchange="all_to_all", train__sample_tokens=0, train__tensorboard=False)
LONG = SPREAD | dict(train__steps=30, train__log_every=1, train__eval_every=15, train__checkpoint_every=4)
PEER_TIMEOUT = 10


def command(count, *arguments, **environment):
    """Arguments of subprocess.run and Popen for launch/local_processes.sh."""
    settings = tiny_run.command("train")
    environment = settings["env"] | {"PYTHON": sys.executable} | environment
    return settings | {"args": ["bash", "launch/local_processes.sh", str(count), *arguments], "env": environment}


def together(count, *arguments):
    return subprocess.run(**command(count, *arguments), capture_output=True, check=False)


def alone(folder, workdir, **changes):
    done = tiny_run.program("train", *tiny_run.flags(folder, workdir, **changes))
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_figures(workdir, expected):
    """Each logged step once, with the losses, norms and loads of the other run, in float32."""
    ours, theirs = (tiny_run.metrics(folder) for folder in (workdir, expected))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in ("train/loss", "train/gradient_norm", "eval/loss"):
            assert (name in mine) == (name in other)
            if name in mine:
                assert mine[name] == pytest.approx(other[name], rel=RELATIVE_TO_RMS["float32"]), (mine["step"], name)
        assert mine.get("router/load") == other.get("router/load")


def restored_by(count, workdir):
    """{name: digest} of the newest checkpoint's state as `count` processes restore it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = [sys.executable, str(pathlib.Path(__file__).with_name("state_digest.py")), str(workdir), address, str(count)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([*program, str(index)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for index in range(count)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    (line,) = [line for line in outputs[0].splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """Losses of one process with eight devices; what is written is written once; the state is restored by one process and by four."""
    tiny_run.write_corpus(tmp_path)
    alone(tmp_path, "alone", **SPREAD)
    done = together(2, *tiny_run.flags(tmp_path, "two", **SPREAD))
    assert done.returncode == 0, done.stderr
    assert_same_figures(tmp_path / "two", tmp_path / "alone")
    said = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert any(line.startswith("[0] mesh    data 1 x fsdp 1 x expert 8") for line in said)
    assert [line for line in said if line.startswith("[1]")] == []
    assert "[0] step 8/8 loss" in done.stderr
    assert not any(line.startswith(("[1] step", "[1] moe_jax.")) for line in done.stderr.splitlines())
    saved = tiny_run.saved_state(tmp_path / "two")
    position = saved.pop("data").item()
    expected = {name: digest(array) for name, array in saved.items()} | {"data": position}
    assert restored_by(4, tmp_path / "two") == expected


def of_process(parent, index):
    """The id of process `index` of a running launch/local_processes.sh."""
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_text().split("\0")
            status = (entry / "status").read_text()
        except OSError:
            continue  # it has ended
        if f"--process_id={index}" in arguments and f"PPid:\t{parent}\n" in status:
            return int(entry.name)
    raise AssertionError(f"no process {index} runs")


def wait_for_step(workdir, step, running):
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert running.poll() is None, running.communicate()[1][-6000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """One process, not interrupted, in the folder `straight`."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_run.write_corpus(folder)
    alone(folder, "straight", **LONG)
    return folder


@pytest.mark.faults
@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_that_dies_ends_the_others_which_go_on_as_one(long_run, victim):
    """Killed after a dozen steps: the other says so and ends within the bound; one process goes on and ends as if nothing had been."""
    workdir, other = long_run / f"killed_{victim}", 1 - victim
    arguments = [*tiny_run.flags(long_run, workdir.name, **LONG), f"--peer_timeout={PEER_TIMEOUT}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(**command(2, *arguments, LEAVE_RUNNING="1"), **pipes) as running:
        wait_for_step(workdir, 12, running)
        os.kill(of_process(running.pid, victim), signal.SIGKILL)
        out, err = running.communicate(timeout=PEER_TIMEOUT + 60)
    assert running.returncode == 128 + signal.SIGKILL
    assert f"== process {victim} ended with status {128 + signal.SIGKILL}\n" in out
    assert f"== process {other} ended with status {processes.RUN_AGAIN}\n" in out
    (sentence,) = [line for line in err.splitlines() if line.startswith(f"[{other}] error: ")]
    assert f"another process of this run of 2 is gone, or was not heard of for {PEER_TIMEOUT} seconds" in sentence
    assert f"process {other} stops" in sentence
    assert "continuing from step " in alone(long_run, workdir.name, **LONG)
    assert_same_figures(workdir, long_run / "straight")


@pytest.mark.faults
def test_processes_along_the_tensor_axis_read_the_same_rows(long_run):
    """One device each, heads and hidden widths split between them; a sample at the end, too."""
    mesh = dict(mesh__emulate=2, mesh__data=1, mesh__expert=1, mesh__tensor=2, train__tensorboard=False)
    alone(long_run, "tensor_alone", **mesh)
    done = together(2, *tiny_run.flags(long_run, "tensor", **mesh))
    assert done.returncode == 0, done.stderr
    assert_same_figures(long_run / "tensor", long_run / "tensor_alone")
    assert (long_run / "tensor" / "sample.txt").read_text() == (long_run / "tensor_alone" / "sample.txt").read_text()


@pytest.mark.faults
def test_a_process_that_fails_alone_is_told_by_its_own_words(long_run):
    """Its error and status are kept, and the script stops the others."""
    fails = "import runpy, sys; from moe_jax.train import loop; sys.argv = ['launch.train', *sys.argv[2:]]\n"
    fails += "def no(*_, **__): raise OSError('the disk of this host is gone')\n"
    fails += "if '--process_id=1' in sys.argv: loop.evaluate = no\n"
    fails += "runpy.run_module('launch.train', run_name='__main__', alter_sys=True)"
    interpreter = long_run / "python"
    interpreter.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nshift\nexec {sys.executable} -c "{fails}" "$@"\n'
    )
    interpreter.chmod(0o755)
    arguments = [*tiny_run.flags(long_run, "fails", **SPREAD), f"--peer_timeout={PEER_TIMEOUT}"]
    settings = command(2, *arguments, PYTHON=str(interpreter))
    done = subprocess.run(**settings, capture_output=True, check=False, timeout=600)
    assert done.returncode == 1
    assert "[1] OSError: the disk of this host is gone" in done.stderr
    assert "== process 1 ended with status 1\n== stopping the others\n" in done.stdout


@pytest.mark.faults
def test_processes_that_see_other_data_do_not_begin(long_run):
    """Both refuse with the sentence of the one that differs or the other's end; nothing is written."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for index, seed in enumerate((0, 1)):
        arguments = tiny_run.flags(long_run, "apart", **SPREAD, train__seed=seed)
        place = [f"--coordinator={address}", "--num_processes=2", f"--process_id={index}", f"--peer_timeout={PEER_TIMEOUT}"]
        settings = tiny_run.command("train", *arguments, *place)
        started.append(subprocess.Popen(**settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    (_, _), (_, err) = [process.communicate(timeout=600) for process in started]
    assert started[1].returncode == 2
    assert started[0].returncode == processes.RUN_AGAIN
    assert "error: train.seed is 1 in process 1 and 0 in process 0; all processes need the same command" in err
    assert not (long_run / "apart").exists()


@pytest.mark.faults
def test_slurm_runs_two_tasks(long_run, tmp_path):
    """The job script with a stand-in for srun that starts two tasks, as Slurm describes them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "srun").write_text(
        "#!/usr/bin/env bash\nshift\nfor task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task"
        " SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1"
        f' JAX_COORDINATOR_PORT={port} "$@" & done\nwait -n && wait -n\n'
    )
    (tmp_path / "srun").chmod(0o755)
    settings = command(2)
    settings["args"] = ["bash", "launch/slurm.sbatch", *tiny_run.flags(long_run, "slurm", **SPREAD)]
    settings["env"] |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(**settings, capture_output=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads((long_run / "slurm" / "versions.json").read_text())["process_count"] == 2
    assert "launch.train ended with status 0 (start 1)" in done.stdout
