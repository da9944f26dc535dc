"""The user's own files: text, JSON lines, or tokens made elsewhere.

- `*.jsonl`, `*.jsonl.gz`: a line is a document, `{"text": "...", "domain": "..."}`; `domain` is optional.
- `*.bin`: token ids, little-endian uint16 or uint32, documents separated by the end-of-text id. Beside `web.bin` stands
  `web.bin.json`: `{"dtype": "uint16", "vocab_size": 50257, "eot": 50256}`. The run's tokenizer must have that vocabulary.
- anything else: UTF-8 text, one document; a line that holds only the record separator U+001E ends a document within a file.

The domain is the file's stem where an entry of `data.paths` names the file, and its folder's name where a glob found it:
`("web.jsonl", "books/*.txt")` makes domains `web` and `books`. A text alone in its domain is cut into pieces later
(`documents.cut_lone_texts`).
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_jax.data.documents import DataError, Document, Source

RECORD_END = re.compile("(?m)^\x1e(?:\r?\n|\\Z)")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def source(patterns: tuple[str, ...]) -> Source:
    """The files that `data.paths` names.

    Raises:
      DataError: an entry matches no file.
    """
    found = _find(patterns)
    listing = []
    for path, domain in found.items():
        for file in (path, _sidecar(path)):
            if file.exists():
                listing.append((str(file.absolute()), domain, file.stat().st_size, file.stat().st_mtime_ns))
    return Source("files", tuple(listing), lambda: [d for path, domain in found.items() for d in read_file(path, domain)])


def read_file(path: Path, domain: str) -> Iterator[Document]:
    """The documents of one file.

    Raises:
      DataError: the file cannot be read, is not UTF-8 or JSON, or its tokens do not fit their description.
    """
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path, domain)
        elif path.suffix == ".bin":
            yield from _token_file(path, domain)
        else:
            text = _decode(path.read_bytes(), str(path))
            for i, part in enumerate(RECORD_END.split(text)):
                yield Document(domain, f"{path}#{i}" if i else str(path), part)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises the last two for a file that ends early or is damaged
        raise DataError(f"{path} cannot be read: {error}; repair the file or take it out of data.paths.") from error


def _find(patterns: tuple[str, ...]) -> dict[Path, str]:
    found: dict[Path, str] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        paths = [Path(name) for name in sorted(glob.glob(expanded, recursive=True)) if os.path.isfile(name)]
        if not paths:
            raise DataError(f"data.paths entry {pattern!r} matches no file; give a file's path, or a glob that finds some.")
        for path in paths:
            stem = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
            found.setdefault(path, path.absolute().parent.name if glob.has_magic(expanded) else stem)
    sidecars = {_sidecar(path) for path in found if path.suffix == ".bin"}  # `data/*` finds them too
    return {path: domain for path, domain in found.items() if path not in sidecars}


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}; convert the file to UTF-8."
        ) from error


def _json_lines(path: Path, domain: str) -> Iterator[Document]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}:{number}"
            line = _decode(raw, where)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON ({error.msg}, column {error.colno}); write one object a line.") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise DataError(f'{where} has no "text" string; every line must be an object like {{"text": "..."}}.')
            if not isinstance(record.get("domain", ""), str):
                raise DataError(f'{where} has "domain" = {record["domain"]!r}; give a string.')
            if re.search("[\ud800-\udfff]", record["text"] + record.get("domain", "")):
                raise DataError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which UTF-8 cannot write.")
            yield Document(record.get("domain") or domain, where, record["text"])


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _vocabulary(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, vocab_size, eot) from the description beside a token file. Raises DataError."""
    sidecar = _sidecar(path)
    example = '{"dtype": "uint16", "vocab_size": 50257, "eot": 50256}'
    if not sidecar.is_file():
        raise DataError(f"{path} needs a description {sidecar.name} beside it, such as {example}.")
    description = _decode(sidecar.read_bytes(), str(sidecar))
    try:
        entry = json.loads(description)
        dtype, vocab_size, eot = DTYPES[entry["dtype"]], int(entry["vocab_size"]), int(entry["eot"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{sidecar} must be like {example}, with dtype uint16 or uint32; its fault: {error!r}.") from error
    if not 0 <= eot < vocab_size <= np.iinfo(dtype).max + 1:
        raise DataError(
            f"{sidecar} has eot = {eot} and vocab_size = {vocab_size}; eot must be less than vocab_size, and vocab_size at most"
            f" {np.iinfo(dtype).max + 1} for {entry['dtype']}."
        )
    return dtype, vocab_size, eot


def _token_file(path: Path, domain: str) -> Iterator[Document]:
    dtype, vocab_size, eot = _vocabulary(path)
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise DataError(f"{path} has {size} bytes, not a positive multiple of {dtype.itemsize} ({dtype.name}); make it again.")
    tokens = np.memmap(path, dtype, mode="r")
    if (largest := int(tokens.max())) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise DataError(
            f"{path} has token {int(tokens[at])} at index {at} (the largest is {largest}), not less than vocab_size ="
            f" {vocab_size}; correct {_sidecar(path).name} or make the file again."
        )
    ends = np.append(np.flatnonzero(tokens == eot), len(tokens))
    begin = 0
    for end in ends.tolist():
        if end > begin:
            yield Document(domain, f"{path}@{begin}", tokens=tokens[begin:end], vocabulary=(vocab_size, eot))
        begin = end + 1
