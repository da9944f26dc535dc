"""What training carries from step to step, and how it starts."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from moe_jax.config import Config
from moe_jax.models.transformer import abstract, build
from moe_jax.train.optimizer import make_optimizer


@struct.dataclass
class TrainState:
    """Nested dicts of arrays on the mesh; saving it and the data iterator's position saves the run.

    Attributes:
      step: int32, optimizer steps taken.
      params: float32 parameters.
      router_state: what routers keep, float32 [L, ...]: balancing biases [L, E] for most; an empty dict where there is nothing.
      opt_state: the state of the optax transformation.
    """

    step: jax.Array
    params: dict
    router_state: dict
    opt_state: optax.OptState


def create(
    config: Config, weights: tuple[dict, dict] | None = None
) -> tuple[nnx.GraphDef, optax.GradientTransformation, TrainState]:
    """Model, optimizer and initial state on the ambient mesh, a function of the config and its seed alone.

    Args:
      config: of the run.
      weights: params and router state to start from in place of random ones.
    """
    graphdef, *fresh = build(config.model, config.train.seed) if weights is None else (abstract(config.model)[0], *weights)
    params, router_state = fresh
    optimizer = make_optimizer(config.optimizer, config.train.steps, params)
    opt_state = jax.jit(optimizer.init)(params)
    step = jnp.zeros((), jnp.int32, out_sharding=jax.sharding.PartitionSpec())
    return graphdef, optimizer, TrainState(step, params, router_state, opt_state)
