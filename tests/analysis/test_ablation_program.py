"""`python -m launch.ablate` as a user meets it: two points, one of them interrupted before; then another seed."""

import json
import re

import pytest
import tiny_run

POINTS = {"moe": {"model.moe.num_experts": 4}, "dense": {"model.moe.num_experts": 0}}
SMALL = {
    "mesh__data": 1,
    "mesh__expert": 1,
    "mesh__emulate": 1,
    "train__accumulation": 1,
    "train__steps": 4,
    "train__eval_every": 4,
}


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """(folder, what the first start with one seed said, what the second said); `dense` was there up to step 2."""
    folder = tmp_path_factory.mktemp("ablate")
    write_sweep(folder)
    begun = folder / "all" / "dense" / "seed_0"
    changes = ["model.moe.num_experts=0", "train.keep_checkpoints=1", "train.sample_tokens=0", "train.tensorboard=False"]
    changes += [f"workdir={begun}", "train.steps=2"]
    done = tiny_run.program("train", f"--config={folder / 'two.py'}", *(f"--config.{change}" for change in changes))
    assert done.returncode == 0, done.stderr
    config = json.loads((begun / "config.json").read_text())
    config["train"]["steps"] = 4
    (begun / "config.json").write_text(json.dumps(config))
    return folder, ablate(folder, "--seeds=1"), ablate(folder, "--seeds=1")


def write_sweep(folder, points=POINTS):
    tiny_run.write_corpus(folder)
    fields = tiny_run.fields(folder, "unused", **SMALL)
    tiny_run.write_sweep(folder / "two.py", fields, points)


def ablate(folder, *arguments, config="two.py"):
    return tiny_run.program("ablate", f"--config={folder / config}", f"--workdir={folder / 'all'}", *arguments)


def runs_of(done):
    """What was said of each run, without its time."""
    lines = [line.split(": ", 1) for line in done.stdout.splitlines() if re.match(r"\d+/\d+ ", line)]
    return {head: "before" if rest.startswith("finished before,") else "now" for head, rest in lines}


@pytest.mark.slow
def test_every_run_is_made(ablated):
    folder, first, _ = ablated
    assert first.returncode == 0, first.stderr
    assert list(runs_of(first)) == ["1/2 moe seed 0", "2/2 dense seed 0"]
    for point, experts in (("moe", 4), ("dense", 0)):
        run = folder / "all" / point / "seed_0"
        config = json.loads((run / "config.json").read_text())
        assert (config["model"]["moe"]["num_experts"], config["train"]["seed"]) == (experts, 0)
        assert config["train"]["sample_tokens"] == 0
        assert [line["step"] for line in tiny_run.metrics(run)] == [2, 4]
        assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on(ablated):
    folder, *_ = ablated
    assert "continuing from step 2" in (folder / "all" / "dense" / "seed_0.log").read_text()
    assert "continuing" not in (folder / "all" / "moe" / "seed_0.log").read_text()


@pytest.mark.slow
def test_the_second_start_trains_nothing_and_says_the_same(ablated):
    _, first, second = ablated
    assert second.returncode == 0, second.stderr
    assert set(runs_of(second).values()) == {"before"}
    assert second.stdout[second.stdout.index("# Ablation") :] == first.stdout[first.stdout.index("# Ablation") :]


@pytest.mark.slow
def test_another_sweep_in_the_same_folder_is_refused(ablated):
    folder, *_ = ablated
    before = sorted(path for path in (folder / "all").rglob("*"))
    done = ablate(folder, "--seeds=1", "--config.optimizer.learning_rate=0.5")
    refused(done, "moe/seed_0 holds a run with optimizer.learning_rate = 0.001, and the sweep now says 0.5; set it back")
    assert sorted(path for path in (folder / "all").rglob("*")) == before


@pytest.mark.slow
def test_more_seeds_are_added_to_what_is_there(ablated):
    """All points of a seed before the next; the table is of all runs."""
    folder, *_ = ablated
    done = ablate(folder, "--seeds=2")
    assert done.returncode == 0, done.stderr
    names = ["1/4 moe seed 0", "2/4 dense seed 0", "3/4 moe seed 1", "4/4 dense seed 1"]
    assert runs_of(done) == dict(zip(names, ["before", "before", "now", "now"], strict=True))
    losses = {
        point: [tiny_run.metrics(folder / "all" / point / f"seed_{seed}")[-1]["eval/loss"] for seed in (0, 1)]
        for point in ("moe", "dense")
    }
    assert losses["moe"][0] != losses["moe"][1]
    rows = [line.split("|") for line in (folder / "all" / "table.md").read_text().splitlines() if line.startswith("|")]
    rows = {row[1].strip(): [cell.strip() for cell in row[2:]] for row in rows}
    assert rows["moe"][1] == f"{sum(losses['moe']) / 2:.4f}"
    assert rows["moe"][4] == "reference"
    difference = (losses["dense"][0] - losses["moe"][0] + losses["dense"][1] - losses["moe"][1]) / 2
    assert rows["dense"][2] == f"{difference:+.4f}"


def refused(done, sentence):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--points=moe,dens"], "--points: 'dens' is not a point of the sweep; did you mean 'dense'?"),
        pytest.param(["--index=4", "--seeds=2"], "--index = 4 is past the last of the 4 runs, 3.", marks=pytest.mark.slow),
        pytest.param(["--table"], "has no finished run to compare", marks=pytest.mark.slow),
        pytest.param(
            ["--config.model.moe.router.top_k=5"],
            "sweep point 'moe': model.moe.router.top_k = 5 is more",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_run_is_one_sentence(tmp_path, arguments, sentence):
    write_sweep(tmp_path)
    refused(ablate(tmp_path, *arguments), sentence)
    assert not (tmp_path / "all").exists()


@pytest.mark.slow
def test_a_config_without_a_sweep_is_one_sentence(tmp_path):
    write_sweep(tmp_path)
    text = (tmp_path / "two.py").read_text()
    (tmp_path / "none.py").write_text(text[: text.index("def sweep")])
    refused(ablate(tmp_path, config="none.py"), "none.py has no sweep(add) that names the points")
    assert not (tmp_path / "all").exists()


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    """A learning rate that breaks the first point alone, within fewer steps than may be skipped."""
    fails = {"optimizer.learning_rate": 1e38, "guards.skip_steps": 0}
    write_sweep(tmp_path, points=POINTS | {"moe": fails})
    done = ablate(tmp_path, "--seeds=1")
    assert done.returncode == 1
    assert "1/2 moe seed 0: " in done.stdout
    assert "failed with status 2: error: step" in done.stdout
    assert "1 of 2 runs failed; their logs say why." in done.stderr
    table = (tmp_path / "all" / "table.md").read_text()
    assert "| dense | 1 |" in table
    assert "`moe` seed 0: not finished; it said last: error: step" in table


@pytest.mark.slow
def test_one_run_of_a_job_array(tmp_path):
    write_sweep(tmp_path)
    done = ablate(tmp_path, "--seeds=2", "--index=3", "--keep_checkpoints")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "all").rglob("seed_?")) == ["seed_1"]
    assert (tmp_path / "all" / "dense" / "seed_1" / "checkpoints").is_dir()
    assert not (tmp_path / "all" / "table.md").exists()
    done = ablate(tmp_path, "--table")
    assert done.returncode == 0, done.stderr
    assert "`moe`: not run." in done.stdout
