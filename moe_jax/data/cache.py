"""Folders written once: complete under their name, or not there at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from moe_jax.data.documents import DataError


def folder(cache_dir: str) -> Path:
    """`data.cache_dir`, or `moe_jax` under the user's cache ($XDG_CACHE_HOME, else ~/.cache)."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_jax"


def publish(target: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a temporary folder beside `target`, then renames it: no reader sees a folder half written.

    A folder already there is kept: whoever wrote it first wrote the same.

    Raises:
      DataError: the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        write(draft)
        draft.chmod(0o755)  # mkdtemp makes private folders
        draft.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _unwritable(target: Path, error: OSError) -> DataError:
    return DataError(f"{target} cannot be written: {error.strerror}; set data.cache_dir and workdir to folders with room.")
