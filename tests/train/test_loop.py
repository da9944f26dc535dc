"""Whole runs in miniature: what they leave, how they go on, what they refuse."""

import json
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
import tiny_run

from moe_jax.config import ConfigError
from moe_jax.data.documents import DataError
from moe_jax.train import loop, observation
from moe_jax.train.events import TrainingError
from moe_jax.train.preemption import PreemptedError


class PowerCutError(Exception):
    """Ends a run at a moment of the test's choice."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One uninterrupted run, in `folder`/straight."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_run.write_corpus(folder)
    evaluation = loop.train(tiny_run.config(folder, "straight"))
    (folder / "evaluation.json").write_text(
        json.dumps({name: np.asarray(value).tolist() for name, value in evaluation.items()})
    )
    return folder


def on_training_batch(monkeypatch, number, act):
    """`act(batch)` makes the batch of the run's training step `number`, counted from the start of the process."""
    shard_batch, calls = loop.shard_batch, []

    def counted(mesh, batch):
        calls.append(None)
        return shard_batch(mesh, act(batch) if len(calls) == number else batch)

    monkeypatch.setattr(loop, "shard_batch", counted)
    return calls


def cut(_):
    raise PowerCutError


def tell_to_stop(batch):
    signal.raise_signal(signal.SIGTERM)
    return batch


def contents(folder):
    """Every file with its bytes and time."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def checkpoints(workdir):
    return sorted(int(entry.name) for entry in (workdir / "checkpoints").iterdir())


def test_a_run_leaves_what_it_says(folder):
    workdir = folder / "straight"
    assert sorted(entry.name for entry in workdir.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "observations",
        "sample.txt",
        "tensorboard",
        "tokenizer",
        "versions.json",
    ]
    assert json.loads((workdir / "config.json").read_text())["model"]["vocab_size"] == 384  # 257 ids, filled in and rounded up
    assert (workdir / "sample.txt").read_text(encoding="utf-8")
    assert list((workdir / "tensorboard").iterdir())
    assert checkpoints(workdir) == [3, 6, 8]
    assert int(tiny_run.saved_state(workdir)["step"]) == 8


def test_each_logged_step_stands_once_with_its_figures(folder):
    lines = tiny_run.metrics(folder / "straight")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    figures = {"train/loss", "train/gradient_norm", "train/learning_rate", "router/load", "router/max_violation", "router/bias"}
    for line in lines:
        assert figures <= line.keys()
        assert np.sum(line["router/load"]) == 2 * (16 * 16 - np.sum(line["router/padding"]) / 2)  # K = 2, one MoE layer
        assert ("eval/loss" in line) == (line["step"] in (4, 8))
    assert {"eval/code/loss", "eval/prose/bits_per_byte", "eval/load"} <= lines[-1].keys()
    assert ["eval/saturation" in line for line in lines] == [False, False, False, True]
    rates = [line["train/learning_rate"] for line in lines]
    assert rates == sorted(rates, reverse=True)


def test_the_observatory_s_page_names_every_figure_of_a_run(folder):
    """But the losses', which are training's, and those that only some models have."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "observatory.md").read_text()
    tables = page[page.index("## Every logged step") : page.index("## The file of an evaluation")]
    named = set(re.findall(r"`((?:router|eval|time)/[\w/]+)`", tables))
    lines = [json.loads(line) for line in (folder / "straight" / "metrics.jsonl").read_text().splitlines()]
    of_losses = ("_loss", "/loss", "/perplexity", "/bits_per_byte", "/experts_per_token")
    logged = {re.sub(r"^eval/(code|prose)/", "eval/DOMAIN/", name) for line in lines for name in line}
    logged = {name for name in logged if name.startswith(("router/", "eval/", "time/")) and not name.endswith(of_losses)}
    assert named - logged == {"router/gradient_ratio"}  # this run's router has no loss
    assert logged - named == set()


def test_observations_are_counts_of_what_was_evaluated(folder):
    workdir = folder / "straight"
    assert observation.observed_steps(workdir) == [4, 8]
    before, now = (observation.load(observation.path_of(workdir, step)) for step in (4, 8))
    last = tiny_run.metrics(workdir)[-1]
    assert now.about.domains == ("code", "prose")
    np.testing.assert_array_equal(now.load_LE, last["eval/load"])
    np.testing.assert_allclose(observation.overlap(now, before), last["eval/saturation"])
    assert now.about.step == 8


def test_a_run_cut_twice_goes_on_to_the_bit(folder, monkeypatch):
    config = tiny_run.config(folder, "cut")
    for number in (5, 4):  # in the fifth step; then, from the checkpoint of step 3, in the seventh
        with monkeypatch.context() as patch:
            on_training_batch(patch, number, cut)
            with pytest.raises(PowerCutError):
                loop.train(config)
    assert checkpoints(folder / "cut") == [3, 6]
    calls = on_training_batch(monkeypatch, 0, cut)
    evaluation = loop.train(config)
    assert len(calls) == 2  # steps 7 and 8
    tiny_run.assert_same_run(folder / "cut", folder / "straight")
    expected = json.loads((folder / "evaluation.json").read_text())
    assert {name: np.asarray(value).tolist() for name, value in evaluation.items()} == expected


def test_a_run_told_to_stop_saves_its_step_and_goes_on_to_the_bit(folder, monkeypatch):
    """SIGTERM in step 2, then in step 5: no checkpoint was due, and the figures of step 6 are also of step 5."""
    config = tiny_run.config(folder, "told")
    for number, step in ((2, 2), (3, 5)):
        with monkeypatch.context() as patch:
            on_training_batch(patch, number, tell_to_stop)
            with pytest.raises(PreemptedError, match=rf"SIGTERM: stopped after step {step}, whose checkpoint is in .*/told;"):
                loop.train(config)
    assert checkpoints(folder / "told") == [2, 3, 5]
    assert [line["step"] for line in tiny_run.metrics(folder / "told")] == [2, 4]
    loop.train(config)
    tiny_run.assert_same_run(folder / "told", folder / "straight")


def test_the_comparison_of_runs_can_fail(folder):
    other = folder / "other"
    shutil.copytree(folder / "straight", other)
    tiny_run.assert_same_run(folder / "straight", other)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    with pytest.raises(AssertionError):
        tiny_run.assert_same_run(folder / "straight", other)
    shutil.rmtree(other / "checkpoints" / "8")
    with pytest.raises(AssertionError, match="differs"):
        tiny_run.assert_same_run(folder / "straight", other)


def test_a_loss_that_is_not_finite_stops_the_run(folder, monkeypatch):
    """In step 6, of which a checkpoint was due; the same command without the fault goes on from step 3."""
    config = tiny_run.config(folder, "nan", guards__skip_steps=0)
    with monkeypatch.context() as patch:
        on_training_batch(patch, 6, lambda batch: batch | {"loss_weights": batch["loss_weights"] * np.float32("nan")})
        with pytest.raises(TrainingError, match=r"step 6: loss = nan.*last good checkpoint: .*nan/checkpoints/3; lower"):
            loop.train(config)
    assert checkpoints(folder / "nan") == [3]
    assert [line["step"] for line in tiny_run.metrics(folder / "nan")] == [2, 4]
    loop.train(config)
    tiny_run.assert_same_run(folder / "nan", folder / "straight")


def test_a_gradient_that_is_not_finite_stops_the_run(folder, monkeypatch):
    """In step 2, before any checkpoint."""
    make = loop.make_train_step

    def make_faulty(*arguments):
        step = make(*arguments)

        def faulty(state, batch, key):
            number = int(state.step) + 1
            state, metrics = step(state, batch, key)
            return state, metrics | ({"train/gradient_norm": np.float32("inf")} if number == 2 else {})

        return faulty

    monkeypatch.setattr(loop, "make_train_step", make_faulty)
    with pytest.raises(TrainingError, match=r"step 2: loss = 5\..*, gradient norm = inf;.*checkpoint: there is none; lower"):
        loop.train(tiny_run.config(folder, "inf", guards__skip_steps=0))
    assert not (folder / "inf" / "checkpoints").exists()


def test_a_finished_run_started_again_reports_and_trains_nothing(folder, monkeypatch, capsys):
    workdir = folder / "finished"
    shutil.copytree(folder / "straight", workdir)
    state, metrics = contents(workdir / "checkpoints"), (workdir / "metrics.jsonl").read_bytes()
    on_training_batch(monkeypatch, 1, cut)
    evaluation = loop.train(tiny_run.config(folder, "finished"))
    assert evaluation["eval/loss"] == json.loads((folder / "evaluation.json").read_text())["eval/loss"]
    assert contents(workdir / "checkpoints") == state
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    printed = capsys.readouterr().out
    assert f"continuing from step 8 of {workdir}" in printed
    assert "Validation loss" in printed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(train__resume="never"), ConfigError, r"train\.resume = 'never' and workdir = .* has a checkpoint of step 8"),
        (dict(train__steps=7), ConfigError, r"train\.steps = 7 is less than the 8 steps"),
        (dict(train__seed=1), ConfigError, r"train\.seed is 1 and was 0 in the 8 steps .*; set it back"),
        (dict(data__seq_len=8), ConfigError, r"data\.seq_len is 8 and was 16 in the 8 steps"),
        (dict(data__batch_size=32), ConfigError, r"data\.batch_size is 32 and was 16 in the 8 steps"),
        (
            dict(data__val_fraction=0.5),
            ConfigError,
            r"the fingerprint of data\.corpus is '\w+' and was '\w+' in the 8 steps .* \(data\.val_fraction is 0\.5 and was 0\.05\)",
        ),
        (dict(data__tokenizer="bpe"), DataError, r"data\.tokenizer = 'bpe', and the run .* has a 'bytes' tokenizer"),
        (dict(model__d_ff=32), ConfigError, r"model\.d_ff is 32 and was 16 in the 8 steps"),
    ],
    ids=str,
)
def test_a_run_that_cannot_go_on_is_refused_and_left_as_it_is(folder, changes, error, message):
    before = contents(folder / "straight")
    with pytest.raises(error, match=message):
        loop.train(tiny_run.config(folder, "straight", **changes))
    assert contents(folder / "straight") == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(train__resume="must"), ConfigError, r"train\.resume = 'must' and workdir = .* has no checkpoint"),
        (dict(model__moe__router__deepseek__num_groups=3), ConfigError, r"num_groups = 3"),
        (
            dict(optimizer__schedule="wsd", optimizer__decay_fraction=0.9),
            ConfigError,
            r"optimizer\.decay_fraction = 0\.9 overlap",
        ),
        (dict(mesh__data=4), ConfigError, r"mesh = data 4 x .*does not fit 8 devices"),
        (dict(mesh__emulate=4), ConfigError, r"mesh\.emulate = 4 came too late"),
        (dict(data__batch_size=24), ConfigError, r"data\.batch_size = 24"),
        (dict(model__vocab_size=100), ConfigError, r"model\.vocab_size = 100 is less than the tokenizer's 257 ids"),
        (
            dict(mesh__data=1, mesh__expert=2, mesh__tensor=4),
            ConfigError,
            r"num_heads = 2 is not a multiple of mesh\.tensor = 4",
        ),
        (dict(data__paths=("nowhere/*.txt",)), DataError, r"data\.paths entry 'nowhere/\*\.txt' matches no file"),
        (dict(data__batch_size=4096), DataError, r"data\.batch_size = 4096 is more than the \d+ rows"),
    ],
    ids=str,
)
def test_a_config_that_cannot_run_leaves_nothing_behind(tmp_path, changes, error, message):
    tiny_run.write_corpus(tmp_path)
    with pytest.raises(error, match=message):
        loop.train(tiny_run.config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()
