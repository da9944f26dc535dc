"""The arrays of a checkpoint one slice at a time, in the form in which Orbax keeps and restores them.

Orbax writes and reads whole arrays. What is under an array is a zarr array of TensorStore's in an OCDBT database, and such an array
can be written and read a slice at a time, so that a model larger than the host's memory passes through it layer by layer.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from orbax.checkpoint.handlers import JsonCheckpointHandler, StandardCheckpointHandler

from moe_jax.train.files import write_atomic

STATE, EXTRA, METRICS = "state", "extra", "metrics"
CHUNK_BYTES = 2**26  # of what is compressed and read as a whole
_DICT_KEY = 2  # Orbax's number for the key of a dict
_CODEC = {"id": "zstd", "level": 1}


def chunk_shape(shape: Sequence[int], itemsize: int, parts: Sequence[int] | None = None, most: int = CHUNK_BYTES) -> list[int]:
    """Sizes of the chunks of an array: one part of every axis, parts split further, from the first axis on, while they are large.

    Args:
      shape: of the array.
      itemsize: bytes of a number.
      parts: how many parts each axis is in, a divisor of its size.
      most: bytes; a larger chunk is halved where an axis is even.
    """
    chunk = [size // part for size, part in zip(shape, parts or [1] * len(shape), strict=True)]
    for axis in range(len(chunk)):
        while math.prod(chunk) * itemsize > most and chunk[axis] % 2 == 0:
            chunk[axis] //= 2
    return chunk


class StoredArrays(Mapping[str, Any]):
    """The arrays under `state` in one checkpoint's folder by name, "params/embed/table_VD"; none is in memory.

    `arrays[name]` is a TensorStore: `arrays[name][i].read().result()` is a slice of it as a numpy array.
    """

    def __init__(self, checkpoint: str | os.PathLike):
        """
        Args:
          checkpoint: the folder STEP/ of a checkpoint.
        """
        self._state = pathlib.Path(checkpoint).absolute() / STATE
        metadata = json.loads((self._state / "_METADATA").read_text())
        self._driver = "zarr3" if metadata["use_zarr3"] else "zarr"
        entries = metadata["tree_metadata"].values()
        self._names = ["/".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return ts.open(_spec(self._state, name, self._driver), open=True, read=True).result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ArrayWriter:
    """Writes arrays slice by slice into a folder, which `finish` makes a checkpoint that Orbax restores.

    Opening the same folder again continues: slices written before are there still.
    """

    def __init__(self, checkpoint: str | os.PathLike, shapes: Mapping[str, tuple[Sequence[int], Any, Sequence[int]]]):
        """
        Args:
          checkpoint: the folder, made if absent; not under a name that readers take for a finished checkpoint.
          shapes: {name: (shape, dtype, chunk shape)} of all arrays; those of an interrupted writer must be the same.
        """
        self._folder = pathlib.Path(checkpoint).absolute()
        self._shapes = {name: ([*shape], np.dtype(dtype), [*chunk]) for name, (shape, dtype, chunk) in shapes.items()}
        (self._folder / STATE).mkdir(parents=True, exist_ok=True)
        self._stores = {name: self._open(name) for name in self._shapes}

    def _open(self, name):
        shape, dtype, chunk = self._shapes[name]
        kind = "bfloat16" if dtype == ml_dtypes.bfloat16 else dtype.newbyteorder("<").str
        metadata = {"shape": shape, "chunks": chunk, "dtype": kind, "compressor": _CODEC, "fill_value": None, "order": "C"}
        spec = _spec(self._folder / STATE, name, "zarr") | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        return ts.open(spec, open=True, create=True).result()

    def dtype(self, name: str) -> np.dtype:
        """In which an array is stored."""
        return self._shapes[name][1]

    def write(self, name: str, array: np.ndarray, index: int | None = None) -> None:
        """Writes a whole array, or slice `index` of its first axis; it is on disk when this returns."""
        store = self._stores[name] if index is None else self._stores[name][index]
        store.write(np.asarray(array, self._shapes[name][1])).result()

    def finish(self, extra: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Writes what Orbax needs besides the arrays: names, the JSON `extra` and `metrics`, the time."""
        entries = {}
        for name, (shape, _, _) in self._shapes.items():
            path = tuple(name.split("/"))
            entries[str(path)] = {
                "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in path],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": shape},
            }
        form = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
        arrays = [
            {"array_metadata": dict(param_name=_key(name), write_shape=shape, chunk_shape=chunk, ext_metadata=None)}
            for name, (shape, _, chunk) in self._shapes.items()
        ]
        handlers = {EXTRA: JsonCheckpointHandler, METRICS: JsonCheckpointHandler, STATE: StandardCheckpointHandler}
        now = time.time_ns()
        of_step = {
            "item_handlers": {name: f"{handler.__module__}.{handler.__qualname__}" for name, handler in handlers.items()},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }
        files = {
            f"{STATE}/_METADATA": {"tree_metadata": entries} | form,
            f"{STATE}/array_metadatas/process_0": {"array_metadatas": arrays},
            f"{EXTRA}/metadata": dict(extra),
            f"{METRICS}/metrics": dict(metrics),
            "_CHECKPOINT_METADATA": of_step,
        }
        for file, tree in files.items():
            (self._folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._folder / file, json.dumps(tree))


def _spec(state, name, driver):
    return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": f"file://{state}/", "path": f"{_key(name)}/"}}


def _key(name):
    return name.replace("/", ".")
