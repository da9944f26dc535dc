"""How long a step takes at the rates of the chip's data sheet: matrix units, memory and each network axis, part by part.

A product takes the longer of its FLOPs at the matrix unit's rate and its bytes at the memory's; passes over arrays take their bytes;
collectives take what `network` says. Three readings of the sum, none of them tuned to any measurement:

    all       everything overlaps with everything: the longest of matrix units, memory and the slowest group of network axes.
              Nothing can be faster, on the assumptions of `work`, `moved` and `network`.
    weights   the estimate in the middle: collectives of parameters and gradients (over axes without "tensor", not of an exchange) hide
              behind computation as far as there is any, as XLA's latency-hiding scheduler does with them; the exchange of tokens and the
              sums over tensor, on whose answers the next operation waits, do not.
    none      one after another.

Efficiencies: `Chip.matrix_efficiency`, 1 for TPUs, so that a TPU's prediction is what would be reached if every product ran at the data
sheet's rate, and MFU an upper estimate. Time per operation (launch, synchronisation) is not in it. Routing is perfectly balanced
(`plan.load` has other), there is no padding, and every step is like every other.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_jax.analysis.ledger import Entry
from moe_jax.config import Config, ConfigError
from moe_jax.ops.attention import choose_implementation
from moe_jax.plan import moved, work
from moe_jax.plan.network import Network
from moe_jax.plan.program import Step
from moe_jax.plan.topology import Topology
from moe_jax.sizes import flops_per_token

OVERLAPS = ("all", "weights", "none")
MOVED_PARTS = {
    "scores": "attention scores",
    "route": "router",
    "experts": "experts",
}  # whose time stands with the products' of a part


@dataclass(frozen=True)
class Machine:
    """What one device does in how many seconds.

    Attributes:
      matrix: of one execution of a product, at the rate of the matrix units.
      memory: of so many bytes read or written in so many passes.
      network: of one execution of a collective.
      text: what the figures are.
    """

    matrix: Callable[[work.Product], float]
    memory: Callable[[float, float], float]
    network: Callable[[Entry], float]
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartTime:
    """Seconds of one part in a step: of the matrix units, of memory, and the longer of both, product by product."""

    matrix: float
    memory: float
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """A step's time.

    Attributes:
      parts: time of computation by part.
      network: seconds by (mesh axes, "exchange", "tensor" or "weights").
      seconds: of a step, by the overlap that was asked for.
      bounds: the same by each of `OVERLAPS`.
      tokens: of a step, all devices together.
      tokens_per_second: of all devices.
      tokens_per_second_per_device: of one.
      mfu: model FLOPs (forward three times; attention over the causal half) over peak, 0 where no peak is known.
      mfu_whole_attention: the same with attention counted over the whole sequence, as MaxText and Megatron's older figures have it.
      hfu: FLOPs of the program, recomputation and blocks of attention included, over peak.
      bound_by: what takes longest: "matrix units", "memory" or "network (axes)".
      machine: what the rates are, in sentences.
    """

    parts: dict[str, PartTime]
    network: dict[tuple[tuple[str, ...], str], float]
    seconds: float
    bounds: dict[str, float]
    tokens: int
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float
    mfu_whole_attention: float
    hfu: float
    bound_by: str
    machine: tuple[str, ...]


def predict(
    step: Step,
    topology: Topology,
    entries: Sequence[Entry],
    *,
    overlap: str = "weights",
    machine: Machine | None = None,
    host_bandwidth: float | None = None,
    fused_attention: bool | None = None,
) -> Prediction:
    """Time of a step on `topology`.

    Args:
      step: traced on a mesh of this topology.
      topology: the devices.
      entries: every collective of the step (`plan.traffic.collectives`).
      overlap: which reading `seconds` and what follows from it are of: one of `OVERLAPS`.
      machine: measured rates instead of the data sheet's; a CPU needs them.
      host_bandwidth: bytes/s a GPU between hosts, instead of the table's assumption.
      fused_attention: whether scores stay on the chip, so that attention costs its FLOPs alone. None: as this code runs there, which is
        with cuDNN's kernel on a GPU where it can (`ops.attention.choose_implementation`), and else not.

    Raises:
      ConfigError: an unknown overlap, or a CPU without measured rates.
    """
    if overlap not in OVERLAPS:
        raise ConfigError(f"overlap = {overlap!r} is unknown; choose one of {', '.join(OVERLAPS)}.")
    machine = machine or data_sheet(step, topology, host_bandwidth)
    products, moves = work.products(step), moved.moves(step)
    fused = _has_fused_attention(step.config, topology) if fused_attention is None else fused_attention
    if fused:
        products = [dataclasses.replace(p, bytes=0.0) if p.part == "attention scores" else p for p in products]
        moves = [move for move in moves if move.part != "scores"]
    parts = _parts(machine, products, moves)
    network = _network(machine, [expected(e, step.config, dict(step.mesh.shape)) for e in entries])
    bounds = _bounds(parts, network)
    seconds, tokens, devices = bounds[overlap], step.config.data.batch_size * step.config.data.seq_len, topology.num_devices
    model, length = step.config.model, step.config.data.seq_len
    peak = topology.chip.matrix_rate(model.dtype) * devices
    done = sum(p.times * p.flops for p in products) * devices

    def share(flops):
        return flops / seconds / peak if peak else 0.0

    return Prediction(
        parts,
        network,
        seconds,
        bounds,
        tokens,
        tokens / seconds,
        tokens / seconds / devices,
        share(3 * flops_per_token(model, length) * tokens),
        share(3 * flops_per_token(model, 2 * length - 1) * tokens),  # a mean context of `length`
        share(done),
        _bound_by(parts, network),
        (*machine.text, f"attention's scores {'stay on the chip (a fused kernel)' if fused else 'go through memory'}"),
    )


def data_sheet(step: Step, topology: Topology, host_bandwidth: float | None = None) -> Machine:
    """The machine of `chips.CHIPS`. Raises ConfigError for a CPU."""
    chip = topology.chip
    if not chip.flops:
        raise ConfigError(
            f"topology = {topology.text!r} has no data sheet; measure the machine with `python -m launch.bench plan`, or plan for TPUs or"
            " GPUs."
        )
    network = Network(dict(step.mesh.shape), topology, host_bandwidth)
    text = [
        f"{chip.matrix_rate(step.config.model.dtype) / 1e12:.0f} TFLOP/s a device in {step.config.model.dtype}, of which large products"
        f" reach {chip.matrix_efficiency:.0%}{' (assumed: no measurement known)' if chip.matrix_efficiency == 1 else ''}",
        f"{chip.bandwidth / 1e9:.0f} GB/s of memory",
        f"links of {chip.link.bandwidth / 1e9:.0f} GB/s a direction, {chip.link.count} a chip",
    ]
    if chip.platform == "gpu" and topology.shape[0] > 1:
        given = "as given" if host_bandwidth else "an assumption"
        text.append(f"host network {network.host_bandwidth / 1e9:.0f} GB/s a GPU and direction ({given})")
    return Machine(
        lambda p: p.flops / (chip.matrix_rate(p.dtype) * chip.matrix_efficiency),
        lambda size, _: size / chip.bandwidth,
        network.seconds,
        (*text, *chip.sources),
    )


def expected(entry: Entry, config: Config, sizes: Mapping[str, int]) -> Entry:
    """A collective at balanced load: of one whose bytes depend on data (`upper_bound`), those of a token's row for each of its experts."""
    if not entry.upper_bound:
        return entry
    rows = work.expert_rows(config, dict(sizes))
    balanced = rows * config.model.d_model * work.itemsize(entry.dtype)
    return dataclasses.replace(entry, bytes=min(entry.bytes, round(balanced)))


def purpose(entry: Entry) -> str:
    """ "exchange" of tokens, sums over "tensor", or "weights": parameters, gradients and counts."""
    if entry.kind in ("all-to-all", "ragged-all-to-all", "collective-permute") or "exchange" in entry.name.split("/"):
        return "exchange"
    return "tensor" if "tensor" in entry.axes else "weights"


def _has_fused_attention(config, topology):
    a, platform = config.model.attention, topology.chip.platform
    width = a.head_dim + (a.rope_head_dim if a.kv_rank else 0)
    values = (a.v_head_dim or a.head_dim) if a.kv_rank else a.head_dim
    settings = {"platform": platform, "v_head_dim": values, "softcap": a.softcap, "sinks": a.sinks}
    return choose_implementation(a.implementation, config.model.dtype, width, **settings) == "cudnn"


def _parts(machine, products, moves):
    sums = defaultdict(lambda: [0.0, 0.0, 0.0])
    for p in products:
        matrix, memory = machine.matrix(p), machine.memory(p.bytes, 1)
        for i, value in enumerate((matrix, memory, max(matrix, memory))):
            sums[p.part][i] += p.times * value
    for move in moves:
        memory = machine.memory(move.bytes, move.times)
        for i, value in enumerate((0.0, memory, memory)):
            sums[MOVED_PARTS.get(move.part, move.part)][i] += value
    return {part: PartTime(*values) for part, values in sums.items()}


def _network(machine, entries):
    """Seconds of the collectives; of the branches of a conditional the cheapest, as `bodies` takes it."""
    totals, branches = defaultdict(float), defaultdict(lambda: defaultdict(list))
    for entry in entries:
        if entry.branch:
            branches[entry.branch[0].conditional][entry.branch[0].index].append(entry)
            continue
        totals[entry.axes, purpose(entry)] += machine.network(entry) * entry.executions
    for choices in branches.values():
        if 0 in choices and 1 in choices:
            taken = min(choices.values(), key=lambda chosen: sum(machine.network(e) * e.executions for e in chosen))
            for entry in taken:
                totals[entry.axes, purpose(entry)] += machine.network(entry) * entry.executions
    return dict(totals)


def _bounds(parts, network):
    matrix, memory, computed = (sum(getattr(p, name) for p in parts.values()) for name in ("matrix", "memory", "seconds"))
    by_axes = defaultdict(float)
    for (axes, _), seconds in network.items():
        by_axes[axes] += seconds
    weights = sum(seconds for (_, what), seconds in network.items() if what == "weights")
    waited = sum(network.values()) - weights
    return {
        "all": max(matrix, memory, *by_axes.values(), 0.0),
        "weights": max(computed, weights) + waited,
        "none": computed + weights + waited,
    }


def _bound_by(parts, network):
    longest = {
        "matrix units": sum(p.matrix for p in parts.values()),
        "memory": sum(p.memory for p in parts.values()),
    }
    for (axes, what), seconds in network.items():
        longest[f"network ({' x '.join(axes)}, {what})"] = seconds
    return max(longest, key=longest.get)
