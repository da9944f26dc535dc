"""Runs a sweep and compares its points: `python -m launch.ablate --config=configs/ablations/routers.py --seeds=5 [--points=a,b]`.

The config file's `sweep(add)` names the points. Each point and seed is a run of launch.train, in a process and a folder of its own,
WORKDIR/POINT/seed_N, all points of one seed before the next seed. The same command again leaves finished runs alone, goes on with
interrupted ones, and with more --seeds adds runs. SIGTERM and Ctrl-C go on to the run under way, which saves its step; the sweep then
ends, too. --index=I makes one run alone, for a job array; --table only compares what is finished. The comparison is in
WORKDIR/table.md, table.csv and table.png. Checkpoints of a finished run are removed unless --keep_checkpoints.
"""

import os
import pathlib
import runpy
import shlex
import shutil
import sys
import time

from absl import flags
from ml_collections import config_flags

from launch import cli
from moe_jax.analysis import ablation_points
from moe_jax.analysis.ablation_points import Point, run_folder
from moe_jax.analysis.ablation_report import last_line, log_of, seeds_of, write_report
from moe_jax.analysis.ablation_runs import read_run
from moe_jax.config import Config, ConfigError
from moe_jax.train.passing_on import PassingOn
from moe_jax.train.progress import duration

CONFIG = cli.define_config(
    "configs/ablations/routers.py", "Config file with a sweep; --config.group.field=value changes all points."
)
SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each point, with train.seed = 0, 1, ...", lower_bound=1)
POINTS = flags.DEFINE_list("points", [], "Points to run (with --table: to compare); all by default.")
INDEX = flags.DEFINE_integer("index", None, "Make this run alone, counted from 0 in the order above.", lower_bound=0)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of all runs; by default runs/ and the config file's name.")
TABLE = flags.DEFINE_bool("table", False, "Run nothing, compare what is finished.")
KEEP = flags.DEFINE_bool("keep_checkpoints", False, "Leave the checkpoints of finished runs.")

LEAN = {"train.sample_tokens": 0, "train.tensorboard": False, "train.keep_checkpoints": 1}  # what a comparison does not need


def main():
    cli.read_config(CONFIG)  # refuses what is wrong with the file and the flags
    filename = config_flags.get_config_filename(flags.FLAGS["config"])
    module, pristine = _load(filename)
    points = ablation_points.read_points(module["sweep"])
    tree = ablation_points.point_tree(CONFIG.value.to_dict(), Point("every point", LEAN))
    configs = ablation_points.point_configs(tree, points)
    chosen = ablation_points.choose_points(points, POINTS.value)
    workdir = pathlib.Path(WORKDIR.value or f"runs/{pathlib.Path(filename.partition(':')[0]).stem}")
    runs = [(point, seed) for seed in range(SEEDS.value) for point in chosen]
    if INDEX.value is not None:
        if INDEX.value >= len(runs):
            raise ConfigError(f"--index = {INDEX.value} is past the last of the {len(runs)} runs, {len(runs) - 1}.")
        runs = [runs[INDEX.value]]
    for point in points:
        for seed in {*seeds_of(workdir, point), *(s for p, s in runs if p == point)}:
            ablation_points.refuse_other_run(ablation_points.with_seed(configs[point.name], workdir, point, seed))
    if TABLE.value:
        _report(workdir, chosen)
        return
    print(f"{len(runs)} of {SEEDS.value * len(chosen)} runs in {workdir}: points {len(chosen)}, seeds {SEEDS.value}")
    with PassingOn() as programs:
        count = len(runs)
        failed = [
            not _run(programs, f"{i + 1}/{count}", configs[p.name], workdir, p, s, filename, pristine)
            for i, (p, s) in enumerate(runs)
        ]
        if INDEX.value is None:
            _report(workdir, points)
    if any(failed):
        print(f"{sum(failed)} of {len(runs)} runs failed; their logs say why.", file=sys.stderr)
        sys.exit(1)


def _report(workdir, points):
    print(write_report(workdir, points, f"Ablation: {workdir.name}"))
    print(f"written to {workdir}/table.md, table.csv and table.png")


def _load(filename):
    """The config file's names, and its config without the command line's changes."""
    path, colon, argument = filename.partition(":")
    module = runpy.run_path(path)
    if "sweep" not in module:
        raise ConfigError(f"--config = {path} has no sweep(add) that names the points; configs/ablations/ has files that do.")
    return module, (module["get_config"](argument) if colon else module["get_config"]()).to_dict()


def _run(
    programs: PassingOn, number: str, config: Config, workdir, point: Point, seed: int, filename: str, pristine: dict
) -> bool:
    """Makes one run, where it is not finished; whether it is now. What it says is in seed_N.log beside its folder."""
    folder = run_folder(workdir, point, seed)
    head = f"{number} {point.name} seed {seed}:"
    if (figures := read_run(folder)) is None:
        config = ablation_points.with_seed(config, workdir, point, seed)
        words = ablation_points.flag_words(filename, ablation_points.changed_fields(config, pristine))
        folder.parent.mkdir(parents=True, exist_ok=True)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.absolute() / ".compiled")}  # seeds of a point share programs
        start, log = time.monotonic(), log_of(folder)
        with log.open("w", encoding="utf-8") as said:
            print(f"$ python -m launch.train {shlex.join(words)}", file=said, flush=True)
            command = [sys.executable, "-m", "launch.train", *words]
            env = cache | os.environ
            status = programs.run(head.rstrip(":"), command, lambda: last_line(log), stdout=said, stderr=said, env=env)
        figures = read_run(folder)
        head += f" {duration(time.monotonic() - start)}"
        if figures is None:
            what = f"failed with status {status}" if status else "came to its end without a validation loss that is a number"
            print(f"{head} {what}: {last_line(log)}")
            return False
    else:
        head += " finished before,"
    if not KEEP.value:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(f"{head} validation loss {figures.loss:.4f}")
    return True


if __name__ == "__main__":
    cli.run(main, computes=False)  # each run goes by its own config
