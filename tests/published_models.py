"""The published models by name, and their configs."""

import functools
import importlib
import pathlib

from configs import published
from moe_jax.config import Config, from_dict

FOLDER = pathlib.Path(published.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "presets"))


@functools.cache
def config(name: str, arg: str = "") -> Config:
    """What `configs/published/NAME.py:ARG` is."""
    return from_dict(importlib.import_module(f"configs.published.{name}").get_config(arg))
