"""Checkpoints of a run: asynchronous, atomic, the last few and the best kept, restored on any mesh.

A checkpoint is the folder `STEP/` with `state` (arrays under their names, as nested dicts, so that a reader needs none of the
training code's classes) and `extra` (JSON: the data iterator's position, the metrics). Orbax writes it under a temporary name
and renames it when every byte is there; whatever else is in the folder is skipped.
"""

import json
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from moe_jax.train import stored_arrays
from moe_jax.train.paths import leaf_names
from moe_jax.validation import CheckpointError

_LOG = logging.getLogger(__name__)
_WRITTEN_LAST = "_CHECKPOINT_METADATA"  # by Orbax, with the time of the commit
_NAMES = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
_NEEDED = ("state/_METADATA", "state/manifest.ocdbt", "extra/metadata")


class Checkpoints:
    """The checkpoints in one folder.

    Reading changes nothing on disk, so a second process may read while the first one trains. The folder is made by the first
    `save`, which also clears away what a killed run left half-written.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3, best_metric: str = "loss"):
        """
        Args:
          folder: holds one folder per checkpoint.
          keep: how many of the newest to keep; the best one is kept besides.
          best_metric: the entry of `extra["metrics"]` whose smallest value is best; a checkpoint without it is never best.
        """
        self.folder = pathlib.Path(folder).absolute()
        self._keep = keep
        self._best_metric = best_metric
        self._manager: ocp.CheckpointManager | None = None
        self._reported: set[str] = set()

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts saving and returns once the arrays are copied: the state may be donated to the next step.

        An error of an earlier save that ran in the background is raised here, or by `wait`.

        Args:
          step: optimizer steps taken, more than that of any checkpoint there.
          state: any tree of arrays; typed keys and every dtype included.
          extra: JSON; `extra["metrics"][best_metric]`, where given, ranks the checkpoint.

        Raises:
          CheckpointError: a checkpoint of this or a later step exists.
          TypeError: `extra` is not JSON.
        """
        self.wait()
        newest = self.latest()
        if newest is not None and newest >= step:
            raise CheckpointError(
                f"A checkpoint of step {newest} is already in {self.folder}, so step {step} is not saved over or behind it;"
                " resume from it, or give a new folder."
            )
        extra = json.loads(json.dumps(dict(extra)))  # refuses what is not JSON before anything is written
        if self._manager is None:
            self._manager = self._open_for_saving()
        arrays = jax.tree.map(_key_to_data, _by_name(state))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_nest(arrays), save_args=_nest(jax.tree.map(_save_args, arrays))),
                extra=ocp.args.JsonSave(extra),
            ),
            metrics={self._best_metric: _rank(extra, self._best_metric)},
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, None when there is none. Waits for the save under way, as `best` does."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the complete checkpoint with the smallest `best_metric`, the newest of equals, None when none has it."""
        ranks = {step: _rank(self.read_extra(step), self._best_metric) for step in self.steps()}
        finite = [(rank, -step) for step, rank in ranks.items() if rank < math.inf]
        return -min(finite)[1] if finite else None

    def restore(self, step: int, abstract_state: Any, part: bool = False) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint, bit for bit, onto the shardings asked for, whatever mesh it was saved on.

        Args:
          step: of a complete checkpoint.
          abstract_state: the tree to fill: arrays or `jax.ShapeDtypeStruct`s with their shardings (the default device without).
          part: the checkpoint may hold other arrays too, which are not read, and bfloat16 where float32 is asked for.

        Returns: the state in the form of `abstract_state`, and the `extra` given to `save`.

        Raises:
          CheckpointError: no such checkpoint, or one whose names, shapes or dtypes are not those of `abstract_state`.
        """
        path = self.path(step)
        wanted = _by_name(abstract_state)
        targets = {name: _target(leaf) for name, leaf in wanted.items()}
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(), extra=ocp.JsonCheckpointHandler(), metrics=ocp.JsonCheckpointHandler()
        )
        with ocp.Checkpointer(handler) as checkpointer:
            saved = _by_name(checkpointer.metadata(path).item_metadata["state"].tree)
            _check_fit({name: saved[name] for name in saved if name in wanted or not part}, targets, path, widen=part)
            item = _nest(targets)
            arguments = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.Composite(state=ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=part))
            arrays = _by_name(checkpointer.restore(path, args=args)["state"])
        leaves = [_data_to_key(arrays[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), self.read_extra(step)

    def path(self, step: int) -> pathlib.Path:
        """The folder of a complete checkpoint. Raises CheckpointError when there is none of this step."""
        if step not in self.steps():
            raise CheckpointError(
                f"No complete checkpoint of step {step} is in {self.folder}; there are {self.steps() or 'none'}."
            )
        return self.folder / str(step)

    def read_extra(self, step: int) -> dict[str, Any]:
        """The `extra` given to `save`, without reading arrays; `step` is of a complete checkpoint."""
        return json.loads((self.folder / str(step) / "extra" / "metadata").read_text())

    def wait(self) -> None:
        """Returns when the save under way is on disk; raises its error if it failed."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the save under way and ends the background threads."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open_for_saving(self):
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for entry in self._half_written():
                _clear_away(entry)
        multihost_utils.sync_global_devices("moe_jax checkpoint folder")
        by_metric = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics.get(self._best_metric, math.inf),
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(self._keep), by_metric])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=by_metric.get_metric_fn,  # makes Orbax store the metric, so that the policy outlives the process
            save_root_metadata=False,
            create=False,
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Those of the complete checkpoints, in order. Waits for the save under way."""
        self.wait()
        for entry in self._half_written():
            if entry.name not in self._reported:
                self._reported.add(entry.name)
                _LOG.warning("Skipped %s: a checkpoint that is half-written, or still being written.", entry)
        return sorted(int(entry.name) for entry in self._entries() if _is_complete(entry))

    def _half_written(self):
        return [entry for entry in self._entries() if not _is_complete(entry)]

    def _entries(self):
        """Folders that are, or were to become, checkpoints."""
        if not self.folder.is_dir():
            return []
        return [entry for entry in self.folder.iterdir() if entry.is_dir() and _NAMES.fullmatch(entry.name)]


def _is_complete(entry: pathlib.Path) -> bool:
    if not entry.name.isdigit() or not all((entry / name).is_file() for name in (_WRITTEN_LAST, *_NEEDED)):
        return False
    try:
        return json.loads((entry / _WRITTEN_LAST).read_text()).get("commit_timestamp_nsecs") is not None
    except json.JSONDecodeError:
        return False


def _clear_away(entry: pathlib.Path) -> None:
    """Removes Orbax's temporary folder; a folder with a checkpoint's name is put aside, whatever it holds."""
    if not entry.name.isdigit():
        shutil.rmtree(entry)
        return
    aside = entry.with_name(f"{entry.name}.incomplete")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}.incomplete")
    entry.rename(aside)


def _rank(extra, best_metric) -> float:
    """Smaller is better; a missing or non-finite metric ranks last."""
    value = extra.get("metrics", {}).get(best_metric)
    return float(value) if value is not None and math.isfinite(value) else math.inf


def _by_name(tree) -> dict[str, Any]:
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _nest(by_name):
    """{"a/b": 1} -> {"a": {"b": 1}}"""
    tree: dict[str, Any] = {}
    for name, leaf in by_name.items():
        *groups, last = name.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf
    return tree


def _save_args(array) -> ocp.SaveArgs:
    """Chunks of a large array are of few of its layers, so that one can be read alone (`stored_arrays.StoredArrays`)."""
    large = array.nbytes > stored_arrays.CHUNK_BYTES
    return ocp.SaveArgs(chunk_byte_size=stored_arrays.CHUNK_BYTES, shard_axes=(0,)) if large else ocp.SaveArgs()


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_to_data(leaf):
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _data_to_key(array, like):
    if not _is_key(like):
        return array
    impl = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)  # `like` may be a ShapeDtypeStruct
    return jax.random.wrap_key_data(array, impl=impl[0])


def _target(leaf) -> jax.ShapeDtypeStruct:
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _check_fit(saved, wanted, folder, widen):
    for name in sorted(wanted.keys() | saved.keys()):
        there = f"{saved[name].dtype}{list(saved[name].shape)}" if name in saved else "absent"
        asked = f"{wanted[name].dtype}{list(wanted[name].shape)}" if name in wanted else "absent"
        if there != asked and not (widen and there.replace("bfloat16", "float32") == asked):
            raise CheckpointError(
                f"The checkpoint in {folder} does not fit the model: {name} is {there} in the checkpoint and {asked} in the"
                " model; use the config it was trained with, or another folder."
            )
