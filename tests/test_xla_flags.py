"""What XLA is asked for: known to what is installed, set once, never over the environment's own, GPU flags for GPUs alone."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from moe_jax import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
ALL = [setting for settings in xla_flags.RECOMMENDED.values() for setting in settings]


@pytest.fixture
def environment(monkeypatch):
    for variable in {setting.variable for setting in ALL}:
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    return os.environ


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.name or setting.variable)
def test_each_has_a_reason(setting):
    assert setting.value
    assert len(setting.reason) > 20


def test_the_installed_xla_knows_its_flags_and_no_others():
    for setting in ALL:
        if setting.variable == "XLA_FLAGS":
            assert xla_flags.known(setting.name)
    assert not xla_flags.known("xla_gpu_make_it_fast")
    assert not xla_flags.known("xla_gpu_enable_latency_hiding")  # the beginning of one


def test_a_cpu_gets_no_gpu_flags(environment):
    made = xla_flags.apply()
    assert made == ["--xla_tpu_enable_async_all_to_all=true", "--xla_tpu_enable_async_ragged_all_to_all=true"]
    assert environment["LIBTPU_INIT_ARGS"] == " ".join(made)
    assert "XLA_FLAGS" not in environment
    assert xla_flags.apply() == []  # once


def test_a_gpu_does(environment, monkeypatch):
    monkeypatch.setattr(xla_flags, "platform", lambda: "gpu")
    environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=2"
    xla_flags.apply()
    assert environment["XLA_FLAGS"] == "--xla_gpu_autotune_level=2 --xla_gpu_enable_latency_hiding_scheduler=true"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"


def test_the_environment_has_the_last_word(environment, monkeypatch):
    monkeypatch.setattr(xla_flags, "platform", lambda: "gpu")
    environment["XLA_FLAGS"] = "--xla_gpu_enable_latency_hiding_scheduler=false"
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.5"
    xla_flags.apply()
    assert environment["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=false"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"


def test_a_flag_that_xla_does_not_know_is_left_out(environment, monkeypatch):
    monkeypatch.setattr(xla_flags, "platform", lambda: "gpu")
    unknown = xla_flags.Setting("XLA_FLAGS", "xla_gpu_make_it_fast", "true", "none at all, it does not exist")
    monkeypatch.setitem(xla_flags.RECOMMENDED, "gpu", (unknown,))
    xla_flags.apply()
    assert "XLA_FLAGS" not in environment


def test_none_is_none(environment, monkeypatch):
    monkeypatch.setattr(xla_flags, "platform", lambda: "gpu")
    assert xla_flags.apply("none") == []
    assert "LIBTPU_INIT_ARGS" not in environment


# A program with a config, or without one, that says what it has asked for and whether JAX has started a backend.
PROGRAM = """
import os, sys
from jax._src import xla_bridge
from launch import cli
if sys.argv[1] == "with":
    cli.define_config("configs/base.py:debug", "")
del sys.argv[1]
cli.run(lambda: print(os.environ.get("LIBTPU_INIT_ARGS"), bool(xla_bridge._backends)))
"""
MADE = "--xla_tpu_enable_async_all_to_all=true --xla_tpu_enable_async_ragged_all_to_all=true False\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["with"], MADE),
        (["with", "--config.mesh.xla_flags=none"], "None False\n"),
        (["with", "--config=configs/base.py:mesh.xla_flags='none'"], "None False\n"),
        (["without"], MADE),
        (["without", "--xla_flags=none"], "None False\n"),
    ],
    ids=str,
)
def test_a_program_asks_for_what_its_config_says_before_a_backend_starts(environment, arguments, expected):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_a_program_with_a_config_has_no_second_way(environment):
    command = [sys.executable, "-c", PROGRAM, "with", "--xla_flags=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Unknown command line flag 'xla_flags'" in done.stderr


@pytest.mark.parametrize(("platforms", "expected"), [("cpu", "cpu"), ("cuda,cpu", "gpu"), ("rocm", "gpu"), ("tpu", "tpu")])
def test_the_platform_asked_for(monkeypatch, platforms, expected):
    monkeypatch.setattr(type(jax.config), "jax_platforms", property(lambda self: platforms), raising=False)
    assert xla_flags.platform() == expected


@pytest.mark.slow
def test_a_program_on_a_cpu_starts_with_the_flags_of_gpus(environment):
    """XLA reads all flags in every backend, and ends the process at one that it does not know."""
    program = (
        "from moe_jax import xla_flags; xla_flags.platform = lambda: 'gpu'; xla_flags.apply();"
        "import jax; print(float(jax.numpy.ones(3).sum()))"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr
    wrong = environment | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_make_it_fast=true"}
    assert subprocess.run(run, env=wrong, capture_output=True, check=False).returncode != 0
