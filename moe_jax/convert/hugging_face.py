"""Whole checkpoints of transformers: a folder with config.json and safetensors files to our arrays, and back.

    model, params, router_state = load_params("Mixtral-8x7B-v0.1")
    save_hf("mine", model, params, router_state, original="Mixtral-8x7B-v0.1")

`open_checkpoint` is the same without reading the tensors, for a caller who takes them a layer at a time.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.convert.families import FAMILIES
from moe_jax.convert.family import Family
from moe_jax.convert.hf_config import differences, family_of, find_family, from_hf, to_hf
from moe_jax.convert.plan import PARAMS, ROUTER_STATE, Leaf, Plan
from moe_jax.convert.quantised import dequantised
from moe_jax.convert.safetensors_files import (
    SHARD_BYTES,
    TensorFiles,
    read_json,
    write_json,
    write_shards,
)
from moe_jax.validation import CheckpointError

CONFIG = "config.json"
# What else of an original checkpoint belongs to a copy of it.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was found to hold what its config.json says.

    Attributes:
      config: its config.json.
      family: of its architecture.
      model: ours.
      plan: how `files` make the arrays of `model`.
      files: its tensors, not read yet; those of a quantised checkpoint as what they stand for.
    """

    config: Mapping[str, Any]
    family: Family
    model: ModelConfig
    plan: Plan
    files: Mapping[str, Any]


def open_checkpoint(directory: str | Path, model: ModelConfig | None = None) -> Checkpoint:
    """Opens a checkpoint and compares all its headers with its config.json.

    Args:
      directory: with config.json and model.safetensors, or several of them with an index.
      model: to be used in place of the config.json's, where it computes the same function (another dtype, dispatch, grouping of
        layers, balance loss).

    Raises:
      CheckpointError, ConfigError: what is wrong, in one sentence.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    family = family_of(config)
    found = from_hf(config, family)
    if model is not None and (wrong := differences(found, model)):
        field, (said, meant) = next(iter(wrong.items()))
        raise CheckpointError(
            f"model.{field} = {meant!r} but {directory / CONFIG} makes it {said!r}; the weights are for that, so change the config."
        )
    plan = Plan(model or found, family)
    files = dequantised(TensorFiles(directory), config)
    plan.check(files)
    return Checkpoint(config, family, model or found, plan, files)


def load_params(
    directory: str | Path, model: ModelConfig | None = None, dtype: Any = np.float32
) -> tuple[ModelConfig, dict, dict]:
    """(model, params, router_state) of a checkpoint, the latter two nested dicts of numpy arrays as `transformer.build` returns them.

    Args:
      directory: as `open_checkpoint`.
      model: as `open_checkpoint`.
      dtype: of params; the router's state is float32.

    Raises:
      CheckpointError, ConfigError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(directory, model)
    return checkpoint.model, *checkpoint.plan.read_all(checkpoint.files, dtype)


def save_hf(
    directory: str | Path,
    model: ModelConfig,
    params: Mapping[str, Any],
    router_state: Mapping[str, Any],
    *,
    original: str | Path | None = None,
    architecture: str = "",
    dtype: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that transformers loads: config.json, safetensors, and the tokenizer where there is an original.

    Args:
      directory: not there yet, or without weights.
      model: what `params` are of.
      params: as `transformer.build` returns them; numpy arrays or jax arrays.
      router_state: likewise.
      original: folder of the checkpoint that the model came from: its config's fields, tensor names and dtypes, tokenizer.
      architecture: default the original's, or else the first that can say what the model computes.
      dtype: of the parameters, while the balancing bias, whose steps half precision would lose, is float32; default the original's,
        tensor by tensor, or else the arrays' own.
      max_shard_bytes: of a file; one shard is in memory at a time.

    Raises:
      CheckpointError: an architecture that cannot say what the model computes, or a folder with weights.
    """
    trees = {PARAMS: params, ROUTER_STATE: router_state}
    export = Export(model, original, architecture, dtype)
    export.write(directory, lambda leaf, index: _slice(trees[leaf.tree], leaf, index), max_shard_bytes)


class Export:
    """A checkpoint about to be written; arguments as `save_hf`. `plan.leaves` are the arrays that `write` asks for."""

    def __init__(self, model: ModelConfig, original: str | Path | None = None, architecture: str = "", dtype: Any = None):
        self.original = Path(original) if original else None
        config = read_json(self.original / CONFIG) if self.original else None
        if architecture and architecture not in FAMILIES:
            raise CheckpointError(f"architecture = {architecture!r} is unknown; these can be written: {', '.join(FAMILIES)}.")
        if architecture:
            self.family = FAMILIES[architecture]
        else:
            self.family = family_of(config) if config else find_family(model)
        if config is not None and family_of(config) is not self.family:
            theirs = family_of(config).architecture
            raise CheckpointError(
                f"architecture = {architecture!r} while {self.original} is {theirs}; leave one of the two out."
            )
        self.config, self.plan = to_hf(model, self.family, config), Plan(model, self.family)
        self.dtype = None if dtype is None else np.dtype(dtype)
        files = dequantised(TensorFiles(self.original), config) if self.original else {}
        self.dtypes = {name: tensor.dtype for name, tensor in files.items()}

    def write(self, directory: str | Path, get, max_shard_bytes: int = SHARD_BYTES) -> None:
        """Writes the folder; `get(leaf, index)` gives one layer's slice of an array, and is asked layer by layer."""
        directory = Path(directory)
        if (directory / CONFIG).exists():
            raise CheckpointError(f"{directory} already holds {CONFIG}; write to an empty folder.")
        kinds: dict[str, int] = {}

        def cast(leaf, index):
            array = get(leaf, index)
            return array.astype((self.dtype or array.dtype) if leaf.tree == PARAMS else np.float32, copy=False)

        def tensors():
            for name, array in self.plan.tensors(cast, self.dtypes):
                if self.dtype is None:
                    array = array.astype(self.dtypes.get(name, array.dtype), copy=False)
                kinds[array.dtype.name] = kinds.get(array.dtype.name, 0) + array.size
                yield name, array

        write_shards(directory, tensors(), max_shard_bytes)
        for name in COMPANIONS if self.original else ():
            if (self.original / name).is_file():
                shutil.copyfile(self.original / name, directory / name)
        field = "torch_dtype" if "torch_dtype" in self.config else "dtype"
        write_json(directory / CONFIG, self.config | {field: max(kinds, key=kinds.get)})


def _slice(tree, leaf: Leaf, index: int):
    for name in leaf.path:
        tree = tree[name]
    return np.asarray(leaf.slice(tree, index))
