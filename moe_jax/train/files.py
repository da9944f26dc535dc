"""Writing a file so that a reader, or a run killed half-way, sees the old content or the new and nothing between."""

import os
import pathlib


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces `path` by `content` (text as UTF-8): a neighbour is written, flushed to disk and renamed over it."""
    path = pathlib.Path(path)
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(neighbour, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True)
