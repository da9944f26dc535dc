"""The extra `serve` when it is not there."""

import importlib.util
import subprocess
import sys

import pytest

from moe_jax.config import ConfigError
from moe_jax.serve import check_extra


def test_a_missing_package_is_one_sentence(monkeypatch):
    check_extra()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "starlette" else find(name))
    with pytest.raises(ConfigError, match=r"serving needs starlette, which is not installed; pip install -e '.\[serve\]'"):
        check_extra()


def test_text_and_prompts_do_without():
    """Other programs use them."""
    without = "import sys; sys.modules.update(dict.fromkeys(['prometheus_client', 'starlette', 'uvicorn', 'jinja2']))"
    code = f"{without}\nimport moe_jax.serve.prompts, moe_jax.serve.text"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
