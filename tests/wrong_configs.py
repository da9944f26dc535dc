"""Generated wrong configs, and what becomes of one: refused in a sentence, accepted, or (a fault) neither."""

import contextlib
import io
import math
import sys
from collections.abc import Callable
from random import Random
from typing import Any

import jax
import tiny_run
from absl import flags
from hypothesis import strategies as st
from ml_collections import config_flags

from configs import base
from launch import cli
from moe_jax.config import Config, from_dict
from moe_jax.models.transformer import abstract
from moe_jax.routing import ROUTERS
from moe_jax.train import loop, run
from moe_jax.train.optimizer import make_optimizer
from moe_jax.validation import CHOICES, RefusalError, _fields

# of the tests' own making: where things are
PLACES = ("workdir", "data.paths", "data.cache_dir")
# arrays are made of these: a large number is a question of memory, which is not asked here
SIZES = (
    *_fields("model", "vocab_size d_model num_layers d_ff mtp_layers"),
    *_fields("model.attention", "num_heads num_kv_heads head_dim kv_rank q_rank rope_head_dim v_head_dim"),
    *_fields("model.moe", "num_experts d_ff num_shared_experts shared_d_ff exchange_chunks"),
    *_fields("data", "seq_len batch_size bpe_vocab_size"),
    *_fields("train", "sample_tokens accumulation steps"),
)
SMALL_INTEGERS = (-2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 24, 32, 33)
HUGE_INTEGERS = (10**6, 2**31, 2**32, 2**63, 2**64, 10**30)
FLOATS = (-1.0, -0.0, 0.0, 1e-300, 1e-9, 0.1, 0.5, 1.0, 1.5, 3.0, 100.0, 1e9, 1e300, math.inf, -math.inf, math.nan)
STRINGS = ("", " ", "zzz", "None", "nowhere/at/all", "\0", "é" * 50, "..", "os", "1x", "hf:", "hf:nowhere", "float16")
OF_ANOTHER_TYPE = ("ten", "1.5", "True", "[1]", "None", "")


def leaves(tree, path=""):
    """(dotted path, value) of every field of a ConfigDict."""
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def value(random: Random, path: str, default) -> Any:
    """One of the right type, sensible or not, or in one of four cases of another; as the command line has it."""
    if random.random() < 0.25:
        return random.choice(STRINGS if isinstance(default, str) else OF_ANOTHER_TYPE)
    if path in CHOICES:
        return random.choice(CHOICES[path])
    if path == "model.moe.router.name":
        return random.choice(sorted(ROUTERS))
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return random.choice(SMALL_INTEGERS if path in SIZES else SMALL_INTEGERS + HUGE_INTEGERS)
    return random.choice(FLOATS if isinstance(default, float) else STRINGS)


FIELDS = {path: value for path, value in leaves(base.get_config()) if path not in PLACES}
OF_ROUTERS = [path for path in FIELDS if path.count(".") == 4]
OTHERS = [path for path in FIELDS if path not in OF_ROUTERS]


def changes_of(seed: int) -> dict[str, Any]:
    """One to three fields with other values; in one of four cases another router with an option of its; rarely a name that is none."""
    random = Random(seed)
    changes = {path: value(random, path, FIELDS[path]) for path in random.sample(OTHERS, random.choice([1, 1, 1, 2, 2, 3]))}
    if random.random() < 0.25:
        name = changes["model.moe.router.name"] = random.choice(sorted(ROUTERS))
        if options := [path for path in OF_ROUTERS if path.split(".")[3] == name]:
            path = random.choice(options)
            changes[path] = value(random, path, FIELDS[path])
    if random.random() < 0.04:
        path = random.choice(OTHERS)
        changes[random.choice([path + "x", path[:-1], path.replace(".", "_"), path + ".x", "x." + path])] = "1"
    return changes


def wrong_configs(part: int) -> st.SearchStrategy[dict[str, Any]]:
    """Changes, of other seeds in every part. Seeds, as fields drawn one by one are much alike from one example to the next."""
    return st.integers(0, 2**32 - 1).map(lambda seed: changes_of(seed + part * 2**32))


class AcceptedError(Exception):
    """Ends a run when its first step has been traced."""


def read(folder, workdir: str, changes: dict) -> Config:
    """The config of a command line with these flags. Raises RefusalError with what `launch.cli` says and exits."""
    every = tiny_run.flags(folder, workdir, **OF_ONE_STEP)
    arguments = ["train", *every, *(f"--config.{path}={value}" for path, value in changes.items())]
    told = io.StringIO()
    argv, sys.argv = sys.argv, arguments  # DEFINE_config_file looks up the fields there
    try:
        with contextlib.redirect_stderr(told), cli._refusing_flags():
            flag_values = flags.FlagValues()
            holder = config_flags.DEFINE_config_file("config", flag_values=flag_values, lock_config=True)
            flag_values(arguments)
            return from_dict(holder.value)
    except SystemExit as end:
        raise RefusalError(told.getvalue().strip().removeprefix("error: ")) from end
    finally:
        sys.argv = argv


OF_ONE_STEP = {"train.steps": 1, "optimizer.warmup_steps": 1, "train.sample_tokens": 0, "train.tensorboard": False}


def refusal(act: Callable[[], object]) -> str:
    """The sentence with which `act` refuses, "" where it does not; everything else is raised, and a fault."""
    try:
        act()
    except AcceptedError:
        return ""
    except RefusalError as error:
        return str(error)
    return ""


def trace_only(monkeypatch) -> None:
    """Has `loop.train` make no array, and end when its first step has been traced."""

    def of_shapes(config, weights=None):
        state = run.abstract_state(config, jax.sharding.get_mesh())
        return abstract(config.model)[0], make_optimizer(config.optimizer, config.train.steps, state.params), state

    make = loop.make_train_step

    def tracing(*arguments):
        step = make(*arguments)

        def traced(state, batch, key):
            jax.eval_shape(step, state, batch, key)
            raise AcceptedError

        return traced

    monkeypatch.setattr(loop, "create", of_shapes)
    monkeypatch.setattr(loop, "make_train_step", tracing)
