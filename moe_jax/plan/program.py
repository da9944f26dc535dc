"""The train step of a config on a mesh that is described, or of devices that cannot run: traced, lowered, compiled; never executed."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config import Config
from moe_jax.mesh import batch_spec
from moe_jax.models import transformer
from moe_jax.train import run
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.state import TrainState
from moe_jax.train.step import make_train_step


@dataclass(frozen=True)
class Step:
    """A traced train step.

    Attributes:
      config: with its vocabulary and its mesh filled in.
      mesh: that it was traced on.
      state: shapes, dtypes and shardings of the train state.
      batch: the same of the batch, [B, S] by name.
      traced: `jax.jit(step).trace(state, batch, key)`.
    """

    config: Config
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    traced: jax.stages.Traced


def trace(config: Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Step:
    """Traces the whole train step: forward, backward, optimizer. About a second, whatever the size.

    Args:
      config: with `model.vocab_size` set; what no training step of a plan has (records, replay) is off.
      mesh: `topology.abstract_mesh`, or a mesh of devices to compile for.

    Raises:
      ConfigError: what cannot be laid out on this mesh.
    """
    ambient = jax.set_mesh if isinstance(mesh, jax.sharding.Mesh) else jax.sharding.use_abstract_mesh
    with ambient(mesh):
        state = run.abstract_state(config, mesh)
        graphdef = transformer.abstract(config.model)[0]
        optimizer = make_optimizer(config.optimizer, config.train.steps, state.params)
        batch = _batch(config, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))
        traced = make_train_step(config, graphdef, optimizer).trace(state, batch, key)
    return Step(config, mesh, state, batch, traced)


def compile_step(step: Step, **options) -> jax.stages.Compiled:
    """Compiles a step that was traced on a mesh of devices; `options` go to XLA.

    Raises:
      jax.errors.JaxRuntimeError: XLA's own refusal, on TPUs also that the program does not fit.
    """
    with jax.set_mesh(step.mesh):
        return step.traced.lower().compile(options or None)


def _batch(config, mesh):
    def array(dtype):
        shape = (config.data.batch_size, config.data.seq_len)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, batch_spec(2)))

    return {name: array(jnp.float32 if name == "loss_weights" else jnp.int32) for name in run.BATCH_FIELDS}
