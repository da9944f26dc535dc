"""Loads over a run, read and drawn."""

import json

import matplotlib.image as image
import numpy as np
import pytest

from moe_jax.analysis.load_plot import read_loads, save_load_plot, short_names
from moe_jax.config import ConfigError


def run(folder, loads):
    """A run folder whose step 10 n logged the n-th load."""
    lines = [{"step": 10 * n, "router/load": load} for n, load in enumerate(loads, 1)] + [
        {"step": 10 * len(loads), "eval/loss": 1.0}
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_loads_of_the_logged_steps(tmp_path):
    steps, load_NLE = read_loads(run(tmp_path / "a", [[[3, 1]], [[4, 0]]]))
    assert steps.tolist() == [10, 20]
    assert load_NLE.tolist() == [[[3, 1]], [[4, 0]]]


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["runs/collapse/none/seed_0", "runs/collapse/bias/seed_0"], ["none", "bias"]),
        (["runs/a/seed_0", "runs/b/seed_1"], ["a/seed_0", "b/seed_1"]),
        (["runs/a"], ["a"]),
        (["runs/a", "runs/a/b"], ["runs/a", "b"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_names_without_what_all_runs_share(runs, names):
    assert short_names(runs) == names


@pytest.mark.parametrize("text", [None, '{"step": 1, "train/loss": 2.0}\n'])
def test_what_is_no_run_of_experts_is_refused(tmp_path, text):
    if text:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"has no metrics.jsonl|has no expert loads"):
        read_loads(tmp_path)


def test_the_picture_shows_the_collapse(tmp_path):
    """One run puts everything on one expert in the end, one is even: their pictures differ where they must."""
    even, collapsed = [[[5, 5, 5, 5]]] * 4, [[[5, 5, 5, 5]], [[9, 9, 1, 1]], [[18, 1, 1, 0]], [[20, 0, 0, 0]]]
    pictures = []
    for name, loads in (("even", even), ("collapsed", collapsed)):
        save_load_plot({"run": read_loads(run(tmp_path / name, loads))}, tmp_path / f"{name}.png")
        pictures.append(image.imread(tmp_path / f"{name}.png")[..., :3])
    assert pictures[0].shape == pictures[1].shape
    assert np.std(pictures[0]) > 0.05
    assert np.mean(np.abs(pictures[0] - pictures[1])) > 0.01
