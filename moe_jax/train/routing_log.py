"""A routing record: where every token of every batch went and with what weight, in one file that only grows.

    line 1   moe_jax routing record 1
    line 2   the header, JSON: the fields of `Header`
    then     blocks, one a batch, in the order in which they were routed

A block:

    16 bytes   little-endian: "blok", bytes of the label, bytes of the data, CRC-32 of both
    label      JSON: `key` (train/STEP or eval/DOMAIN/NUMBER), `rows` B, `length` S, `batch` (`fingerprint` of the batch), `experts` (dtype)
    data       zlib of three arrays, end to end:
                 which tokens are valid   B * S bits, eight a byte (`numpy.packbits`); 0 is padding
                 choices                  [B, S, L, M] unsigned, in the smallest of uint8, uint16 and uint32 that holds E and every choice
                                          of the block (a family may write numbers beyond E, which is "nowhere")
                 weights                  [B, S, L, M] float32, exact: first the lowest byte of each, then the second of each, ...

A block that a kill cut short is no block: what stands before it is whole and can be read, and a run that goes on cuts it off. The
fingerprint is why a record cannot be replayed on other data without notice.
"""

import json
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import BinaryIO

import numpy as np

from moe_jax.validation import RefusalError

_TITLE, _VERSION = "moe_jax routing record", 1
_HEAD = struct.Struct("<4sIII")
_MARK = b"blok"
_EFFORT = 1  # of zlib: higher ones take several times as long to save a few percent, as weights are noise

Array = np.ndarray


class RecordError(RefusalError):
    """A routing record that cannot be read, replayed or written; the message names the file and the fix."""


@dataclass(frozen=True)
class Header:
    """What was routed, by what.

    Attributes:
      router: name of the family.
      num_experts: E; a choice of E is nowhere.
      layers: places of the MoE layers in the model, from 0; there are L.
      choices: M, columns of a token (`routing.record.choices_of`).
      source: what made the record, by name: the run folder, the step of an evaluation.
      data: what decides which batches come in which order, by name; empty where that is not known.
    """

    router: str
    num_experts: int
    layers: tuple[int, ...]
    choices: int
    source: Mapping[str, str | int] = field(default_factory=dict)
    data: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """The routing of a batch: choice_BSLM int32, weight_BSLM float32, valid_BS bool (False: padding)."""

    choice_BSLM: Array
    weight_BSLM: Array
    valid_BS: Array


@dataclass(frozen=True)
class _Place:
    """Where a block stands in the file, and its label."""

    start: int
    end: int
    label: dict


def fingerprint(batch: Mapping[str, Array]) -> int:
    """CRC-32 of a batch's tokens and of the segments they stand in, [B, S] on the host."""
    crc = zlib.crc32(np.ascontiguousarray(batch["tokens"], "<i4"))
    return zlib.crc32(np.ascontiguousarray(batch["segment_ids"], "<i4"), crc)


class RoutingLog:
    """A record to read, block by block in any order. Opening reads the header and the labels."""

    def __init__(self, path: str | os.PathLike):
        """Raises RecordError: no such file, or one that is no routing record."""
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise RecordError(
                f"routing record {str(path)!r} is not a file; make one with train.record (launch.train) or --record (launch.evaluate), or"
                " leave train.replay out."
            )
        with open(self.path, "rb") as file:
            self.header = _read_header(file, self.path)
            self._places, self._size = {}, os.fstat(file.fileno()).st_size
            self._whole = file.tell()
            for place in _places(file, self._size):
                key = place.label["key"]
                if key in self._places:
                    raise RecordError(f"routing record {str(path)!r} has {key} twice; record it again.")
                self._places[key] = place
                self._whole = place.end

    @property
    def keys(self) -> list[str]:
        """Of the blocks, in the order in which they were written."""
        return list(self._places)

    def check(self, key: str, batch: Mapping[str, Array] | None = None) -> None:
        """Raises RecordError when `key` has no block here, or one of another batch than `batch`."""
        label = self._place(key).label
        if batch is None:
            return
        shape = label["rows"], label["length"]
        if batch["tokens"].shape != shape or fingerprint(batch) != self.fingerprint(key):
            raise RecordError(
                f"routing record {str(self.path)!r} was made of other data: the tokens of {key} are not those it had there;"
                " replay it with the corpus, seed, rows and batch size it was recorded with."
            )

    def fingerprint(self, key: str) -> int:
        """Of the batch that `key` was made of."""
        return self._place(key).label["batch"]

    def read(self, key: str) -> Block:
        """The block of `key`. Raises RecordError when there is none, or it is damaged."""
        place = self._place(key)
        with open(self.path, "rb") as file:
            file.seek(place.start)
            _, label_bytes, _, crc = _HEAD.unpack(file.read(_HEAD.size))
            body = file.read(place.end - place.start - _HEAD.size)
        if zlib.crc32(body) != crc:
            raise RecordError(f"routing record {str(self.path)!r} is damaged: the checksum of {key} is wrong; record it again.")
        return _unpack(zlib.decompress(body[label_bytes:]), place.label, self.header)

    def end_of(self, key: str) -> int:
        """Bytes of the file up to and with the block of `key`."""
        return self._place(key).end

    def _place(self, key):
        if key in self._places:
            return self._places[key]
        keys = self.keys
        has = f"it has {keys[0]} to {keys[-1]}" if keys else "it has no block at all"
        rest = self._size - self._whole
        torn = f", and {rest} bytes of a block that was never finished" if rest else ""
        raise RecordError(
            f"routing record {str(self.path)!r} has no {key}: {has}{torn}; record as many batches as are replayed."
        )


class RoutingWriter:
    """Writes a record, a context manager. Nothing on disk changes before the first `write`, and every block is whole on its own.

    What is there already is written over only if it is this record, begun earlier: the same header.
    """

    def __init__(self, path: str | os.PathLike, header: Header, after: str | None = None):
        """
        Args:
          path: of the file; folders are made.
          header: of the record.
          after: go on after the block of this key, cutting off what follows it, in the file if there is one; the run may have
            moved (another `source`). None starts the file anew.

        Raises:
          RecordError: `path` holds something else, another record, or one that ends before `after`.
        """
        self.path, self._header = pathlib.Path(path), header
        self._file: BinaryIO | None = None
        self._kept, self._keys = 0, set()
        _refuse_no_place(self.path)
        if not self.path.exists():
            return
        there = RoutingLog(path)
        _refuse_other(there, header, () if after is None else ("source",))
        if after is not None:
            if after not in there.keys:
                raise RecordError(
                    f"routing record {str(path)!r} has no {after}, after which the run goes on; choose another path, or remove the file"
                    " for a record that begins there."
                )
            self._kept = there.end_of(after)
            self._keys.update(key for key in there.keys if there.end_of(key) <= self._kept)

    def write(self, key: str, batch: Mapping[str, Array], choice_BSLM: Array, weight_BSLM: Array) -> None:
        """Appends the routing of `batch` (of which `tokens` and `segment_ids` are read) as a block.

        Raises:
          RecordError: `key` has been written.
          ValueError: shapes other than the header's and the batch's, or a negative choice.
        """
        if key in self._keys:
            raise RecordError(f"{key} is already in the routing record {str(self.path)!r}; write every batch once.")
        shape = (*batch["tokens"].shape, len(self._header.layers), self._header.choices)
        if choice_BSLM.shape != shape or weight_BSLM.shape != shape or choice_BSLM.min(initial=0) < 0:
            raise ValueError(
                f"choices {choice_BSLM.shape} and weights {weight_BSLM.shape} of {key} must be [B, S, L, M] = {shape}, not negative."
            )
        block = _pack(key, batch, choice_BSLM, weight_BSLM, self._header.num_experts)
        if self._file is None:
            self._file = self._open()
        self._file.write(block)
        self._file.flush()
        self._keys.add(key)

    def sync(self) -> None:
        """Returns when everything written is on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "RoutingWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self):
        if self._kept:
            file = open(self.path, "r+b")  # noqa: SIM115
            file.truncate(self._kept)
            file.seek(self._kept)
            return file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "wb")  # noqa: SIM115
        file.write(f"{_TITLE} {_VERSION}\n{json.dumps(asdict(self._header))}\n".encode())
        return file


def _refuse_no_place(path):
    """A path that no file can be written at, told before a step is taken."""
    where = f"routing record {str(path)!r}"
    try:
        nearest = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
        os.lstat(path.absolute())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{where} cannot be a file ({getattr(error, 'strerror', None) or error}); choose another path."
        ) from error
    if not os.access(nearest, os.W_OK):
        raise RecordError(f"{where} cannot be written: {str(nearest)!r} is read-only; choose another path.")


def _refuse_other(there, header, ignored):
    for name in (f.name for f in fields(Header) if f.name not in ignored):
        old, new = getattr(there.header, name), getattr(header, name)
        if old != new:
            raise RecordError(
                f"{str(there.path)!r} holds another routing record: its {name} is {old!r} and this one's is {new!r};"
                " choose another path, or remove the file."
            )


def _read_header(file: BinaryIO, path) -> Header:
    title, line = file.readline(100).decode("utf-8", "replace"), file.readline()
    if not title.startswith(f"{_TITLE} "):
        raise RecordError(f"{str(path)!r} is not a routing record; choose another path.")
    if title != f"{_TITLE} {_VERSION}\n":
        raise RecordError(f"{str(path)!r} is {title.strip()!r}, of another version than {_VERSION}; record it again.")
    if not line.endswith(b"\n"):
        raise RecordError(f"routing record {str(path)!r} ends within its header; remove the file and record it again.")
    try:
        header = Header(**json.loads(line))
    except (TypeError, ValueError) as error:
        raise RecordError(f"routing record {str(path)!r} has a header that cannot be read; record it again.") from error
    return Header(**(vars(header) | {"layers": tuple(header.layers)}))


def _places(file: BinaryIO, size: int) -> Iterator[_Place]:
    """The whole blocks from here on, up to the first thing that is none."""
    while True:
        start = file.tell()
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return
        mark, label_bytes, data_bytes, _ = _HEAD.unpack(head)
        end = start + _HEAD.size + label_bytes + data_bytes
        if mark != _MARK or end > size:
            return
        try:
            label = json.loads(file.read(label_bytes))
        except ValueError:
            return
        yield _Place(start, end, label)
        file.seek(end)


def _pack(key, batch, choice_BSLM, weight_BSLM, num_experts) -> bytes:
    valid_BS = np.asarray(batch["segment_ids"]) > 0
    rows, length = valid_BS.shape
    experts = np.min_scalar_type(max(num_experts, int(choice_BSLM.max(initial=0))))
    planes = np.ascontiguousarray(weight_BSLM, "<f4").view(np.uint8).reshape(-1, 4).T
    arrays = np.packbits(valid_BS), choice_BSLM.astype(experts.newbyteorder("<")), planes
    data = zlib.compress(b"".join(array.tobytes() for array in arrays), _EFFORT)
    label = {"key": key, "rows": rows, "length": length, "batch": fingerprint(batch), "experts": experts.name}
    label = json.dumps(label).encode()
    return _HEAD.pack(_MARK, len(label), len(data), zlib.crc32(label + data)) + label + data


def _unpack(data: bytes, label, header: Header) -> Block:
    shape = label["rows"], label["length"], len(header.layers), header.choices
    tokens, cells = shape[0] * shape[1], int(np.prod(shape))
    kind = np.dtype(label["experts"]).newbyteorder("<")
    bits = -(-tokens // 8)
    valid = np.unpackbits(np.frombuffer(data, np.uint8, bits), count=tokens).astype(bool)
    choice = np.frombuffer(data, kind, cells, bits)
    planes = np.frombuffer(data, np.uint8, 4 * cells, bits + cells * kind.itemsize).reshape(4, cells)
    weight = np.ascontiguousarray(planes.T).view("<f4").astype(np.float32)
    return Block(choice.astype(np.int32).reshape(shape), weight.reshape(shape), valid.reshape(shape[:2]))
