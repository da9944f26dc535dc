"""Runs and samples that start from a Hugging Face checkpoint: the config made whole, the weights on the mesh a layer at a time."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from moe_jax.config import Config, ConfigError, MeshConfig, ModelConfig
from moe_jax.convert.hf_config import differences, from_hf
from moe_jax.convert.hugging_face import CONFIG, Checkpoint, open_checkpoint
from moe_jax.convert.safetensors_files import read_json
from moe_jax.data.tokenizers import load_pretrained
from moe_jax.mesh import emulate_devices, make_mesh
from moe_jax.models.transformer import abstract
from moe_jax.routing import default_options
from moe_jax.sizes import with_vocabulary
from moe_jax.train import run
from moe_jax.train.run import Restored

PREFIX = "hf:"


def complete(config: Config) -> Config:
    """The config with what `init_from` says of the model and the tokenizer: every field at its default is the checkpoint's.

    A run folder that was started from the same place says it again, so that the checkpoint need not be there any more.

    Raises:
      ConfigError: a field that computes another function than the weights are for, or another tokenizer.
      CheckpointError: no config.json, or one of no model of ours.
    """
    if not config.init_from:
        return config
    folder = Path(config.init_from.removeprefix(PREFIX))
    if (
        config.workdir
        and (Path(config.workdir) / CONFIG).is_file()
        and (then := run.read_config(config.workdir)).init_from == config.init_from
    ):
        found, tokenizer = then.model, then.data.tokenizer
    else:
        found, tokenizer = from_hf(read_json(folder / CONFIG)), config.init_from
    model = merge(found, config.model)
    if wrong := differences(found, model):
        field, (said, meant) = next(iter(wrong.items()))
        raise ConfigError(
            f"model.{field} = {meant!r} and init_from = {config.init_from!r} has a model with {said!r}; the weights are for that, so"
            f" leave model.{field} out."
        )
    if config.data.tokenizer not in ("bytes", tokenizer) and not config.data.tokenizer.startswith(PREFIX):
        raise ConfigError(
            f"data.tokenizer = {config.data.tokenizer!r} while init_from = {config.init_from!r}, whose weights know the ids of its own"
            " tokenizer; leave data.tokenizer out."
        )
    data = config.data if config.data.tokenizer != "bytes" else dataclasses.replace(config.data, tokenizer=tokenizer)
    return dataclasses.replace(config, model=model, data=data)


def merge(found: ModelConfig, asked: ModelConfig) -> ModelConfig:
    """`found` with the fields of `asked` that are not at their default; of a router's options likewise."""
    model = _pick(found, asked, ModelConfig())
    router = model.moe.router
    default = default_options().get(router.name, {})
    theirs, ours = (of.moe.router.options if of.moe.router.name == router.name else {} for of in (found, asked))
    changed = {name: value for name, value in ours.items() if value != default.get(name)}
    router = dataclasses.replace(router, options={**default, **theirs, **changed})
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, router=router))


def _pick(found, asked, default):
    if not dataclasses.is_dataclass(found):
        return found if asked == default else asked
    names = [field.name for field in dataclasses.fields(found)]
    picked = {name: _pick(getattr(found, name), getattr(asked, name), getattr(default, name)) for name in names}
    return dataclasses.replace(found, **picked)


def open_for(config: Config) -> Checkpoint:
    """The checkpoint of `init_from`, its headers checked for the model of a complete config. Raises CheckpointError."""
    return open_checkpoint(config.init_from.removeprefix(PREFIX), config.model)


def load(checkpoint: Checkpoint, config: Config, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
    """(params, router_state) on `mesh`, the ambient one, as `transformer.build` lays them out.

    A layer of one array is in the host's memory at a time; the rest is on the devices.
    """
    targets = run.abstract_weights(config, mesh)
    trees = jax.tree.map(lambda target: None, targets)
    for leaf in tqdm(checkpoint.plan.leaves, desc="loading", unit="array", disable=None):
        _walk(trees, leaf, leaf.path[:-1])[leaf.path[-1]] = _array(checkpoint, leaf, _walk(targets, leaf, leaf.path))
    return trees["params"], trees["router_state"]


def restore(workdir: str, which: str = "latest", mesh: MeshConfig | None = None) -> Restored:
    """The model of a run folder, as `run.restore`, or that of "hf:FOLDER" from its files, as step 0.

    Raises:
      ConfigError, CheckpointError, DataError: what is not there, does not fit, or is no model of ours.
    """
    if not workdir.startswith(PREFIX):
        return run.restore(workdir, which, mesh)
    config = complete(Config(init_from=workdir, mesh=mesh or MeshConfig()))
    tokenizer = load_pretrained(workdir.removeprefix(PREFIX))
    config = with_vocabulary(config, tokenizer.vocab_size)
    emulate_devices(config.mesh.emulate)
    device_mesh, checkpoint = make_mesh(config), open_for(config)
    with jax.set_mesh(device_mesh):
        params, router_state = load(checkpoint, config, device_mesh)
        return Restored(config, device_mesh, abstract(config.model)[0], params, router_state, tokenizer, step=0)


def _walk(trees, leaf, path):
    node = trees[leaf.tree]
    for name in path:
        node = node[name]
    return node


def _array(checkpoint, leaf, target):
    def slice_(index, sharding):
        array = checkpoint.plan.read(leaf, index, checkpoint.files, np.dtype(target.dtype))
        return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])

    if not leaf.stacked:
        return slice_(0, target.sharding)
    of_slice = NamedSharding(target.sharding.mesh, P(*target.sharding.spec[1:]))
    array = _zeros(target.shape, target.dtype, target.sharding)
    for index in range(len(leaf.layers)):
        array = _put(array, slice_(index, of_slice), index)
    return array


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, sharding):
    return jnp.zeros(shape, dtype, out_sharding=sharding)


@partial(jax.jit, donate_argnums=0)
def _put(array, part, index):
    return jax.lax.dynamic_update_index_in_dim(array, part, index, 0)
