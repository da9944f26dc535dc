"""The run folder as a place to write: tried before anything is compiled, and what the disk refuses later told in one sentence."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_jax.validation import RefusalError

FOLDERS = ("checkpoints", "observations", "profile", "tensorboard", "tokenizer")
FILES = ("config.json", "metrics.jsonl", "sample.txt", "versions.json")
PROBE_BYTES = 4096
# What a disk or its owner refuses; another OSError is a fault of ours, and keeps its traceback.
_OF_THE_DISK = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "ENOSPC", "EPERM", "EROFS", "ESTALE")
    if hasattr(errno, name)
}


class OutputError(RefusalError):
    """A folder or file that cannot be written; the message names it, the system's reason and the fix."""


def check(workdir: str) -> None:
    """Writes and removes a small file where a run is going to write; leaves nothing and makes no folder.

    Raises:
      OutputError: a file stands where a folder has to be, or the other way round; or nothing can be written there.
    """
    where = f"workdir = {workdir!r}"
    folder = Path(workdir).absolute()
    try:
        if "\0" in workdir:
            raise ValueError("a name has no NUL byte")
        nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        wrong = [(folder / name, "folder") for name in FOLDERS if (folder / name).exists() and not (folder / name).is_dir()]
        wrong += [(folder / name, "file") for name in FILES if (folder / name).is_dir()]
        if not nearest.is_dir():
            wrong.insert(0, (nearest, "folder"))
        if wrong:
            place, needed = wrong[0]
            raise OutputError(
                f"{where} needs a {needed} at {str(place)!r}, where there is none but something else; move that away."
            )
        for place in (nearest, *(folder / name for name in FOLDERS)):
            if place.is_dir():
                _probe(place)
    except (OSError, ValueError) as error:
        if isinstance(error, RefusalError):
            raise
        place = getattr(error, "filename", None) or str(folder)
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{where} cannot be written ({place}: {reason}); give a folder where you may write and that has room."
        ) from error


def _probe(place):
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".moe_jax.") as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error


@contextlib.contextmanager
def writing(workdir: str, last_good: Callable[[], int | None]) -> Iterator[None]:
    """What is written inside goes into the run folder: a disk that refuses is one sentence.

    Args:
      workdir: the run folder.
      last_good: gives the step of the last whole checkpoint, None where there is none.

    Raises:
      OutputError: the disk is full, or read-only, or the like.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = refused_by_disk(error)
        if reason is None:
            raise
        good = last_good()
        kept = "There is no checkpoint yet" if good is None else f"The checkpoint of step {good} is whole"
        raise OutputError(
            f"workdir = {workdir!r} cannot be written any more ({reason}). {kept}; make room and run the same command again to go on."
        ) from error


def refused_by_disk(error: BaseException) -> str | None:
    """The system's reason where the disk refused a write, None for another error. TensorStore tells such as a ValueError."""
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    code = str(error).rpartition("os_error_code='")[2].partition("'")[0] if isinstance(error, ValueError) else ""
    return os.strerror(int(code)) if code.isdigit() and int(code) in _OF_THE_DISK else None
