"""What a run was made with: its config, the versions of everything that computes, the commit."""

import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

import moe_jax
from moe_jax.config import ConfigError
from moe_jax.train.files import write_atomic

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, Any]:
    """Versions of Python and the packages, platform, device kind and count, commit; plain JSON."""
    return {
        "moe_jax": moe_jax.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "git": git_commit(),
    }


def git_commit(folder: str | os.PathLike | None = None) -> dict[str, Any] | None:
    """{"commit": the full hash, "dirty": True when tracked files differ from it}, None without git, repository or commit.

    Args:
      folder: the root of a checkout; by default the one this package was imported from.
    """
    folder = pathlib.Path(__file__).parents[2] if folder is None else pathlib.Path(folder)
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": _git(folder, "status", "--porcelain", "--untracked-files=no") != ""}
    except (OSError, subprocess.CalledProcessError):
        return None


def write_run_info(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes `config.json` and `versions.json` into `workdir` (made if absent), each whole or not at all.

    Args:
      config: plain JSON types (`moe_jax.config.to_dict`).
    """
    if jax.process_index() != 0:
        return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("versions.json", versions())):
        write_atomic(workdir / name, json.dumps(content, indent=2) + "\n")


def read_config_tree(workdir: str | os.PathLike) -> dict[str, Any]:
    """The config of the run in `workdir`, plain JSON types, in today's fields: those of older runs have other names.

    Raises:
      ConfigError: it is damaged.
    """
    file = pathlib.Path(workdir) / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            raise ValueError("it has no group of fields named model")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} is no config of a run: {error}; put the run's own back, or choose another workdir."
        ) from error
    attention = tree["model"].get("attention", {})
    if "rope_theta" in attention:  # before the rotary embedding had more than a base
        attention["rope"] = {"theta": attention.pop("rope_theta")}
    if isinstance(attention.get("qk_norm"), bool):
        attention["qk_norm"] = "head" if attention["qk_norm"] else "none"
    return tree


def _git(folder, *arguments) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
