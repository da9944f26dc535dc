"""Folders of safetensors files, read lazily one tensor at a time and written shard by shard."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.validation import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30

# The format's names for numbers; of others only the size is of interest, and nothing here reads them.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}


class StoredTensor:
    """A tensor in a file: shape and dtype are known, the numbers are read by `np.asarray`."""

    def __init__(self, files: "TensorFiles", name: str, shape: tuple[int, ...], dtype: np.dtype):
        self.files, self.name, self.shape, self.dtype = files, name, shape, dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.files.read(self.name)
        return array if dtype is None else array.astype(dtype, copy=False)


class TensorFiles(Mapping[str, StoredTensor]):
    """The tensors of a folder by name. Opening it reads the files' headers; tensors are read when asked for, none is kept.

    Raises:
      CheckpointError: no safetensors files, one that the index names is not there, or one that is cut off or no safetensors file.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._open: tuple[str, Any] | None = None  # the file that was read last
        self._file_of: dict[str, str] = {}
        self._tensors: dict[str, StoredTensor] = {}
        named = self._weight_map()
        for file in sorted(set(named.values())):
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (a file, not a dict)
                header = handle.get_slice(name)
                dtype = DTYPES.get(header.get_dtype(), np.dtype("V1"))
                self._file_of[name] = file
                self._tensors[name] = StoredTensor(self, name, tuple(header.get_shape()), dtype)
        if lost := [name for name in named if name and name not in self._tensors]:
            raise CheckpointError(
                f"{self.directory / INDEX} says that {lost[0]} is in {named[lost[0]]}, and it is not there; download both files again."
            )

    def _weight_map(self):
        """{tensor: file} as the index says, or {"": the one file}."""
        if not (self.directory / INDEX).is_file():
            if not (self.directory / SINGLE).is_file():
                there = ", ".join(sorted(path.name for path in self.directory.glob("*")))[:200] or "nothing"
                raise CheckpointError(
                    f"{self.directory} has neither {SINGLE} nor {INDEX} (there is: {there}); give a folder with weights in safetensors"
                    " format, as `save_pretrained` of transformers writes it."
                )
            return {"": SINGLE}
        named = read_json(self.directory / INDEX).get("weight_map")
        if not named:
            raise CheckpointError(f"{self.directory / INDEX} has no weight_map; download it again.")
        for file in sorted(set(named.values())):
            if not (self.directory / file).is_file():
                missing = sum(name == file for name in named.values())
                raise CheckpointError(
                    f"{self.directory / file} is missing, which {INDEX} names for {missing} tensors; download it too."
                )
        return named

    def _handle(self, file):
        if self._open is None or self._open[0] != file:
            path = self.directory / file
            try:
                self._open = file, safe_open(path, framework="np", backend="pread")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} ({path.stat().st_size} bytes) cannot be read as safetensors: {error}; it was probably cut off, download it"
                    " again."
                ) from error
        return self._open[1]

    def read(self, name: str) -> np.ndarray:
        """The numbers of one tensor, as they are stored."""
        if "float8" in self._tensors[name].dtype.name:  # which the library has for torch alone
            return self._read_bytes(name)
        return self._handle(self._file_of[name]).get_tensor(name)

    def _read_bytes(self, name):
        """A tensor's place in its file stands in the header: its length in 8 bytes, then JSON, then the numbers (the format's README)."""
        stored = self._tensors[name]
        with open(self.directory / self._file_of[name], "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            begin, _ = json.loads(file.read(length))[name]["data_offsets"]
            file.seek(8 + length + begin)
            return np.fromfile(file, np.uint8, math.prod(stored.shape)).view(stored.dtype).reshape(stored.shape)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is not there or is none."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; give a folder that has it.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; download it again.") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not an object with fields; download it again.")
    return tree


def write_shards(directory: str | Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors as they come, in files of at most `max_shard_bytes` (one tensor may be more), with an index if there are several.

    One shard is in memory at a time. A file has its final name when all are written.

    Raises:
      CheckpointError: the folder already has safetensors files, which a reader would mix with these.
    """
    directory = Path(directory)
    if there := sorted(directory.glob("*.safetensors*")):
        raise CheckpointError(f"{directory} already holds {there[0].name}; write to an empty folder.")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        parts, total = _write_parts(directory, tensors, max_shard_bytes)
        count = len(parts)
        names = [SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            _part(directory, i).rename(directory / name)
    finally:
        for path in directory.glob("*.partial"):
            path.unlink()
    if count > 1:
        weight_map = {tensor: file for file, part in zip(names, parts, strict=True) for tensor in part}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_parts(directory, tensors, max_shard_bytes):
    """(names of the tensors in each part, bytes in all)."""
    parts: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > max_shard_bytes:
            _flush(directory, parts, shard)
            shard, size = {}, 0
        shard[name] = np.ascontiguousarray(array).reshape(array.shape)
        size, total = size + array.nbytes, total + array.nbytes
    _flush(directory, parts, shard)
    return parts, total


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes an object as transformers does: two spaces, a newline at the end."""
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _flush(directory, parts, shard):
    save_file(shard, _part(directory, len(parts)), metadata={"format": "pt"})
    parts.append(list(shard))


def _part(directory, number):
    return directory / f"part-{number:05d}.safetensors.partial"
