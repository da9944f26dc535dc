"""The user's own files: text, JSON lines, or tokens made elsewhere.

- `*.jsonl`, `*.jsonl.gz`: a line is a document, `{"text": "...", "domain": "..."}`; `domain` is optional.
- `*.bin`: token ids, little-endian uint16 or uint32, documents separated by the end-of-text id. Beside `web.bin` stands
  `web.bin.json`: `{"dtype": "uint16", "vocab_size": 50257, "eot": 50256}`. The run's tokenizer must have that vocabulary. With
  `"tokens": 123456` there too, a file that was cut short is told.
- anything else: UTF-8 text, one document; a line that holds only the record separator U+001E ends a document within a file.

The domain is the file's stem where an entry of `data.paths` names the file, and its folder's name where a glob found it:
`("web.jsonl", "books/*.txt")` makes domains `web` and `books`. A text alone in its domain is cut into pieces later
(`documents.cut_lone_texts`). What cannot be used is refused, or left out and counted (`bad_records`).
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from moe_jax.data.bad_records import EMPTY, BadRecordError, BadRecords, decode
from moe_jax.data.documents import DataError, Document, Source
from moe_jax.data.token_files import sidecar, token_file

RECORD_END = re.compile("(?m)^\x1e(?:\r?\n|\\Z)")


def source(patterns: tuple[str, ...], bad: BadRecords | None = None) -> Source:
    """The files that `data.paths` names.

    Args:
      patterns: paths and globs.
      bad: what is done with files and lines that cannot be used (default: the first one is refused); counts when the source is read.

    Raises:
      DataError: an entry matches no file; or files and folders that cannot be read.
    """
    bad = bad or BadRecords()
    found, unusable = _find(patterns)
    if unusable and bad.stops:
        raise unusable[0]
    listing = [(error.where, error.kind, 0, 0) for error in unusable]
    for path, domain in found.items():
        for file in (path, sidecar(path)):
            if file.exists():
                listing.append((str(file.absolute()), domain, file.stat().st_size, file.stat().st_mtime_ns))

    def read() -> list[Document]:
        for error in unusable:
            bad.meet(error)
        return [document for path, domain in found.items() for document in read_file(path, domain, bad)]

    return Source("files", tuple(listing), read)


def read_file(path: Path, domain: str, bad: BadRecords | None = None) -> Iterator[Document]:
    """The documents of one file.

    Args:
      path: of the file.
      domain: of documents that do not name their own.
      bad: as in `source`. A compressed file that is damaged gives what comes before the damage.

    Raises:
      DataError: the file cannot be read, is not UTF-8 or JSON, or its tokens do not fit their description.
    """
    bad = bad or BadRecords()
    before, empty = dict(bad.left_out), True
    try:
        for document in _documents(path, domain, bad):
            empty = empty and document.num_bytes == 0
            yield document
    except BadRecordError as error:
        bad.meet(error)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises the last two for a file that ends early or is damaged
        sentence = f"cannot be read: {error}; repair the file or take it out of data.paths."
        bad.meet(BadRecordError("unreadable file", str(path), sentence))
    if empty and bad.left_out == before:
        bad.count(EMPTY, str(path))


def _documents(path, domain, bad):
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path, domain, bad)
    elif path.suffix == ".bin":
        yield from token_file(path, domain)
    else:
        text = decode(path.read_bytes(), str(path))
        for i, part in enumerate(RECORD_END.split(text)):
            yield Document(domain, f"{path}#{i}" if i else str(path), part)


def _find(patterns: tuple[str, ...]) -> tuple[dict[Path, str], list[BadRecordError]]:
    """The files with their domains, and what was found that cannot be read."""
    found: dict[Path, str] = {}
    unusable = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        names = _glob(pattern, expanded)
        unusable |= {folder: _closed(folder) for folder in _closed_folders(expanded)}
        unusable |= {name: _dangling(name) for name in names if not os.path.exists(name)}
        paths = [Path(name) for name in names if os.path.isfile(name)]
        if not paths and not unusable:
            raise DataError(_matches_nothing(pattern, [name for name in names if os.path.isdir(name)]))
        for path in paths:
            stem = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
            found.setdefault(path, path.absolute().parent.name if glob.has_magic(expanded) else stem)
    sidecars = {sidecar(path) for path in found if path.suffix == ".bin"}  # `data/*` finds them too
    return {path: domain for path, domain in found.items() if path not in sidecars}, list(unusable.values())


def _glob(pattern, expanded):
    try:
        return sorted(glob.glob(expanded, recursive=True))
    except (ValueError, re.error) as error:  # a NUL byte
        raise DataError(f"data.paths entry {pattern!r} is no path: {error}; give a file's path, or a glob.") from error


def _closed_folders(pattern):
    """Folders that a glob has to list and may not: `glob` itself passes over them in silence."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
        for folder in glob.glob(pattern or os.curdir, recursive=True):
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                yield folder


def _closed(folder):
    return BadRecordError(
        "unreadable folder",
        folder,
        "is a folder that may not be listed; give its read and execute permission, or another glob.",
    )


def _dangling(name):
    return BadRecordError("link to nothing", name, "is a link to a file that is not there; repair or remove the link.")


def _matches_nothing(pattern, folders):
    if folders:
        return (
            f"data.paths entry {pattern!r} matches no file but the folder {folders[0]!r}; for the files in it give"
            f" {os.path.join(folders[0], '*')!r}."
        )
    return f"data.paths entry {pattern!r} matches no file; give a file's path, or a glob that finds some."


def _json_lines(path: Path, domain: str, bad: BadRecords) -> Iterator[Document]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                document = _json_line(raw, f"{path}:{number}", domain)
            except BadRecordError as error:
                bad.meet(error)
                continue
            if document is not None:
                yield document


def _json_line(raw: bytes, where: str, domain: str) -> Document | None:
    line = decode(raw, where)
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError itself: a number of too many digits
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRecordError("not JSON", where, f"is not JSON ({why}); write one object a line.") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        sentence = 'has no "text" string; every line must be an object like {"text": "..."}.'
        raise BadRecordError('no "text" string', where, sentence)
    if not isinstance(record.get("domain", ""), str):
        raise BadRecordError('"domain" no string', where, f'has "domain" = {record["domain"]!r}; give a string.')
    if re.search("[\ud800-\udfff]", record["text"] + record.get("domain", "")):
        sentence = "holds half of a surrogate pair (\\ud800 to \\udfff), which UTF-8 cannot write."
        raise BadRecordError("half of a surrogate pair", where, sentence)
    return Document(record.get("domain") or domain, where, record["text"])
