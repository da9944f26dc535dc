"""A plan as a readable table and as JSON."""

import math
from typing import Any

import jax

from moe_jax.analysis.describe import show, table
from moe_jax.mesh import AXES
from moe_jax.plan import memory, traffic
from moe_jax.plan.load import Simulation
from moe_jax.plan.plan import Plan

PARTS = {
    "parameters": "parameters, float32",
    "router_state": "routers' state",
    "optimizer": "optimizer's moments",
    "batch": "batch",
    "gradients": "gradients at the worst moment",
    "kept": "kept for the backward pass",
    "exchange": "rows on their way between devices",
    "working": "everything else at the worst moment",
}
UNKNOWN = {
    "jaxpr": (
        "memory: what a compiler fuses, copies and recomputes is guessed by rules; code and fragmentation are not in it",
        "traffic: a compiler may join or repeat collectives; of exchanges whose sizes are data the most that they can be",
        "time: rates of data sheets; launches, synchronisation, other jobs on the network and slow devices are not in it",
    )
}


def text(plan: Plan, name: str, depth: str, largest_batch: int | None = None, simulation: Simulation | None = None) -> str:
    """The plan for people, of a few dozen lines.

    Args:
      plan: to show.
      name: of the config.
      depth: the plan's.
      largest_batch: `memory.largest_batch` of it; None where it was not looked for.
      simulation: the step under measured routing; None where none was given.
    """
    sections = [_header(plan, name, depth), table("memory of a device", _memory_rows(plan, largest_batch))]
    if plan.verdict:
        sections.append(table(f"by the compiler ({plan.verdict.seconds:.0f} s)", _verdict_rows(plan.verdict)))
    sections.append(table("sent by a device", _traffic_rows(plan)))
    if plan.time:
        sections += [table("time of a step", _time_rows(plan.time)), table("rates", [(line, "", "") for line in plan.time.machine])]
    if simulation:
        sections.append(table("under the recorded routing", _load_rows(simulation)))
    unknown = plan.verdict.unknown if plan.verdict else UNKNOWN[depth]
    return "\n\n".join([*sections, "\n".join([f"depth {depth} cannot know", *(f"  {sentence}" for sentence in unknown)])])
