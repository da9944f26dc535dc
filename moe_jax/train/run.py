"""A run: the config made whole, its corpus, mesh and checkpoints; the same for training, evaluation and sampling."""

import dataclasses
import pathlib
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config import Config, ConfigError, MeshConfig, from_dict
from moe_jax.data.corpus import Corpus
from moe_jax.data.pipeline import validation_batches
from moe_jax.data.tokenizers import Tokenizer, load
from moe_jax.mesh import data_shards, emulate_devices, make_mesh, process_part
from moe_jax.models.transformer import abstract, build
from moe_jax.routing import language_router
from moe_jax.train import profile, sound
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.optimizer import learning_rate
from moe_jax.train.run_info import read_config_tree
from moe_jax.train.state import TrainState, create

BATCH_FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_weights")
EVALUATION_FIELDS = (*BATCH_FIELDS, "document_ids")
BEST_METRIC = "eval/loss"


@dataclass
class Restored:
    """A trained model on a mesh, for anything but training it further.

    Attributes:
      config: the run's, with the vocabulary filled in and the mesh asked for.
      step: of the checkpoint.
    """

    config: Config
    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    params: dict
    router_state: dict
    tokenizer: Tokenizer
    step: int


def check(config: Config) -> None:
    """What can be refused before devices, data and folders are touched: the router's options, the schedule. Raises ConfigError."""
    learning_rate(config.optimizer, config.train.steps)
    profile.window(config)
    if config.model.num_moe_layers:
        language_router(config.model.moe.router, config.model.moe.num_experts)


def checkpoints(config: Config) -> Checkpoints:
    """The checkpoints of the run folder; the best is that of the lowest validation loss."""
    return Checkpoints(
        pathlib.Path(config.workdir) / "checkpoints", keep=config.train.keep_checkpoints, best_metric=BEST_METRIC
    )


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the train state on `mesh` (the ambient one)."""
    return _placed(jax.eval_shape(lambda: create(config)[2]), mesh)


def abstract_weights(config: Config, mesh: jax.sharding.Mesh) -> dict[str, dict]:
    """The parameters and the router's state alone, `{"params": ..., "router_state": ...}`, as `abstract_state`."""
    params, router_state = _placed(jax.eval_shape(lambda: build(config.model, 0)[1:]), mesh)
    return {"params": params, "router_state": router_state}


def _placed(shapes, mesh):
    def place(leaf):
        spec = leaf.sharding.spec if leaf.sharding else P()  # optax's step counts have none
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)


def evaluation_batches(config: Config, corpus: Corpus, mesh: jax.sharding.Mesh) -> dict[str, list[dict]]:
    """Validation batches of every domain, `train.eval_rows` rows each, with as many rows as a microbatch has."""
    microbatch = config.data.batch_size // config.train.accumulation
    batch_size = -(-microbatch // data_shards(mesh)) * data_shards(mesh)
    part, parts = process_part(mesh)
    return {
        domain: [
            {name: batch[name] for name in EVALUATION_FIELDS}
            for batch in validation_batches(
                corpus.validation,
                config.data.seq_len,
                domain,
                config.train.eval_rows,
                batch_size,
                process_index=part,
                process_count=parts,
            )
        ]
        for domain in corpus.validation.present
    }


def restore(workdir: str, which: str = "latest", mesh: MeshConfig | None = None) -> Restored:
    """Loads the model of a run folder onto `mesh` (default: the run's own).

    Args:
      workdir: the run folder.
      which: "latest", "best" (the latest where none was evaluated) or a step.

    Raises:
      ConfigError, CheckpointError: no run there, no such checkpoint or one that is not finite, or a mesh that does not fit.
    """
    folder, config = pathlib.Path(workdir), read_config(workdir)
    config = dataclasses.replace(config, mesh=mesh or config.mesh)
    emulate_devices(config.mesh.emulate)
    device_mesh = make_mesh(config)
    with checkpoints(config) as saved, jax.set_mesh(device_mesh):
        step = find_step(saved, which)
        weights, _ = sound.restore(saved, step, abstract_weights(config, device_mesh), part=True)
        graphdef = abstract(config.model)[0]
    tokenizer = load(folder / "tokenizer")
    return Restored(config, device_mesh, graphdef, weights["params"], weights["router_state"], tokenizer, step)


def read_config(workdir: str | pathlib.Path) -> Config:
    """The config that a run folder was made with, with this `workdir`. Raises ConfigError when there is no run."""
    folder = pathlib.Path(workdir)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"workdir = {str(folder)!r} holds no run (no config.json); train one with python -m launch.train.")
    return dataclasses.replace(from_dict(read_config_tree(folder)), workdir=str(folder))


def find_step(saved: Checkpoints, which: str) -> int:
    """The step that "latest", "best" (the latest where none was evaluated) or a number stands for. Raises ConfigError."""
    if which not in ("latest", "best"):
        if not which.isdigit():
            raise ConfigError(f"step = {which!r} is neither 'latest', 'best' nor a number.")
        return int(which)
    step = saved.latest() if which == "latest" or saved.best() is None else saved.best()
    if step is None:
        raise ConfigError(f"workdir = {str(saved.folder.parent)!r} has no {which} checkpoint; train the run first.")
    return step
