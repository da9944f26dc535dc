"""A document, the unit that is split, shuffled and packed, and what every source of documents shares.

A source is a cheap listing (names, sizes, times: what the cache is keyed by) and a `read` that does the work. Sources:
`builtin.py` (Python's own library), `packages.py` (prose that pip packages ship), `files.py` (the user's files).
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from moe_jax.validation import RefusalError


class DataError(RefusalError):
    """Data that cannot be used; the message names the file or the field, what is wrong and the fix."""


@dataclass(frozen=True, eq=False)
class Document:
    """One text, or one sequence of token ids (then `text` is empty), with the domain it belongs to."""

    domain: str
    name: str
    text: str = ""
    tokens: np.ndarray | None = None
    vocabulary: tuple[int, int] = (0, -1)  # (vocab_size, eot) that `tokens` were made with

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the content alone; it decides about duplicates, the split and `max_megabytes`."""
        if self.tokens is None:
            return hashlib.sha256(b"text:" + self.text.encode()).digest()
        return hashlib.sha256(b"tokens:" + np.ascontiguousarray(self.tokens, "<u4").tobytes()).digest()

    @functools.cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of a text; bytes in its file of a sequence of tokens."""
        return len(self.text.encode()) if self.tokens is None else self.tokens.nbytes

    def uniform(self, purpose: int) -> float:
        """A number in [0, 1) that depends on the content only; different purposes (0..3) give independent numbers."""
        return int.from_bytes(self.digest[8 * purpose : 8 * purpose + 8], "big") / 2**64


SPLIT, BOUND, SAMPLE = 0, 1, 2  # purposes of `Document.uniform`: were they one, bounded data would all fall in validation


@dataclass(frozen=True)
class Source:
    """Documents not read yet; two sources with the same listing read the same documents."""

    name: str
    listing: tuple[tuple[str | int, ...], ...]
    read: Callable[[], list[Document]]


def unique(documents: Iterable[Document]) -> list[Document]:
    """Drops empty documents and exact duplicates; the first of equal documents stays."""
    kept = {}
    for document in documents:
        if document.num_bytes:
            kept.setdefault(document.digest, document)
    return list(kept.values())


def by_domain(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """The documents of each domain, domains in alphabetical order."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.domain, []).append(document)
    return dict(sorted(groups.items()))


def within_megabytes(documents: list[Document], max_megabytes: float) -> list[Document]:
    """Bounds each domain to `max_megabytes` (10^6 bytes; 0 = no bound), choosing by content and not by order.

    Raises:
      DataError: the bound is smaller than every document of some domain.
    """
    if max_megabytes == 0:
        return documents
    chosen = set()
    for domain, members in by_domain(documents).items():
        room = max_megabytes * 1e6
        for document in sorted(members, key=lambda d: d.uniform(BOUND)):
            if document.num_bytes <= room:
                room -= document.num_bytes
                chosen.add(document)
        if room == max_megabytes * 1e6:
            smallest = min(document.num_bytes for document in members)
            raise DataError(
                f"data.max_megabytes = {max_megabytes} is less than every document of domain {domain!r} (the smallest has"
                f" {smallest} bytes); use at least {smallest / 1e6:.6f}, or 0 for all."
            )
    return [document for document in documents if document in chosen]


def cut_lone_texts(documents: list[Document]) -> list[Document]:
    """Cuts a text that is the only document of its domain into pieces, so that the domain can be validated.

    Pieces have about a sixty-fourth of the text and at least 1000 characters, and end at an empty line, or at a line's end
    when no empty line follows soon. Joined in order they are the text again.
    """
    lone = {members[0] for members in by_domain(documents).values() if len(members) == 1 and members[0].text}
    result = []
    for document in documents:
        if document in lone:
            pieces = _pieces(document.text, max(1000, len(document.text) // 64))
            result += [Document(document.domain, f"{document.name}#{i}", piece) for i, piece in enumerate(pieces)]
        else:
            result.append(document)
    return result


def _pieces(text: str, size: int) -> Iterator[str]:
    begin = 0
    while len(text) - begin > 2 * size:
        window = text[begin + size : begin + 2 * size]
        mark = next((mark for mark in ("\n\n", "\n") if mark in window), None)
        if mark is None:
            break
        end = begin + size + window.index(mark) + len(mark)
        yield text[begin:end]
        begin = end
    yield text[begin:]
