"""A SIGTERM to one of two processes: both stop after the same step, and what goes on is the run that nothing stopped."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny_run

pytestmark = pytest.mark.faults
STEPS, WAIT_SECONDS = 300, 900


def start(folder, workdir):
    """Two processes of four devices; each prints into a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = tiny_run.command("train")
    path = os.pathsep.join([str(tiny_run.ROOT), str(tiny_run.ROOT / "tests")])
    program = pathlib.Path(__file__).with_name("one_of_several.py")
    for process in range(2):
        arguments = [sys.executable, program, str(process), "2", str(port), str(folder), workdir]
        with (folder / f"{workdir}.{process}.log").open("w") as said:
            yield subprocess.Popen(
                arguments, cwd=tiny_run.ROOT, env=command["env"] | {"PYTHONPATH": path}, stdout=said, stderr=said
            )


def said(folder, workdir):
    return [(folder / f"{workdir}.{process}.log").read_text() for process in range(2)]


def run(folder, workdir, stop=False):
    """Exit statuses of both; with `stop` the second one is told to once steps are taken."""
    metrics = folder / workdir / "metrics.jsonl"
    processes = list(start(folder, workdir))
    try:
        end = time.monotonic() + WAIT_SECONDS
        while stop and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert all(process.poll() is None for process in processes), said(folder, workdir)
            assert time.monotonic() < end
            time.sleep(0.01)
        if stop:
            processes[1].send_signal(signal.SIGTERM)
        return [process.wait(WAIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_both_stop_after_the_same_step_and_go_on_to_the_bit(tmp_path):
    tiny_run.write_corpus(tmp_path)
    assert run(tmp_path, "straight") == [0, 0], said(tmp_path, "straight")
    assert run(tmp_path, "stopped", stop=True) == [143, 143], said(tmp_path, "stopped")
    steps = {re.search(r"SIGTERM: stopped after step (\d+), whose", text)[1] for text in said(tmp_path, "stopped")}
    assert len(steps) == 1
    assert int(steps.pop()) == tiny_run.metrics(tmp_path / "stopped")[-1]["step"] < STEPS
    assert run(tmp_path, "stopped") == [0, 0], said(tmp_path, "stopped")
    tiny_run.assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    assert [line["step"] for line in tiny_run.metrics(tmp_path / "stopped")] == list(range(1, STEPS + 1))
