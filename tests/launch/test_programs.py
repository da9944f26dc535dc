"""The programs as a user meets them: train, evaluate, sample, score; one sentence and status 2 where something is wrong."""

import json
import re
import subprocess

import jax
import numpy as np
import pytest
import tiny_run
from flax import nnx

from moe_jax.config import MeshConfig
from moe_jax.mesh import data_shards, shard_batch
from moe_jax.train import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, what launch.train said) of one small run in `folder`/run."""
    folder = tmp_path_factory.mktemp("programs")
    tiny_run.write_corpus(folder)
    return folder, tiny_run.program("train", *tiny_run.flags(folder))


def logged(folder):
    return tiny_run.metrics(folder / "run")[-1]


def table_row(printed, name):
    return next(line.split() for line in printed.splitlines() if line.split()[:1] == [name])


def test_train_says_what_it_does_and_learned(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    for start in (
        "model ",
        "experts 8 per layer",
        "mesh    data 2 x fsdp 1 x expert 4 x tensor 1 on 8 emulated",
        "data ",
        "run ",
    ):
        assert any(line.startswith(start) for line in done.stdout.splitlines()), start
    assert f"Everything is in {folder / 'run'}/" in done.stdout
    assert table_row(done.stdout, "all")[1] == f"{logged(folder)['eval/loss']:.4f}"
    assert "step 8/8 loss" in done.stderr
    assert "Traceback" not in done.stderr
    assert "WARNING" not in done.stderr


@pytest.mark.parametrize(
    "mesh",
    [
        [],
        ["--mesh=data=1,emulate=1"],
        pytest.param(["--mesh=data=1,expert=8,emulate=8"], marks=pytest.mark.slow),
        pytest.param(["--mesh=data=1,fsdp=2,expert=2,tensor=2,emulate=8"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_evaluate_gives_the_loss_of_training_on_any_mesh(trained, mesh):
    folder, _ = trained
    done = tiny_run.program("evaluate", f"--workdir={folder / 'run'}", *mesh)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "WARNING" not in done.stderr
    assert f"step 8 of {folder / 'run'}" in done.stdout
    written = json.loads((folder / "run" / "evaluation-8.json").read_text())
    figures = [name for name in written if name.endswith(("loss", "perplexity", "bits_per_byte"))]
    assert len(figures) == 9
    for name in figures:
        assert written[name] == pytest.approx(logged(folder)[name], rel=1e-5), name
    assert written["eval/load"] == logged(folder)["eval/load"]
    assert table_row(done.stdout, "prose")[1] == f"{written['eval/prose/loss']:.4f}"
    assert table_row(done.stdout, "layer")[-1] == "e7"


@pytest.mark.slow
def test_evaluate_takes_an_earlier_checkpoint_and_other_rows(trained):
    folder, _ = trained
    done = tiny_run.program("evaluate", f"--workdir={folder / 'run'}", "--step=3", "--rows=2")
    assert done.returncode == 0, done.stderr
    written = json.loads((folder / "run" / "evaluation-3.json").read_text())
    assert sum(written["eval/load"][0]) < sum(logged(folder)["eval/load"][0])
    assert written["eval/loss"] > logged(folder)["eval/loss"]


SAMPLE = ["--prompt=x1 =", "--prompt=the red", "--temperature=0", "--num_tokens=4"]
LINE = "-" * 80 + "\n"


def test_sample_continues_every_prompt_and_prints_text_as_it_is_made(trained):
    """Every step of the generator writes a bar here: the first prompt's characters come between them, the second's wait."""
    folder, _ = trained
    noting = """
import runpy
from moe_jax.models.generator import Generator
step = Generator.step
Generator.step = lambda self: (print("|", end="", flush=True), step(self))[1]
runpy.run_module("launch.sample", run_name="__main__")
"""
    sample = tiny_run.command("sample", f"--workdir={folder / 'run'}", *SAMPLE)
    sample["args"] = [*sample["args"][:1], "-c", noting, *sample["args"][3:]]
    done = subprocess.run(**sample, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    first, second, rest = done.stdout.split(LINE)
    assert re.fullmatch(r"x1 =[^|]\|[^|]\|[^|]\|[^|]\n", first), done.stdout
    assert re.fullmatch(r"the red[^|]{4}\n", second), done.stdout
    assert rest == ""


@pytest.mark.slow
def test_greedy_samples_are_the_same_on_one_device_and_alone(trained):
    folder, _ = trained
    arguments = (SAMPLE, [*SAMPLE, "--mesh=data=1,emulate=1"], [*SAMPLE[1:], "--cache_dtype=bfloat16"])
    both, on_one, alone = (tiny_run.program("sample", f"--workdir={folder / 'run'}", *those).stdout for those in arguments)
    assert on_one == both != ""
    assert alone == both.split(LINE)[1] + LINE


@pytest.mark.slow
def test_seeds_and_stops_of_samples(trained):
    folder, _ = trained

    def answers(*arguments):
        drawn = ["--prompt=a", "--prompt=a", "--num_tokens=12", "--temperature=0.5", "--top_k=40", "--min_p=0.001"]
        done = tiny_run.program("sample", f"--workdir={folder / 'run'}", *drawn, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix(LINE).split(LINE)

    first, second = answers("--seed=3")
    assert first != second, "one prompt twice is two draws"
    assert answers("--seed=2")[1] == first, "prompt i has seed + i"
    stop = first[5]
    assert answers("--seed=3", f"--stop={stop}", "--stop=???") == [
        text[:1] + text[1:].removesuffix("\n").split(stop)[0] + "\n" for text in (first, second)
    ]


@pytest.mark.slow
def test_scores_are_those_of_the_model(trained):
    """Against the model's own forward pass, the text whole and in pieces that begin with the last token of the one before."""
    folder, _ = trained
    text, model = "the red tree é", run.restore(str(folder / "run"), "best", MeshConfig(data=1, expert=4, tensor=2))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokens = np.array([model.tokenizer.eot, *text.encode()], np.int32)

    @jax.jit
    def forward(rows):
        return nnx.merge(model.graphdef, model.params, model.router_state)(rows["tokens"], rows["segments"], rows["positions"])

    def expected(piece):
        arrays = {"tokens": piece, "segments": np.ones_like(piece), "positions": np.arange(len(piece), dtype=np.int32)}
        rows = {name: np.tile(array, (data_shards(model.mesh), 1)) for name, array in arrays.items()}
        logits = np.asarray(forward(shard_batch(model.mesh, rows))[0])[0, :-1, : model.tokenizer.vocab_size]
        return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(piece) - 1), piece[1:]]

    for window in (0, 6):
        with jax.set_mesh(model.mesh):
            pieces = [tokens[i : i + window + 1] for i in range(0, len(tokens) - 1, window)] if window else [tokens]
            wanted = np.concatenate([expected(piece) for piece in pieces])
        done = tiny_run.program("score", f"--workdir={folder / 'run'}", f"--file={folder / 'text.txt'}", f"--window={window}")
        assert done.returncode == 0, done.stderr
        *lines, last = done.stdout.splitlines()
        np.testing.assert_allclose([float(line.split()[0]) for line in lines], wanted, atol=1.1e-4)
        assert lines[0].endswith("  't'")
        total, bits = wanted.sum(), -wanted.sum() / np.log(2) / len(text.encode())
        figures = re.search(r": 15 tokens, 15 bytes, log p = (\S+), (\S+) bits per byte, perplexity (\S+)$", last)
        np.testing.assert_allclose([float(f) for f in figures.groups()], [total, bits, np.exp(-total / 15)], rtol=1e-4)


def refused(done, sentence):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr


BAD_TRAINING = {
    "a typo": ("--config.model.moe.router.topk=2", "the config has no field 'topk'; did you mean 'top_k'?"),
    "too many experts a token": (
        "--config.model.moe.router.top_k=9",
        "router.top_k = 9 is more than model.moe.num_experts = 8",
    ),
    "a wrong value": ("--config.train.resume=autto", "train.resume = 'autto' is unknown; did you mean 'auto'?"),
    "a wrong type": ("--config.train.steps=many", "train.steps=many: invalid literal"),
    "an unknown flag": ("--confg=configs/base.py", "Unknown command line flag 'confg'. Did you mean: config"),
    "no such config": (
        "--config=configs/nowhere.py",
        "--config: [Errno 2] No such file or directory: 'configs/nowhere.py'; give",
    ),
    "a wrong config argument": ("--config=configs/base.py:debgu", "config argument 'debgu' is neither 'debug' nor"),
    "a typo in the argument": (
        "--config=configs/base.py:train.stepz=3",
        "the config has no field 'stepz'; did you mean 'steps'?",
    ),
    "no such group": ("--config.nothing.x=1", "the config has no field 'nothing'"),
    "no files": ("--config.data.paths=nowhere.txt", "data.paths entry 'nowhere.txt' matches no file"),
    "too few devices": ("--config.mesh.data=3", "mesh = data 3 x fsdp 1 x expert 4 x tensor 1 does not fit 8 devices"),
}
FAST = ("a typo", "too many experts a token")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in BAD_TRAINING]
)
def test_bad_training_is_one_sentence(tmp_path, name):
    argument, sentence = BAD_TRAINING[name]
    tiny_run.write_corpus(tmp_path)
    arguments = tiny_run.flags(tmp_path)
    arguments = [argument, *arguments[1:]] if argument.startswith("--config=") else [*arguments, argument]
    refused(tiny_run.program("train", *arguments), sentence)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        ("evaluate", ["--workdir={}/nowhere"], "nowhere' holds no run (no config.json); train one with"),
        pytest.param("sample", ["--workdir={}/nowhere"], "nowhere' holds no run", marks=pytest.mark.slow),
        pytest.param("sample", ["--workdir={}/run", "--top_p=0"], "top_p = 0.0 must be more than 0", marks=pytest.mark.slow),
        pytest.param("sample", ["--workdir={}/run", "--seed=-1"], "seed = -1 must be at least 0", marks=pytest.mark.slow),
        pytest.param("score", ["--workdir={}/run"], "nothing to score; give --text or --file", marks=pytest.mark.slow),
        pytest.param("score", ["--workdir={}/run", "--text="], "--text='' has no character to score", marks=pytest.mark.slow),
        pytest.param("score", ["--workdir={}/run", "--file={}/none"], "none cannot be read as text", marks=pytest.mark.slow),
        pytest.param(
            "evaluate", ["--workdir={}/run", "--step=last"], "step = 'last' is neither 'latest'", marks=pytest.mark.slow
        ),
        pytest.param("evaluate", ["--workdir={}/run", "--step=5"], "No complete checkpoint of step 5", marks=pytest.mark.slow),
        pytest.param("evaluate", ["--workdir={}/run", "--mesh=exprt=8"], "'exprt=8' is not axis=size", marks=pytest.mark.slow),
        pytest.param("evaluate", [], "--workdir must have a value", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(trained, program, arguments, sentence):
    folder, _ = trained
    before = sorted((folder / "run").iterdir())
    refused(tiny_run.program(program, *(argument.format(folder) for argument in arguments)), sentence)
    assert sorted((folder / "run").iterdir()) == before


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("train", ["config"]),
        pytest.param("evaluate", ["workdir", "step", "mesh", "rows"], marks=pytest.mark.slow),
        pytest.param("sample", ["workdir", "prompt", "temperature", "min_p", "stop", "cache_dtype"], marks=pytest.mark.slow),
        pytest.param("score", ["workdir", "step", "mesh", "text", "file", "window"], marks=pytest.mark.slow),
        pytest.param("bench", ["config", "out", "repeats"], marks=pytest.mark.slow),
    ],
)
def test_help_is_the_docstring_and_the_flags(program, flags):
    done = tiny_run.program(program, "--help")
    assert done.returncode == 0
    assert f"python -m launch.{program}" in done.stdout.splitlines()[0]
    for flag in flags:
        assert any(line.strip().startswith(f"--{flag}:") for line in done.stdout.splitlines()), flag
    assert "Traceback" not in done.stderr
