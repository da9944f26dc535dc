"""Hugging Face folders to run folders and back on disk, a layer at a time, whatever the size of the model.

A conversion works in RUN/conversion and writes down each layer it has finished; started again, it goes on from there. The checkpoint
gets its name, RUN/checkpoints/0, when everything else of the run is in place.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

from moe_jax.config import Config, to_dict
from moe_jax.convert.hugging_face import CONFIG, Checkpoint, Export, open_checkpoint
from moe_jax.convert.initial import PREFIX, complete
from moe_jax.convert.plan import PARAMS, Leaf
from moe_jax.convert.safetensors_files import SHARD_BYTES, read_json, write_json
from moe_jax.data.corpus import save_tokenizer
from moe_jax.data.tokenizers import load, load_pretrained, save_pretrained
from moe_jax.mesh import make_mesh
from moe_jax.sizes import with_vocabulary
from moe_jax.train import run
from moe_jax.train.files import write_atomic
from moe_jax.train.paths import leaf_names
from moe_jax.train.run_info import write_run_info
from moe_jax.train.stored_arrays import ArrayWriter, StoredArrays, chunk_shape
from moe_jax.validation import CheckpointError

WORK, PLAN, FINISHED = "conversion", "of.json", "finished"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def from_hf(hf: str | Path, config: Config, dtype: str = "float32") -> Config:
    """Makes a run folder, `config.workdir`, of a Hugging Face checkpoint: parameters and the router's state as step 0.

    Args:
      hf: folder with config.json, safetensors files and tokenizer.json.
      config: of the run; fields of the model at their default are the checkpoint's (`initial.complete`). Its mesh decides the layout.
      dtype: "float32" or "bfloat16", in which the parameters are stored; training reads either as float32. The router's state is
        float32.

    Returns: the config, complete, as it is in the run folder.

    Raises:
      ConfigError, CheckpointError, DataError: a checkpoint, mesh or folder that will not do; nothing has been written then.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype = {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    hf, workdir = Path(hf).absolute(), Path(config.workdir)
    _refuse_run(workdir)
    config = complete(dataclasses.replace(config, init_from=f"{PREFIX}{hf}"))
    run.check(config)
    tokenizer = load_pretrained(hf)
    config = with_vocabulary(config, tokenizer.vocab_size)
    mesh, checkpoint = make_mesh(config), open_checkpoint(hf, config.model)
    shapes = _shapes(config, mesh, DTYPES[dtype])
    _start(workdir / WORK, {"hf": str(hf), "files": _stamps(hf), "arrays": {name: repr(of) for name, of in shapes.items()}})
    if not (target := workdir / "checkpoints" / "0").exists():  # else killed in the last moment, and only to be tidied up
        writer = ArrayWriter(workdir / WORK / "0", shapes)
        _write_layers(checkpoint, workdir / WORK, writer)
        writer.finish({"data": None, "metrics": {}, "origin": None}, {run.BEST_METRIC: math.inf})
        save_tokenizer(tokenizer, config.workdir)
        write_run_info(config.workdir, to_dict(config))
        target.parent.mkdir(exist_ok=True)
        (workdir / WORK / "0").rename(target)
    shutil.rmtree(workdir / WORK)
    return config


def to_hf(
    workdir: str | Path,
    hf: str | Path,
    step: str = "latest",
    original: str | Path | None = None,
    dtype: str = "",
    architecture: str = "",
    max_shard_bytes: int = 0,
) -> None:
    """Writes a checkpoint of a run as a folder that transformers loads, a layer at a time.

    Args:
      workdir: the run folder.
      hf: folder to make, absent or without weights.
      step: "latest", "best" or a step.
      original: folder whose config's fields, tensor names and dtypes, and tokenizer the copy has; without it the architecture is
        the first that can say what the model computes, and the tokenizer the run's.
      dtype: of the parameters; "" = the original's, else as stored.
      architecture: of the copy, where there is no original.
      max_shard_bytes: of a file; 0 = that of the original's largest, or `SHARD_BYTES`. One file is in memory at a time.

    Raises:
      ConfigError, CheckpointError: no run or checkpoint there, or a model that cannot be said; nothing has been written then.
    """
    if dtype and dtype not in DTYPES:
        raise CheckpointError(f"dtype = {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    config, hf = run.read_config(workdir), Path(hf)
    with run.checkpoints(config) as saved:
        arrays = StoredArrays(saved.path(run.find_step(saved, step)))
    export = Export(config.model, original, architecture, DTYPES.get(dtype))
    sizes = [file.stat().st_size for file in Path(original).glob("*.safetensors")] if original else []
    names = {leaf: _name(leaf) for leaf in export.plan.leaves}
    for leaf, name in names.items():
        if name not in arrays or tuple(arrays[name].shape) != leaf.shape:
            there = list(arrays[name].shape) if name in arrays else "absent"
            raise CheckpointError(
                f"{workdir}: {name} is {there} in the checkpoint and {list(leaf.shape)} in its config.json; one of the"
                " two is of another run."
            )
    opened = {name: arrays[name] for name in names.values()}
    draft = hf.with_name(f".{hf.name}.partial")
    if hf.exists() and any(hf.iterdir()):
        raise CheckpointError(f"{hf} is not empty; write to another folder.")
    shutil.rmtree(draft, ignore_errors=True)
    with tqdm(total=sum(len(leaf.layers) for leaf in names), desc="writing", unit="array", disable=None) as bar:

        def get(leaf: Leaf, index: int) -> np.ndarray:
            bar.update()
            store = opened[names[leaf]]
            return (store[index] if leaf.stacked else store).read().result()

        export.write(draft, get, max_shard_bytes or max(sizes, default=SHARD_BYTES))
    if original is None:
        _write_tokenizer(load(Path(workdir) / "tokenizer"), draft)
    if hf.exists():
        hf.rmdir()
    draft.rename(hf)


def _write_tokenizer(tokenizer, folder):
    """The tokenizer's files; every text begins and ends with its one special token."""
    save_pretrained(tokenizer, folder)
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    write_json(folder / CONFIG, read_json(folder / CONFIG) | ends)


def _refuse_run(workdir):
    """Raises CheckpointError where there is a run that is not this conversion's, left in its last moments."""
    saved = [path.name for path in (workdir / "checkpoints").glob("*")]
    own = (workdir / WORK).exists() and saved in ([], ["0"])
    if (saved or (workdir / CONFIG).exists()) and not own:
        raise CheckpointError(f"workdir = {str(workdir)!r} already holds a run; choose another folder.")


def _name(leaf):
    return "/".join((leaf.tree, *leaf.path))


def _shapes(config, mesh, dtype):
    """{name: (shape, dtype, chunk shape)} of the arrays of a checkpoint: a chunk is of one layer, and of one device where it can."""
    with jax.set_mesh(mesh):
        targets = run.abstract_weights(config, mesh)
    shapes = {"step": ((), np.dtype(np.int32), [])}
    leaves = dict(zip(leaf_names(targets), jax.tree.leaves(targets), strict=True))
    for name, target in leaves.items():
        kind = dtype if name.startswith(f"{PARAMS}/") else np.dtype(target.dtype)
        spec = [*target.sharding.spec, *[None] * (len(target.shape) - len(target.sharding.spec))]
        parts = [math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())) for axes in spec]
        if name.split("/")[1] in ("dense", "groups"):
            parts[0] = target.shape[0]
        shapes[name] = (tuple(target.shape), kind, chunk_shape(target.shape, kind.itemsize, parts))
    return shapes


def _stamps(folder):
    """Size and time of the files that a conversion reads."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}


def _start(work: Path, of: dict) -> None:
    """Makes the working folder, or finds that the one there is of the same conversion. Raises CheckpointError."""
    of = json.loads(json.dumps(of))
    if (work / PLAN).is_file():
        then = json.loads((work / PLAN).read_text())
        if wrong := [name for name in of if of[name] != then[name]]:
            raise CheckpointError(
                f"{work} holds an unfinished conversion with other {wrong[0]} (another checkpoint, dtype or mesh); repeat that one, or"
                " delete the folder."
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(work / PLAN, json.dumps(of))


def _finished(file: Path) -> Iterator[str]:
    """The names written down; a line cut off by a kill is none."""
    text = file.read_text() if file.is_file() else ""
    return (line.removesuffix("\n") for line in text.splitlines(keepends=True) if line.endswith("\n"))


def _write_layers(checkpoint: Checkpoint, work: Path, writer: ArrayWriter) -> None:
    done = set(_finished(work / FINISHED))
    layers = [layer for layer in checkpoint.plan.layers if str(layer) not in done]
    writer.write("step", np.zeros((), np.int32))
    total = len(checkpoint.plan.layers)
    with open(work / FINISHED, "a", encoding="utf-8") as finished:
        for layer in tqdm(layers, desc="converting", unit="layer", initial=total - len(layers), total=total, disable=None):
            for leaf in checkpoint.plan.leaves:
                if layer in leaf.layers:
                    index = leaf.layers.index(layer)
                    kind = writer.dtype(_name(leaf))
                    array = checkpoint.plan.read(leaf, index, checkpoint.files, kind)
                    writer.write(_name(leaf), array, index if leaf.stacked else None)
            finished.write(f"{layer}\n")
            finished.flush()
            os.fsync(finished.fileno())
