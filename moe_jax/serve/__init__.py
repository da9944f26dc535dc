"""Serving: a generator behind a bounded queue, and the HTTP interface of OpenAI's completions before it (extra `serve`)."""

import importlib.util

from moe_jax.config import ConfigError


def check_extra() -> None:
    """Raises ConfigError when a package that serving needs is not installed."""
    for package in ("prometheus_client", "starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"serving needs {package}, which is not installed; pip install -e '.[serve]'.")
