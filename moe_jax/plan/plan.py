"""The plan of a config on a topology: sizes, memory, traffic and time, put together; and the compiler's verdict where one is asked."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from moe_jax.analysis.ledger import Entry
from moe_jax.config import Config, ConfigError
from moe_jax.plan import memory, program, roofline, targets, topology, traffic
from moe_jax.plan.topology import Topology
from moe_jax.sizes import ParameterCount, flops_per_token, num_params

DEPTHS = ("jaxpr", "gpu", "tpu")


@dataclass(frozen=True)
class Plan:
    """What a config needs.

    Attributes:
      config: with its vocabulary filled in.
      topology: of the devices.
      parameters: by part.
      flops_per_token: matmul FLOPs of a token's forward pass.
      memory: bytes a device, by part.
      collectives: everything that a device sends in a step.
      time: seconds by part, and of the step; None for a CPU, which has no data sheet, unless its rates were measured.
      verdict: of the compiler; None at depth "jaxpr".
    """

    config: Config
    topology: Topology
    parameters: ParameterCount
    flops_per_token: int
    memory: memory.Memory
    collectives: Sequence[Entry]
    time: roofline.Prediction | None
    verdict: targets.Verdict | None = None

    @property
    def fit(self) -> memory.Fit | None:
        """By the count off the jaxpr; None for a CPU, whose memory is the machine's."""
        return memory.fits(self.memory, self.topology.chip) if self.topology.chip.memory else None

    @property
    def fits(self) -> bool:
        """By the compiler where it was asked, else by the count; True for a CPU."""
        return self.verdict.fits if self.verdict else self.fit is None or self.fit.fits


def plan(config: Config, where: Topology, machine: roofline.Machine | None = None) -> Plan:
    """The plan at depth "jaxpr": nothing is compiled, no package beside jax is needed.

    Args:
      config: with `model.vocab_size` set.
      where: the devices.
      machine: measured rates in place of the data sheet's.

    Raises:
      ConfigError: what cannot be laid out on these devices.
    """
    step = program.trace(config, topology.abstract_mesh(config, where))
    entries = traffic.collectives(step)
    return Plan(
        step.config,
        where,
        num_params(config.model),
        flops_per_token(config.model, config.data.seq_len),
        memory.memory(step, where),
        entries,
        roofline.predict(step, where, entries, machine=machine) if machine or where.chip.flops else None,
    )


def confirm(found: Plan) -> Plan:
    """The same plan with the verdict of the topology's own compiler.

    Raises:
      ConfigError: there is no such compiler, or it is not installed.
    """
    step = program.trace(found.config, targets.device_mesh(found.config, found.topology))
    return dataclasses.replace(found, verdict=targets.verdict(step, found.topology))


def check_depth(depth: str, where: Topology) -> None:
    """Raises ConfigError for a depth that is not this platform's."""
    if depth not in DEPTHS:
        raise ConfigError(f"depth = {depth!r} is unknown; choose one of {', '.join(DEPTHS)}.")
    if depth not in ("jaxpr", where.chip.platform):
        raise ConfigError(
            f"depth = {depth!r} compiles for {depth.upper()}s, and topology = {where.text!r} has none; use --depth=jaxpr"
            + (f" or --depth={where.chip.platform}." if where.chip.platform in DEPTHS else ".")
        )
