"""The corpus of a run: documents read, split, tokenized and cached.

Three things are cached, each under a key of all that decides it (`data.cache_dir`): the fingerprint of the documents, and what was
left out of them, under the listing of their files; a trained BPE under (documents, size); the tokens under (documents, tokenizer).
A second start reads no document.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data import builtin, cache, files, packages, tokenized, tokenizers
from moe_jax.data.bad_records import BadRecords
from moe_jax.data.documents import SAMPLE, DataError, Document, Source, by_domain, cut_lone_texts, unique, within_megabytes
from moe_jax.data.split import split_documents
from moe_jax.data.tokenized import Split
from moe_jax.data.tokenizers import Tokenizer

VERSION = 1  # of the extraction; another number makes every cached corpus a new one
Sides = tuple[list[Document], list[Document]]  # training, validation
BPE_SAMPLE = 3_000_000  # bytes of training text a domain that a BPE learns from


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and validation tokens with the tokenizer that made them.

    Attributes:
      name: `data.corpus`.
      train, validation: the two splits; they share `domains`.
      tokenizer: their tokenizer.
      fingerprint: equal for corpora with equal documents on equal sides and equal tokenizers.
      left_out: one line on the records that were left out (`data.bad_records`); "" where there is none.
    """

    name: str
    train: Split
    validation: Split
    tokenizer: Tokenizer
    fingerprint: str
    left_out: str = ""

    @property
    def domains(self) -> tuple[str, ...]:
        return self.train.domains

    def unigram_entropy(self) -> tuple[float, dict[str, float]]:
        """Entropy, in nats a token, of the ids of the counted validation targets: overall, and of each domain in validation.

        It is the loss of the best model that sees no context: a model above it has learned nothing from the context.
        """
        return _entropy(self.validation.counts()), {d: _entropy(self.validation.counts(d)) for d in self.validation.present}

    def describe(self) -> str:
        """One paragraph: documents, megabytes and tokens, by split and by domain."""
        sides = []
        for name, split in (("training", self.train), ("validation", self.validation)):
            megabytes = sum(split.bytes_by_domain) / 1e6
            sides.append(f"{split.num_documents} {name} documents ({megabytes:.2f} MB, {_tokens(split)} tokens)")
        each = [
            f"{domain} {self.train.bytes_by_domain[i] / 1e6:.2f} MB in {int(np.sum(self.train.domain_ids == i))} documents,"
            f" {int(self.train.counts(domain).sum())} tokens"
            for i, domain in enumerate(self.domains)
            if domain in self.train.present
        ]
        ratio = sum(self.train.bytes_by_domain) / max(_tokens(self.train), 1)
        return (
            f"Corpus {self.name}: {' and '.join(sides)}. Training domains: {'; '.join(each)}."
            f" Tokenizer {self.tokenizer.kind}: {self.tokenizer.vocab_size} ids, {ratio:.2f} bytes a token."
            f" Unigram entropy of the validation targets: {self.unigram_entropy()[0]:.3f} nats a token."
            f" Fingerprint {self.fingerprint}."
        )


def load_corpus(config: DataConfig, workdir: str = "") -> Corpus:
    """Reads the corpus that the config names, or maps it from the cache.

    A run that finds a tokenizer in `workdir` (`save_tokenizer`) uses it, so that a trained model keeps its ids even when the text
    a BPE learned from has changed. Nothing is written there.

    Raises:
      DataError: files, packages or folders that cannot be used, or too few documents to split.
    """
    bad = BadRecords(config.bad_records)
    source = _source(config, bad)
    folder = cache.folder(config.cache_dir)
    documents = functools.cache(lambda: _split(source, config, bad))
    key = _digest(VERSION, source.name, source.listing, config.val_fraction, config.max_megabytes, config.bad_records)
    fingerprint, left_out = _read_once(folder / f"documents-{key}", documents, bad)
    tokenizer = _tokenizer(config, folder, workdir, fingerprint, documents)
    both = _digest(fingerprint, tokenizer.fingerprint)

    def build() -> dict[str, Split]:
        sides = documents()
        domains = tuple(by_domain(sides[0] + sides[1]))
        return {name: tokenized.encode(side, domains, tokenizer) for name, side in zip(tokenized.SPLITS, sides, strict=True)}

    splits = tokenized.cached(folder / f"tokens-{both}", build)
    return Corpus(config.corpus, splits["train"], splits["validation"], tokenizer, both, left_out)


def save_tokenizer(tokenizer: Tokenizer, workdir: str) -> None:
    """Keeps the tokenizer with the run, in `workdir`/tokenizer; one that is there stays."""
    if not (Path(workdir) / "tokenizer").is_dir():
        cache.publish(Path(workdir) / "tokenizer", tokenizer.save)


def _source(config: DataConfig, bad: BadRecords) -> Source:
    if config.corpus == "files":
        return files.source(config.paths, bad)
    return {"builtin": builtin.source, "prose": packages.source}[config.corpus]()


def _split(source: Source, config: DataConfig, bad: BadRecords) -> Sides:
    documents = within_megabytes(cut_lone_texts(unique(source.read())), config.max_megabytes)
    train, validation = split_documents(documents, config.val_fraction)
    if not validation:
        raise DataError(
            f"data.corpus = {config.corpus!r} has {len(train)} document{'s' * (len(train) != 1)} to train on and none to"
            " validate with; a domain needs two documents, or one text of several thousand characters in lines"
            f"{'; ' if bad.left_out else ''}{bad.describe()}."
        )
    return train, validation


def _read_once(target: Path, documents: Callable[[], Sides], bad: BadRecords) -> tuple[str, str]:
    """The fingerprint of the documents and the line on what was left out, which counts in `bad`; both kept in `target`."""
    file, kept = target / "fingerprint", target / "left_out.txt"
    if file.is_file() and kept.is_file():
        return file.read_text(), kept.read_text(encoding="utf-8")
    sides = [[(document.domain, document.digest.hex(), document.vocabulary) for document in side] for side in documents()]
    fingerprint, left_out = _digest(VERSION, sides), bad.describe()

    def write(draft: Path) -> None:
        (draft / "fingerprint").write_text(fingerprint)
        (draft / "left_out.txt").write_text(left_out, encoding="utf-8")

    cache.publish(target, write)
    return fingerprint, left_out


def _tokenizer(config: DataConfig, folder: Path, workdir: str, fingerprint: str, documents: Callable[[], Sides]) -> Tokenizer:
    saved = Path(workdir) / "tokenizer" if workdir else None
    if saved and saved.is_dir():
        tokenizer = tokenizers.load(saved)
        if tokenizer.kind != config.tokenizer.partition(":")[0]:
            raise DataError(
                f"data.tokenizer = {config.tokenizer!r}, and the run in workdir {workdir} has a {tokenizer.kind!r} tokenizer;"
                " use that one, or another workdir."
            )
        return tokenizer
    if config.tokenizer == "bytes":
        tokenizer = tokenizers.Bytes()
    elif config.tokenizer == "gpt2":
        tokenizer = tokenizers.load_gpt2()
    elif config.tokenizer.startswith("hf:"):
        tokenizer = tokenizers.load_pretrained(config.tokenizer.removeprefix("hf:"))
    else:
        target = folder / f"bpe-{_digest(fingerprint, config.bpe_vocab_size)}"
        if not target.is_dir():
            trained = tokenizers.train_bpe(_sample(documents()[0]), config.bpe_vocab_size)
            cache.publish(target, trained.save)
        tokenizer = tokenizers.load(target)
    return tokenizer


def _sample(documents: list[Document]) -> list[str]:
    """Training texts for a BPE: of each domain the first by content, up to `BPE_SAMPLE` bytes."""
    texts = []
    for members in by_domain(document for document in documents if document.tokens is None).values():
        room = BPE_SAMPLE
        for document in sorted(members, key=lambda d: d.uniform(SAMPLE)):
            if room > 0:
                texts.append(document.text)
                room -= document.num_bytes
    if not texts:
        raise DataError("data.tokenizer = 'bpe' has no text to learn from; choose the tokenizer that made the files of tokens.")
    return texts


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum())


def _tokens(split: Split) -> int:
    return len(split.tokens) - split.num_documents


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, default=list).encode()).hexdigest()[:16]
