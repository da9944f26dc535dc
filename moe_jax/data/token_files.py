"""Token ids made elsewhere: a flat file of integers and its description beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.data.bad_records import BadRecordError, decode
from moe_jax.data.documents import Document

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_EXAMPLE = '{"dtype": "uint16", "vocab_size": 50257, "eot": 50256}'


class _Description(NamedTuple):
    dtype: np.dtype
    vocab_size: int
    eot: int
    tokens: int | None  # how many, where it is said


def sidecar(path: Path) -> Path:
    """The file that describes the token file `path`."""
    return path.with_name(path.name + ".json")


def token_file(path: Path, domain: str) -> Iterator[Document]:
    """The documents of a file of little-endian uint16 or uint32, divided at the end-of-text id.

    Raises:
      DataError: no description or a wrong one, and tokens that do not fit it.
    """
    described, size = _description(path), path.stat().st_size
    dtype, vocab_size, eot = described[:3]
    if size == 0 or size % dtype.itemsize:
        raise _unfit(path, f"has {size} bytes, not a positive multiple of {dtype.itemsize} ({dtype.name}); make it again.")
    tokens = np.memmap(path, dtype, mode="r")
    if described.tokens not in (None, len(tokens)):
        raise _unfit(
            path,
            f"has {len(tokens)} tokens and {sidecar(path).name} says {described.tokens}: it was cut short, or has grown; copy it"
            " again, or correct the description.",
        )
    if (largest := int(tokens.max())) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise _unfit(
            path,
            f"has token {int(tokens[at])} at index {at} (the largest is {largest}), not less than vocab_size ="
            f" {vocab_size}; correct {sidecar(path).name} or make the file again.",
        )
    ends = np.append(np.flatnonzero(tokens == eot), len(tokens))
    begin = 0
    for end in ends.tolist():
        if end > begin:
            yield Document(domain, f"{path}@{begin}", tokens=tokens[begin:end], vocabulary=(vocab_size, eot))
        begin = end + 1


def _description(path):
    file = sidecar(path)
    if not file.is_file():
        raise _unfit(path, f"needs a description {file.name} beside it, such as {_EXAMPLE}.")
    text = decode(file.read_bytes(), str(file))
    try:
        entry = json.loads(text)
        dtype, vocab_size, eot = DTYPES[entry["dtype"]], int(entry["vocab_size"]), int(entry["eot"])
        tokens = int(entry["tokens"]) if "tokens" in entry else None
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _unfit(file, f"must be like {_EXAMPLE}, with dtype uint16 or uint32; its fault: {error!r}.") from error
    if not 0 <= eot < vocab_size <= np.iinfo(dtype).max + 1:
        raise _unfit(
            file,
            f"has eot = {eot} and vocab_size = {vocab_size}; eot must be less than vocab_size, and vocab_size at most"
            f" {np.iinfo(dtype).max + 1} for {entry['dtype']}.",
        )
    return _Description(dtype, vocab_size, eot, tokens)


def _unfit(path, sentence):
    return BadRecordError("unfit tokens", str(path), sentence)
