"""Validation losses read from run folders, joined, compared and drawn."""

import json

import matplotlib.image as image
import numpy as np
import pytest

from moe_jax.analysis.loss_plot import loss_table, read_curve, save_loss_plot
from moe_jax.config import ConfigError


def run(folder, losses):
    """A run folder that was evaluated every 10 steps."""
    folder.mkdir(parents=True)
    records = [{"step": 10 * n, name: loss} for n, loss in enumerate(losses, 1) for name in ("train/loss", "eval/loss")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    for seed in range(3):
        run(tmp_path / "first" / f"seed_{seed}", [5.0 + seed, 4.0])
        run(tmp_path / "then" / f"seed_{seed}", [3.0, 2.0 + 0.1 * seed])
        run(tmp_path / "other" / f"seed_{seed}", [5.0, 4.0, 3.0, 2.5 + 0.1 * seed + 0.01 * (seed == 1)])
    return tmp_path


def test_a_run_goes_on_where_another_ended(runs):
    curve = read_curve(f"{runs}/first/*+{runs}/then/*")
    assert curve.steps_N.tolist() == [10, 20, 30, 40]
    assert curve.joins == (20,)
    np.testing.assert_allclose(curve.loss_SN, [[5, 4, 3, 2.0], [6, 4, 3, 2.1], [7, 4, 3, 2.2]])


def test_differences_are_paired(runs):
    """The seeds differ by 0.1, the pairs by 0.01: unpaired, nothing would be resolved that is as small as the second difference."""
    curves = {"joined": read_curve(f"{runs}/first/*+{runs}/then/*"), "whole": read_curve(f"{runs}/other/*")}
    rows = loss_table(curves).splitlines()
    assert rows[2] == "| joined | 3 | 40 | 2.1000 | -0.5033 | ± 0.0143 | better |"
    assert rows[3] == "| whole | 3 | 40 | 2.6033 |  |  | reference |"
    (row,) = [row for row in loss_table({"one": read_curve(f"{runs}/other/seed_0")} | curves).splitlines() if "one" in row]
    assert row.endswith("|  |  | other seeds |")


def test_what_does_not_fit_is_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere' is no folder of a run; give one"):
        read_curve(f"{runs}/nowhere")
    with pytest.raises(ConfigError, match=r"has no metrics.jsonl; give the folder of a run"):
        read_curve(str(runs / "first"))
    with pytest.raises(ConfigError, match=r"has 3 and 1 runs; give as many seeds of each"):
        read_curve(f"{runs}/first/*+{runs}/then/seed_0")
    (runs / "then" / "seed_0" / "metrics.jsonl").write_text(json.dumps({"step": 10, "train/loss": 1.0}))
    with pytest.raises(ConfigError, match=r"has no evaluation; give a run that was evaluated"):
        read_curve(f"{runs}/then/*")
    run(tmp_path / "first" / "seed_3", [5.0])
    with pytest.raises(ConfigError, match=r"evaluated at different steps"):
        read_curve(f"{runs}/first/*")


def test_the_picture_shows_the_curves(runs, tmp_path):
    """Other losses, another picture; and not an empty one."""
    pictures = []
    for name in ("first", "other"):
        save_loss_plot({"run": read_curve(f"{runs}/{name}/*")}, tmp_path / f"{name}.png", skip=5)
        pictures.append(image.imread(tmp_path / f"{name}.png")[..., :3])
    assert pictures[0].shape == pictures[1].shape
    assert np.std(pictures[0]) > 0.05
    assert np.mean(np.abs(pictures[0] - pictures[1])) > 0.005
