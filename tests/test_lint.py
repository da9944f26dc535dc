"""`ruff check` and `ruff format --check` over the repository, with the configuration in pyproject.toml."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHECKS = [("check",), ("format", "--check")]


def ruff(command, folder):
    arguments = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(folder)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("command", CHECKS, ids=" ".join)
def test_the_repository_passes(command):
    done = ruff(command, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", CHECKS, ids=" ".join)
def test_bad_code_does_not_pass(command, tmp_path):
    (tmp_path / "bad.py").write_text("import os\nx = {  'a':1 }\n")
    done = ruff(command, tmp_path)
    assert done.returncode == 1
    assert "bad.py" in done.stdout
