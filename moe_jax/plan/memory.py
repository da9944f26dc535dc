"""Bytes of a device that a train step needs, by part, and whether they fit, from the traced step alone; nothing is compiled.

Arguments are exact. What is kept for the backward pass is read off the trace: what the forward pass computes and the backward pass
reads, the stacks between the loops over layers above all. What else is alive at the worst moment is a walk over the whole step
(`plan.liveness`), within a few percent of what XLA asks for (docs/plans/memory.md compares). No compiler's word is in it: neither code,
nor fragmentation, nor what a compiler chooses to compute twice when memory runs out.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax

from moe_jax.config import Config, ConfigError
from moe_jax.mesh import data_shards
from moe_jax.plan import liveness, program
from moe_jax.plan.buffers import Buffers, buffers
from moe_jax.plan.chips import Chip
from moe_jax.plan.dataflow import Dataflow, Value, dataflow
from moe_jax.plan.topology import Topology, abstract_mesh

BACKWARD = "transpose("  # in the scopes of what JAX makes for the backward pass
DOUBT = 0.15  # how far the total may be from a compiler's


@dataclass(frozen=True)
class Memory:
    """Bytes of the device that needs most; all devices need the same.

    The first eight are what is there at the worst moment, and add up to `total`.

    Attributes:
      parameters: float32.
      router_state: what routers keep.
      optimizer: moments and counts.
      batch: the batch and the key.
      gradients: those of whole stacks of layers that are there at the worst moment.
      kept: what the forward pass left for the backward pass.
      exchange: rows of tokens on their way between devices, and those that arrived.
      working: everything else: activations of one layer and their gradients, gathered weights, attention's scores, logits.
      total: the sum.
      all_kept: all that the backward pass reads of the forward pass, be it there at the worst moment or not.
      all_gradients: gradients of all parameters, which the optimizer reads.
      buffers: rows of one MoE layer's exchange as they are, at the worst load and at the expected one; None without experts or exchange.
      at: what runs at the worst moment: JAX's scopes and primitive.
    """

    parameters: int
    router_state: int
    optimizer: int
    batch: int
    gradients: int
    kept: int
    exchange: int
    working: int
    total: int
    all_kept: int
    all_gradients: int
    buffers: Buffers | None
    at: str


@dataclass(frozen=True)
class Fit:
    """Whether a step fits a device.

    Attributes:
      fits: the verdict.
      sure: False where the difference is less than the estimate may be wrong by: ask the compiler.
      free: bytes left; negative where they are missing.
      sentence: the verdict in words.
    """

    fits: bool
    sure: bool
    free: int
    sentence: str


def memory(step: program.Step, topology: Topology) -> Memory:
    """What a traced step needs of each device of `topology`. One to five seconds, whatever the size."""
    state = step.state
    arguments = {
        "parameters": _at_rest(state.params),
        "router_state": _at_rest(state.router_state),
        "optimizer": _at_rest(state.opt_state) + _at_rest(state.step),
        "batch": _at_rest(step.batch) + 8,
    }
    flow = dataflow(step.traced.jaxpr)
    moment, kept = liveness.worst(flow, topology.chip.platform), _kept(flow)
    shares = dict.fromkeys(("gradients", "kept", "exchange", "working"), 0)
    for value in moment.values:
        shares[_share(value, kept)] += value.bytes
    return Memory(
        **arguments,
        **shares,
        total=sum(arguments.values()) + moment.bytes,
        all_kept=sum(value.bytes for value in kept.values()),
        all_gradients=arguments["parameters"],
        buffers=buffers(step.config, topology.num_devices),
        at=moment.at,
    )


def fits(memory: Memory, chip: Chip) -> Fit:
    """Whether it fits the chip's memory.

    Raises:
      ConfigError: the memory of such a device is not known (a CPU's is the machine's).
    """
    if not chip.memory:
        raise ConfigError(
            f"topology = {chip.name!r} has no memory of its own to fit into; name an accelerator, e.g. v5p:4x4x4."
        )
    free = chip.memory - memory.total
    sure = abs(free) > DOUBT * memory.total
    needed, there = f"{memory.total / 2**30:.2f} GiB", f"{chip.memory / 2**30:.2f} GiB of {chip.name}"
    verdict = f"fits: {needed} of the {there}" if free >= 0 else f"does not fit: {needed} are needed and there are {there}"
    doubt = "" if sure else f"; closer than the {DOUBT:.0%} that this estimate may be off: let the compiler decide"
    return Fit(free >= 0, sure, free, verdict + doubt)


def largest_batch(config: Config, topology: Topology) -> int:
    """The largest `data.batch_size` whose step fits, in multiples of what the mesh and `train.accumulation` allow; 0 if none does.

    Memory grows nearly evenly with the rows, so that two traces tell where to look, and a few more make sure.

    Raises:
      ConfigError: as `fits` and `program.trace`.
    """
    mesh = abstract_mesh(config, topology)
    unit = data_shards(mesh) * config.train.accumulation

    def free(rows):
        sized = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows * unit))
        return fits(memory(program.trace(sized, mesh), topology), topology.chip).free

    return last_that_fits(free) * unit


def last_that_fits(free: Callable[[int], int]) -> int:
    """The largest n from 1 on whose `free(n)` is not negative, 0 if none is; free falls with n, nearly evenly. Asks for few n."""
    left = {1: free(1)}
    if left[1] < 0:
        return 0
    left[2] = free(2)
    good, bad = (2, None) if left[2] >= 0 else (1, 2)
    while bad is None or bad - good > 1:
        low, high = sorted(left)[-2:] if bad is None else (good, bad)
        growth = max((left[low] - left[high]) / (high - low), 1)
        guess = math.floor(good + left[good] / growth)
        guess = min(max(guess, good + 1), 64 * good if bad is None else bad - 1)
        left[guess] = free(guess)
        good, bad = (guess, bad) if left[guess] >= 0 else (good, guess)
    return good


def _at_rest(tree) -> int:
    """Bytes of one device's shards."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _kept(flow: Dataflow) -> dict[int, Value]:
    """By id, what the forward pass computes and stores and the backward pass reads; of the microbatches' loop, in its body."""
    forward, kept = set(), {}
    for node, read in liveness.stored_reads(flow):
        if node.primitive == "scan" and BACKWARD not in node.outputs[0].name:
            for body in node.bodies:
                kept |= _kept(body)
        is_backward = any(value is not None and BACKWARD in value.name for value in node.outputs)
        if is_backward:
            kept |= {id(value): value for value in read if id(value) in forward}
        else:
            forward |= {id(value) for value in node.outputs if value is not None}
    return kept


def _share(value, kept) -> str:
    if id(value) in kept:
        return "kept"
    scopes = value.name.split("/")
    if scopes[-1] == "scan" and BACKWARD in value.name:
        return "gradients"
    return "exchange" if "exchange" in scopes else "working"
