"""What XLA is asked for on each platform, with the reason of each flag; `mesh.xla_flags` of a config has it applied.

The programs do so as soon as they have read their flags, before JAX's backends start; those without a config have --xla_flags.

A flag of `XLA_FLAGS` that XLA does not know ends the process, so one is set only where the installed libraries have its name in them,
and GPU flags only where a GPU will compute. What the environment sets already stays as it is. On TPUs the latency-hiding scheduler is on
by itself, and on GPUs collectives are asynchronous by themselves: there is nothing to set for either.
"""

import functools
import mmap
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util

import jax
import jaxlib

from moe_jax.validation import CHOICES as _CHOICES

CHOICES = _CHOICES["mesh.xla_flags"]


@dataclass(frozen=True)
class Setting:
    """One thing to set.

    Attributes:
      variable: of the environment: XLA_FLAGS and LIBTPU_INIT_ARGS hold many flags, others one value.
      name: of the flag; "" for a variable that is a value.
      value: of either.
      reason: why.
    """

    variable: str
    name: str
    value: str
    reason: str


RECOMMENDED = {
    "gpu": (
        Setting(
            "XLA_FLAGS",
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "computation is placed between a collective's start and its end; off by default on GPUs (docs.jax.dev, GPU performance tips)",
        ),
        Setting(
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            "",
            "0.92",
            "of the GPU's memory for XLA's pool in place of 0.75; the rest is for CUDA, cuDNN and NCCL, which allocate outside of it",
        ),
    ),
    "tpu": (
        Setting(
            "LIBTPU_INIT_ARGS",
            "xla_tpu_enable_async_all_to_all",
            "true",
            "the exchange of tokens runs beside computation; without it each blocks (libtpu 0.0.42)",
        ),
        Setting("LIBTPU_INIT_ARGS", "xla_tpu_enable_async_ragged_all_to_all", "true", "the same for model.moe.exchange=ragged"),
    ),
}


def apply(choice: str = "recommended") -> list[str]:
    """Puts the settings of the platform into the environment, and returns them as NAME=VALUE. Call before anything asks for devices.

    TPU settings are made everywhere, as libtpu alone reads them, which may also compile for TPUs that are not there.
    """
    if choice == "none":
        return []
    settings = RECOMMENDED["tpu"] + (RECOMMENDED["gpu"] if platform() == "gpu" else ())
    return [made for setting in settings if (made := _set(setting))]


def _set(setting):
    before = os.environ.get(setting.variable, "")
    if not setting.name:
        if not before:
            os.environ[setting.variable] = setting.value
        return "" if before else f"{setting.variable}={setting.value}"
    if setting.name in before or (setting.variable == "XLA_FLAGS" and not known(setting.name)):
        return ""
    os.environ[setting.variable] = f"{before} --{setting.name}={setting.value}".strip()
    return f"--{setting.name}={setting.value}"


def platform() -> str:
    """ "cpu", "gpu" or "tpu": where JAX will compute, told without starting it."""
    if asked := jax.config.jax_platforms:
        first = asked.split(",")[0]
        return "gpu" if first in ("cuda", "rocm") else first
    if _installed("libtpu") and _any_device("accel*", "vfio/*"):
        return "tpu"
    if any(_installed(plugin) for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin")) and _any_device("nvidia[0-9]*"):
        return "gpu"
    return "cpu"


def known(name: str) -> bool:
    """Whether every installed library that reads XLA_FLAGS has this flag's name in it."""
    return all(_contains(library, name) for library in _libraries())


def _libraries() -> Iterator[pathlib.Path]:
    yield from pathlib.Path(jaxlib.__file__).parent.glob("libjax_common.*")
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        if spec := util.find_spec(plugin):
            for folder in spec.submodule_search_locations:
                yield from pathlib.Path(folder).parent.glob(f"jax_plugins/*{plugin[4:10]}*/xla_cuda_plugin.so")


@functools.cache
def _contains(library, name):
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode() + b"\0") >= 0


def _installed(module):
    return util.find_spec(module) is not None


def _any_device(*patterns):
    return any(next(pathlib.Path("/dev").glob(pattern), None) for pattern in patterns)
