"""launch.convert as a user meets it: a checkpoint to a run, a sample from it, and back; refusals."""

import os
import signal
import subprocess
import time

import pytest
import tiny_hf
import tiny_run

EMULATED = "--mesh=data=2,expert=4,emulate=8"


@pytest.mark.slow
def test_a_checkpoint_becomes_a_run_that_samples_and_goes_back(tmp_path):
    hf = tiny_hf.write(tmp_path / "hf", "deepseek_v3")
    done = tiny_run.program("convert", "from_hf", f"--hf={hf}", f"--workdir={tmp_path / 'run'}", EMULATED, "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert f"is step 0 of {tmp_path / 'run'}" in done.stdout
    texts = []
    for place in (tmp_path / "run", f"hf:{hf}"):
        sampled = tiny_run.program("sample", f"--workdir={place}", "--mesh=data=1", "--prompt=the red", "--num_tokens=3")
        assert sampled.returncode == 0, sampled.stderr
        assert sampled.stdout.startswith("the red")
        texts.append(sampled.stdout)
    assert texts[0] == texts[1]
    back = ["to_hf", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'back'}", f"--original={hf}"]
    done = tiny_run.program("convert", *back)
    assert done.returncode == 0, done.stderr
    tiny_hf.assert_same(tmp_path / "back", hf)


@pytest.mark.slow
def test_a_killed_conversion_goes_on(tmp_path):
    """Killed without warning once a layer is written down."""
    hf = tiny_hf.write(tmp_path / "hf", num_hidden_layers=24)
    arguments = ["convert", "from_hf", f"--hf={hf}", f"--workdir={tmp_path / 'run'}", EMULATED]
    finished = tmp_path / "run" / "conversion" / "finished"
    process = subprocess.Popen(**tiny_run.command(*arguments))
    while process.poll() is None and not (finished.is_file() and len(finished.read_text().split()) > 3):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "checkpoints" / "0").exists()
    before = finished.read_text().split()
    assert 3 < len(before) < 25
    done = tiny_run.program(*arguments)
    assert done.returncode == 0, done.stderr
    done = tiny_run.program(
        "convert", "to_hf", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'back'}", f"--original={hf}"
    )
    assert done.returncode == 0, done.stderr
    tiny_hf.assert_same(tmp_path / "back", hf)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["from_hf", "--workdir={}/run"], "--hf is missing"),
        pytest.param(["from_hf", "--workdir={}/run", "--hf={}/none"], "config.json is not there", marks=pytest.mark.slow),
        pytest.param(
            ["there", "--workdir={}/run"], "'there' is no conversion; these are: from_hf, to_hf", marks=pytest.mark.slow
        ),
        pytest.param(["to_hf", "--workdir={}/run", "--hf={}/out"], "holds no run", marks=pytest.mark.slow),
    ],
)
def test_refusals_are_one_sentence(tmp_path, arguments, sentence):
    done = tiny_run.program("convert", *(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
