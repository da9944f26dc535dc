"""Recording, replaying and comparing as a user does it."""

import json

import numpy as np
import pytest
import tiny_run

from moe_jax.train import loop, observation
from moe_jax.train.routing_log import RoutingLog


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run in `folder`/run, and an evaluation of it on eight devices with its record in `folder`/eight.rec."""
    folder = tmp_path_factory.mktemp("routing")
    tiny_run.write_corpus(folder)
    loop.train(tiny_run.config(folder, train__record=str(folder / "train.rec")))
    done = evaluated(folder, "--record={}/eight.rec")
    assert done.returncode == 0, done.stderr
    assert f"record  routing in {folder / 'eight.rec'}" in done.stdout
    return folder


def evaluated(folder, *arguments):
    return tiny_run.program("evaluate", f"--workdir={folder / 'run'}", *(argument.format(folder) for argument in arguments))


def figures(folder):
    return json.loads((folder / "run" / "evaluation-8.json").read_text())


@pytest.mark.slow
def test_an_evaluation_on_one_device_follows_the_choices_of_eight(folder):
    expected = figures(folder)
    done = evaluated(folder, "--mesh=data=1,emulate=1", "--replay={}/eight.rec", "--replay_weights", "--record={}/one.rec")
    assert done.returncode == 0, done.stderr
    assert f"replay  choices of {folder / 'eight.rec'}, with recorded weights" in done.stdout
    assert figures(folder)["eval/load"] == expected["eval/load"]
    assert figures(folder)["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-6)
    one, eight = RoutingLog(folder / "one.rec"), RoutingLog(folder / "eight.rec")
    assert one.keys == eight.keys
    assert one.header == eight.header
    assert one.read("eval/code/0").weight_BSLM.tobytes() == eight.read("eval/code/0").weight_BSLM.tobytes()


@pytest.mark.slow
def test_an_observation_on_one_device_is_that_of_the_run(folder):
    done = evaluated(folder, "--mesh=data=1,emulate=1", "--observe={}/one.npz")
    assert done.returncode == 0, done.stderr
    one, run = observation.load(folder / "one.npz"), observation.load(observation.path_of(folder / "run", 8))
    assert one.about == run.about
    for name, array in run.arrays().items():
        if array.dtype.kind != "f":
            np.testing.assert_array_equal(one.arrays()[name], array, err_msg=name)


@pytest.mark.slow
def test_compare_routing_prints_a_table_and_writes_it(folder):
    paths = [str(folder / "eight.rec")] * 2
    done = tiny_run.program("compare_routing", *paths, f"--out={folder / 'compared.json'}")
    assert done.returncode == 0, done.stderr
    assert f"A  {paths[0]}: workdir {folder / 'run'}, step 8; router deepseek, 8 experts, 2 batches" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["all", "1", "1", "1", "0", "1"]
    rows = json.loads((folder / "compared.json").read_text())
    assert [row["layer"] for row in rows] == [1, "all"]


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        pytest.param("evaluate", ["--replay={}/train.rec"], "has no eval/code/0: it has train/1 to", marks=pytest.mark.slow),
        pytest.param("evaluate", ["--rows=2", "--replay={}/eight.rec"], "was made of other data", marks=pytest.mark.slow),
        pytest.param("evaluate", ["--replay_weights"], "--replay_weights is given without --replay", marks=pytest.mark.slow),
        ("compare_routing", ["{}/train.rec", "{}/eight.rec"], "have no batch in common"),
        pytest.param("compare_routing", ["{}/eight.rec", "{}/no.rec"], "no.rec' is not a file", marks=pytest.mark.slow),
    ],
)
def test_what_does_not_fit_is_one_sentence(folder, program, arguments, sentence):
    arguments = [argument.format(folder) for argument in arguments]
    done = tiny_run.program(program, *([f"--workdir={folder / 'run'}"] if program == "evaluate" else []), *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr


def test_compare_routing_wants_two_files(folder):
    done = tiny_run.program("compare_routing", str(folder / "eight.rec"))
    assert done.returncode != 0
    assert "B is missing." in done.stdout + done.stderr
