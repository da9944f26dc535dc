"""SIGTERM and Ctrl-C to `python -m launch.ablate`: the run under way saves its step, no other is begun, the same command goes on."""

import re
import signal
import subprocess
import time

import pytest
import tiny_run

pytestmark = pytest.mark.faults
WAIT_SECONDS = 600  # ends a hang
STEPS = 400
POINTS = {"moe": {}, "dense": {"model.moe.num_experts": 0, "model.moe.first_dense": 0}}
CHANGES = dict(mesh__data=1, mesh__expert=1, mesh__emulate=1, train__steps=STEPS, train__checkpoint_every=STEPS)
CHANGES |= dict(train__eval_every=STEPS, train__log_every=1, train__accumulation=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_sweep_told_to_stop_saves_the_step_of_its_run_and_goes_on(tmp_path, number):
    tiny_run.write_corpus(tmp_path)
    fields = tiny_run.fields(tmp_path, "unused", **CHANGES)
    tiny_run.write_sweep(tmp_path / "two.py", fields, POINTS)
    arguments = ["ablate", f"--config={tmp_path / 'two.py'}", f"--workdir={tmp_path / 'all'}", "--seeds=1"]
    run, log = tmp_path / "all" / "moe" / "seed_0", tmp_path / "all" / "moe" / "seed_0.log"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(**tiny_run.command(*arguments), **pipes) as sweep:
        until(lambda: steps_of(run) >= 3, sweep)
        sweep.send_signal(number)
        out, err = sweep.communicate(timeout=WAIT_SECONDS)
    assert sweep.returncode == 128 + number, err
    (saved,) = re.findall(rf"^{number.name}: stopped after step (\d+), whose checkpoint is in {run};", log.read_text(), re.M)
    assert [entry.name for entry in (run / "checkpoints").iterdir()] == [saved]
    assert 3 <= int(saved) < STEPS
    last = err.splitlines()[-1]
    assert last.startswith(
        f"{number.name}: passed on to 1/2 moe seed 0, which ended with status {128 + number} and said last: "
    )
    assert last.endswith(". Run the same command again to go on.")
    assert "failed" not in out
    assert not (tmp_path / "all" / "dense").exists()
    done = tiny_run.program(*arguments, "--points=moe", "--keep_checkpoints")
    assert done.returncode == 0, done.stderr
    assert f"continuing from step {saved} of {run}" in log.read_text()
    assert [line["step"] for line in tiny_run.metrics(run)] == list(range(1, STEPS + 1))


def steps_of(workdir):
    metrics = workdir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def until(condition, process):
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
