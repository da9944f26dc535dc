"""Documents as one flat array of token ids, and its cache on disk."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_jax.data import cache
from moe_jax.data.documents import DataError, Document
from moe_jax.data.tokenizers import Tokenizer

SPLITS = ("train", "validation")
BATCH = 256  # documents given to the tokenizer at a time


@dataclass(frozen=True, eq=False)
class Split:
    """The documents of one side of the split.

    Attributes:
      tokens: uint16 or uint32 [tokens]; each document is `eot` and then its text. Memory-mapped when it comes from the cache.
      offsets: int64 [documents + 1]; document d is `tokens[offsets[d] : offsets[d + 1]]`.
      domain_ids: int32 [documents], indices into `domains`.
      domains: names, the same for both splits of a corpus.
      bytes_by_domain: UTF-8 bytes of text in each domain, as the tokens stand for them.
      vocab_size: number of ids, `eot` included.
      eot: the id before each document.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    domain_ids: np.ndarray
    domains: tuple[str, ...]
    bytes_by_domain: tuple[int, ...]
    vocab_size: int
    eot: int

    @property
    def num_documents(self) -> int:
        return len(self.domain_ids)

    @property
    def present(self) -> tuple[str, ...]:
        """The domains that have a document in this split."""
        return tuple(domain for i, domain in enumerate(self.domains) if np.any(self.domain_ids == i))

    def documents_of(self, domain: str | None) -> np.ndarray:
        """int64 [n]: indices of the documents of `domain`, or of all for None. Raises DataError for one without documents."""
        if domain is None:
            return np.arange(self.num_documents)
        if domain not in self.present:
            raise DataError(f"domain {domain!r} has no documents here; those that have are {', '.join(self.present)}.")
        return np.flatnonzero(self.domain_ids == self.domains.index(domain))

    def counts(self, domain: str | None = None) -> np.ndarray:
        """int64 [V]: how often each id is a counted target, that is, stands in a document after its `eot`."""
        chosen = np.zeros(self.num_documents, bool)
        chosen[self.documents_of(domain)] = True
        tokens = self.tokens[np.repeat(chosen, np.diff(self.offsets))]
        totals = np.bincount(tokens, minlength=self.vocab_size)
        totals[self.eot] = 0
        return totals


def encode(documents: list[Document], domains: tuple[str, ...], tokenizer: Tokenizer) -> Split:
    """Encodes documents, in their order.

    Raises:
      DataError: a document came as tokens of another vocabulary than the tokenizer's.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    token_bytes = tokenizer.token_bytes()
    index = {domain: i for i, domain in enumerate(domains)}
    domain_ids = np.array([index[document.domain] for document in documents], np.int32)
    lengths, parts, sizes = [], [], [0] * len(domains)
    for ids, domain in zip(_ids(documents, tokenizer), domain_ids.tolist(), strict=True):
        parts += [np.array([tokenizer.eot], dtype), ids.astype(dtype)]
        lengths.append(len(ids) + 1)
        sizes[domain] += int(token_bytes[ids].sum())
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Split(tokens, offsets, domain_ids, domains, tuple(sizes), tokenizer.vocab_size, tokenizer.eot)


def _ids(documents: list[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    for begin in range(0, len(documents), BATCH):
        batch = documents[begin : begin + BATCH]
        encoded = iter(tokenizer.encode_batch([document.text for document in batch if document.tokens is None]))
        for document in batch:
            if document.tokens is None:
                yield next(encoded)
                continue
            if document.vocabulary != (tokenizer.vocab_size, tokenizer.eot):
                raise DataError(
                    f"{document.name} holds tokens of a vocabulary of {document.vocabulary[0]} with eot ="
                    f" {document.vocabulary[1]}, and data.tokenizer = {tokenizer.kind!r} has {tokenizer.vocab_size} with eot ="
                    f" {tokenizer.eot}; choose the tokenizer that made the file."
                )
            yield document.tokens


def cached(folder: Path, build: Callable[[], dict[str, Split]]) -> dict[str, Split]:
    """The splits kept in `folder`, memory-mapped; made by `build` and written first where there are none, or damaged ones.

    Raises:
      DataError: the folder cannot be written.
    """
    splits = _open(folder)
    if splits is None:
        built = build()
        shutil.rmtree(folder, ignore_errors=True)
        cache.publish(folder, lambda draft: _write(draft, built))
        splits = _open(folder)
        if splits is None:
            raise DataError(f"{folder} was written and cannot be read back; set data.cache_dir to a folder on a sound disk.")
    return splits


def _write(folder: Path, splits: dict[str, Split]) -> None:
    meta = {}
    for name, split in splits.items():
        split.tokens.astype(split.tokens.dtype.newbyteorder("<")).tofile(folder / f"{name}.tokens")
        np.save(folder / f"{name}.offsets.npy", split.offsets)
        np.save(folder / f"{name}.domains.npy", split.domain_ids)
        meta[name] = {
            "domains": split.domains,
            "bytes_by_domain": split.bytes_by_domain,
            "vocab_size": split.vocab_size,
            "eot": split.eot,
            "dtype": split.tokens.dtype.newbyteorder("<").str,
        }
    (folder / "meta.json").write_text(json.dumps(meta))


def _open(folder: Path) -> dict[str, Split] | None:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {name: _open_split(folder, name, meta[name]) for name in SPLITS}
    except (OSError, EOFError, ValueError, KeyError):  # absent, or cut short by a full disk or a crash
        return None
    complete = all(split.offsets[-1] == len(split.tokens) for split in splits.values())
    return splits if complete else None


def _open_split(folder: Path, name: str, meta: dict) -> Split:
    return Split(
        np.memmap(folder / f"{name}.tokens", meta["dtype"], mode="r"),
        np.load(folder / f"{name}.offsets.npy"),
        np.load(folder / f"{name}.domains.npy"),
        tuple(meta["domains"]),
        tuple(meta["bytes_by_domain"]),
        meta["vocab_size"],
        meta["eot"],
    )
