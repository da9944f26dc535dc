"""A whole run in miniature: a corpus in a file, the config as flags of the command line, and what a run leaves, read back."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from configs import base
from moe_jax.config import Config, from_dict
from moe_jax.mesh import make_mesh
from moe_jax.train import run
from moe_jax.train.paths import leaf_names

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = {
    "model.d_model": 16,
    "model.d_ff": 16,
    "model.remat": "none",
    "model.attention.head_dim": 8,
    "model.moe.num_experts": 8,
    "model.moe.d_ff": 8,
    "model.moe.first_dense": 1,
    "model.moe.router.name": "deepseek",
    "model.moe.router.deepseek.bias_speed": 0.01,
    "mesh.data": 2,
    "mesh.expert": 4,
    "mesh.emulate": 8,
    "data.corpus": "files",
    "data.seq_len": 16,
    "data.batch_size": 16,
    "optimizer.warmup_steps": 2,
    "train.steps": 8,
    "train.accumulation": 2,
    "train.log_every": 2,
    "train.eval_every": 4,
    "train.eval_rows": 8,
    "train.checkpoint_every": 3,
    "train.sample_tokens": 3,
}
SWEEP = '''"""Two points."""

import ast

from configs import base


def get_config(arg=""):
    config = base.get_config("debug")
    config.update_from_flattened_dict(ast.literal_eval({fields!r}))
    return base.override(config, arg)


def sweep(add):
    for name, changes in {points!r}.items():
        add(name, changes)
'''


def write_sweep(path: pathlib.Path, fields: dict, points: dict[str, dict]) -> pathlib.Path:
    """A config file of these fields whose sweep has these points."""
    path.write_text(SWEEP.format(fields=repr(fields), points=points))
    return path


def write_corpus(folder: pathlib.Path, documents: int = 40, seed: int = 0) -> pathlib.Path:
    """Two domains of made-up sentences and sums, a few hundred rows of 16 tokens."""
    rng = np.random.default_rng(seed)
    words = ["one", "two", "red", "blue", "house", "tree", "runs", "sees", "the", "a"]
    lines = []
    for i in range(documents):
        text = " ".join(rng.choice(words, 20)) if i % 2 else "\n".join(f"x{n} = {n} + {i}" for n in range(8))
        lines.append(json.dumps({"text": f"{i}: {text}", "domain": ("code", "prose")[i % 2]}))
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def fields(folder: pathlib.Path, workdir: str = "run", **changes) -> dict:
    """Every field that differs from `configs/base.py:debug`; names in `changes` have __ for a dot."""
    places = {
        "workdir": str(folder / workdir),
        "data.paths": (str(folder / "corpus.jsonl"),),
        "data.cache_dir": str(folder / "cache"),
    }
    return FIELDS | places | {name.replace("__", "."): value for name, value in changes.items()}


def config(folder: pathlib.Path, workdir: str = "run", **changes) -> Config:
    """The run as a Config."""
    tree = base.get_config("debug")
    for name, value in fields(folder, workdir, **changes).items():
        *groups, field = name.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[field] = value
    return from_dict(tree)


def flags(folder: pathlib.Path, workdir: str = "run", **changes) -> list[str]:
    """The run as arguments of launch.train."""
    changed = fields(folder, workdir, **changes).items()
    return ["--config=configs/base.py:debug", *(f"--config.{name}={value}" for name, value in changed)]


def command(name: str, *arguments: str) -> dict:
    """Arguments of subprocess.run and Popen for `python -m launch.NAME`, which shares the tests' compilation cache."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    return {"args": [sys.executable, "-m", f"launch.{name}", *arguments], "cwd": ROOT, "env": os.environ | cache, "text": True}


def program(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `python -m launch.NAME` to its end."""
    return subprocess.run(**command(name, *arguments), capture_output=True, check=False)


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without the figures that no two runs share."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = "train/tokens_per_second", "time/"
    return [{name: value for name, value in line.items() if not name.startswith(times)} for line in lines]


def saved_state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint (the newest) by name, the optimizer's and the bias included; and the position in the data."""
    settings = from_dict(json.loads((workdir / "config.json").read_text()) | {"workdir": str(workdir)})
    mesh = make_mesh(settings)
    with run.checkpoints(settings) as checkpoints, jax.set_mesh(mesh):
        state, extra = checkpoints.restore(step or checkpoints.latest(), run.abstract_state(settings, mesh))
    arrays = {name: np.asarray(leaf) for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True)}
    return arrays | {"data": np.array(json.dumps(extra["data"], sort_keys=True))}


def assert_same_run(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """The last checkpoints are equal to the bit, and so is every logged figure, each step once."""
    a, b = saved_state(workdir), saved_state(expected)
    assert a.keys() == b.keys()
    assert any("bias_E" in name for name in a)
    assert any("/mu/" in name for name in a)
    for name, value in b.items():
        assert a[name].dtype == value.dtype
        assert a[name].tobytes() == value.tobytes(), f"{name} differs"
    assert metrics(workdir) == metrics(expected)
