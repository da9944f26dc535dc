"""The best layout of a config on a topology: mesh shapes first, then exchange, remat and microbatches of the best of them.

Each candidate is traced, not compiled: its memory, traffic and time are those of `plan.plan` at depth "jaxpr". What does not fit is
left out; of the rest the quickest predicted step wins.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from moe_jax import validation
from moe_jax.config import Config, ConfigError, MeshConfig
from moe_jax.mesh import AXES
from moe_jax.plan.plan import Plan
from moe_jax.plan.topology import Topology
from moe_jax.sizes import num_params

REMAT = (("none", False), ("dots", False), ("full", False), ("full", True))  # model.remat, model.moe.remat_exchange
AT_REST = 16  # bytes a parameter: itself, two moments, its gradient, all float32
MAX_TENSOR = 8  # wider, a product's share of a device is too narrow for its matrix unit to be worth tracing


@dataclass(frozen=True)
class Found:
    """What a search saw.

    Attributes:
      best: plans that fit, the quickest first.
      tried: candidates that were traced.
      too_large: of these, those that do not fit.
      refused: sentences of candidates that cannot be laid out, each once.
      smallest: of those that do not fit the plan of least memory; None if there is none.
    """

    best: tuple[Plan, ...]
    tried: int
    too_large: int
    refused: tuple[str, ...]
    smallest: Plan | None


def search(
    config: Config, topology: Topology, evaluate: Callable[[Config], Plan], keep: int = 3, say: Callable[[str], None] = print
) -> Found:
    """Tries layouts of `config` on `topology`.

    Args:
      config: batch, sequence length and model are kept; mesh, exchange, remat and accumulation are not.
      topology: of the devices.
      evaluate: the plan of a config; raises ConfigError for one that cannot be laid out.
      keep: how many of the best to give, and how many meshes go on to the second round.
      say: called with a line before each round.

    Returns:
      The best, which are few where little fits.
    """
    trial = _Trial(evaluate)
    every = list(meshes(config, topology.num_devices))
    shapes = [mesh for mesh in every if at_rest(config, mesh) < topology.chip.memory or not topology.chip.memory]
    say(
        f"{len(every)} mesh shapes, on {len(shapes)} of which parameters, optimizer and gradients fit; with the config's exchange"
        f" ({config.model.moe.exchange}), remat and microbatches"
    )
    first = trial.run(on_mesh(config, shape) for shape in shapes)
    kept = _distinct(sorted(first, key=_rank), keep)
    variants = list(itertools.chain.from_iterable(_variants(plan.config) for plan in kept))
    say(f"{len(variants)} combinations of exchange, remat and microbatches, on {len(kept)} of the shapes")
    plans = [*first, *trial.run(variants)]
    fitting = sorted((plan for plan in plans if plan.fits), key=_rank)
    large = sorted((plan for plan in plans if not plan.fits), key=lambda plan: plan.memory.total)
    return Found(tuple(fitting[:keep]), len(plans), len(large), tuple(trial.refused), large[0] if large else None)


class _Trial:
    """Evaluates each config once."""

    def __init__(self, evaluate):
        self.evaluate, self.seen, self.refused = evaluate, set(), {}

    def run(self, configs: Iterable[Config]) -> list[Plan]:
        plans = []
        for config in configs:
            key = layout_flags(config)
            if key in self.seen:
                continue
            self.seen.add(key)
            try:
                plans.append(self.evaluate(config))
            except ConfigError as error:
                self.refused.setdefault(str(error))
        return plans


def meshes(config: Config, num_devices: int) -> Iterator[MeshConfig]:
    """Every way to write `num_devices` as data x fsdp x expert x tensor that the config's batch and widths allow."""
    experts = config.model.moe.num_experts
    for expert, tensor in itertools.product(_divisors(num_devices), repeat=2):
        if tensor > MAX_TENSOR or num_devices % (expert * tensor) or (expert > 1 and (not experts or experts % expert)):
            continue
        left = num_devices // (expert * tensor)
        for fsdp in _divisors(left):
            mesh = MeshConfig(data=left // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)
            try:
                validation.check_devices(dataclasses.replace(config, mesh=mesh), num_devices)
            except ConfigError:
                continue
            yield mesh


def at_rest(config: Config, mesh: MeshConfig) -> float:
    """Bytes a device holds at least: float32 parameters, two moments, gradients, as far as the axes split them."""
    count = num_params(config.model)
    split = mesh.fsdp * mesh.tensor
    return AT_REST * (count.experts / (split * mesh.expert_outer * mesh.expert) + (count.total - count.experts) / split)


def on_mesh(config: Config, mesh: MeshConfig) -> Config:
    """`config` on `mesh`, its exchange "auto" where the mesh has no expert axis for another."""
    moe = config.model.moe
    if mesh.expert * mesh.expert_outer == 1 and moe.exchange != "auto":
        moe = dataclasses.replace(moe, exchange="auto")
    return dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, moe=moe))


def _variants(config: Config) -> Iterator[Config]:
    """The same mesh with other exchanges, remat policies and numbers of microbatches."""
    exchanges = ("all_to_all", "ragged", "all_gather") if config.mesh.expert * config.mesh.expert_outer > 1 else ("auto",)
    for exchange, (remat, remat_exchange), accumulation in itertools.product(exchanges, REMAT, _microbatches(config)):
        moe = dataclasses.replace(config.model.moe, exchange=exchange, remat_exchange=remat_exchange)
        model = dataclasses.replace(config.model, remat=remat, moe=moe)
        yield dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, accumulation=accumulation))


def _microbatches(config):
    """1, 2 and 4, and the config's own, as far as the rows of a data shard go round."""
    mesh = config.mesh
    rows = config.data.batch_size // (mesh.data * mesh.expert_outer * mesh.fsdp * mesh.expert)
    return [n for n in sorted({1, 2, 4, config.train.accumulation}) if rows % n == 0]


def _rank(plan: Plan):
    """What fits before what does not, then by time; of what does not fit the smallest first."""
    return (not plan.fits, plan.time.seconds if plan.fits else plan.memory.total)


def _distinct(plans, count):
    """The first `count` plans of different meshes."""
    by_mesh = {}
    for plan in plans:
        by_mesh.setdefault(plan.config.mesh, plan)
    return list(by_mesh.values())[:count]


def _divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def layout_flags(config: Config) -> str:
    """The command-line flags that lay a config out like this."""
    mesh = " ".join(f"--config.mesh.{axis}={getattr(config.mesh, axis)}" for axis in AXES)
    rest = {
        "model.moe.exchange": config.model.moe.exchange,
        "model.remat": config.model.remat,
        "model.moe.remat_exchange": config.model.moe.remat_exchange,
        "train.accumulation": config.train.accumulation,
    }
    return " ".join([mesh, *(f"--config.{name}={value}" for name, value in rest.items())])
