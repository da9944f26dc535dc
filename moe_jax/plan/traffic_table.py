"""A step's collectives as rows to print: what is sent when, by which part, over which axes; and what of the exchange carries a token."""

from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.analysis.describe import travels
from moe_jax.analysis.ledger import Entry
from moe_jax.config import Config
from moe_jax.mesh import BATCH_AXES, EXPERT_AXES

SCOPES = {"exchange": "exchange", "attention": "attention", "route": "router", "combine": "router", "experts": "experts"}
EXCHANGES = ("all-to-all", "ragged-all-to-all")


class Row(NamedTuple):
    """Collectives of one phase, part, kind and set of axes.

    Attributes:
      phase: "forward", "recompute" (for the backward pass), "backward", or "step" for what is outside the gradient.
      part: "attention", "ffn" (dense and shared experts, the norms' gradients), "router", "experts", "exchange", "counts" (of the
        routing), "ends" (embedding, head, loss), or "norms of gradients and metrics".
      kind, axes: as in `Entry`.
      layers: length of the stack of layers they are in; 1 outside.
      executions: arrays sent in a step.
      layer_bytes: sent by a device in one pass through one layer, or in one pass where they are in no layer.
      step_bytes: in a step.
      upper_bound: whether that is a bound: a ragged exchange sends what its routing needs.
    """

    phase: str
    part: str
    kind: str
    axes: tuple[str, ...]
    layers: int
    executions: int
    layer_bytes: int
    step_bytes: int
    upper_bound: bool


class Useful(NamedTuple):
    """The exchange over one axis in a step: bytes of the buffers, and of the rows in them that carry a token when all experts are chosen
    evenly."""

    axis: str
    buffer_bytes: int
    expected_bytes: float


def table(entries: Sequence[Entry], config: Config) -> list[Row]:
    """`traffic.collectives` summed up, in order of first appearance; branches of conditionals are all in."""
    groups = {}
    for entry in entries:
        layers = layers_of(entry, config)
        groups.setdefault((phase(entry), part(entry), entry.kind, entry.axes, layers), []).append(entry)
    return [
        Row(
            *key,
            executions=sum(e.executions for e in group),
            layer_bytes=sum(e.bytes for e in group),
            step_bytes=sum(e.bytes * e.executions for e in group),
            upper_bound=any(e.upper_bound for e in group),
        )
        for key, group in groups.items()
    ]


def layers_of(entry: Entry, config: Config) -> int:
    """Length of the stack of layers an entry is in, microbatches apart; 1 for none."""
    loops = entry.loops
    if config.train.accumulation > 1 and loops and loops[0] == config.train.accumulation:
        loops = loops[1:]
    return loops[0] if loops else 1


def phase(entry: Entry) -> str:
    """Of `Row`, from the names that JAX's transformations leave."""
    if "rematted_computation" in entry.name:
        return "recompute"
    if "transpose(jvp" in entry.name:
        return "backward"
    return "forward" if "jvp(" in entry.name else "step"


def part(entry: Entry) -> str:
    """Of `Row`, from the model's named scopes."""
    path = entry.name.split("/")
    if "exchange" in path:
        return "exchange"
    if found := [SCOPES[name] for name in path if name in SCOPES]:
        return found[-1]
    if "shard_map" in path:
        return "counts" if entry.dtype == "int32" or (entry.kind == "all-reduce" and "tensor" not in entry.axes) else "experts"
    if phase(entry) == "step":
        return "norms of gradients and metrics"
    return "ffn" if "scan" in path and entry.loops else "ends"


def useful(entries: Sequence[Entry], config: Config) -> list[Useful]:
    """What the exchange's buffers hold when choices are even, by axis; nothing for an all_gather, which sends all to everybody.

    The share is that of the forward pass: the expected rows of `describe.travels` over the buffers' rows, words included.
    """
    model, found = config.model, []
    if not model.num_moe_layers:
        return []
    sizes = {axis: size for axis in EXPERT_AXES if (size := getattr(config.mesh, axis)) > 1}
    shards = [getattr(config.mesh, axis) for axis in BATCH_AXES]
    tokens = config.data.batch_size * config.data.seq_len // config.train.accumulation
    for size in shards:
        tokens //= size
    for axis, _, bytes_a_token in travels(model, sizes):
        mine = [e for e in entries if e.kind in EXCHANGES and e.axes == (axis,) and part(e) == "exchange"]
        layer = [e for e in mine if phase(e) == "forward" and layers_of(e, config) == model.num_moe_layers]
        if mine and layer:
            buffers = sum(e.bytes * e.executions for e in mine)
            share = tokens * bytes_a_token / sum(e.bytes for e in layer)
            found.append(Useful(axis, buffers, buffers * share))
    return found
