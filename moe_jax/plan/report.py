"""A plan as a readable table and as JSON."""

import dataclasses
from typing import Any

import jax

from moe_jax.analysis.describe import show, table
from moe_jax.analysis.ledger import total_bytes
from moe_jax.mesh import AXES
from moe_jax.plan import roofline, targets, traffic_table
from moe_jax.plan.load import Simulation
from moe_jax.plan.plan import Plan
from moe_jax.plan.search import Found, layout_flags

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
UNKNOWN = (  # whatever the depth; of memory `targets.UNKNOWN` says it
    "Traffic is what the trace asks for: a compiler may join or repeat collectives; of exchanges whose sizes are data it is the most.",
    "Time is by data sheets: launches, synchronisation, other jobs on the network and slow devices are not in it.",
)


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
        sections += [
            table("time of a step", _time_rows(plan.time)),
            table("rates", [(line, "", "") for line in plan.time.machine]),
        ]
    if simulation:
        sections.append(table("under the recorded routing", _load_rows(simulation)))
    unknown = [*targets.UNKNOWN[depth], *UNKNOWN]
    return "\n\n".join([*sections, "\n".join([f"depth {depth} cannot know", *(f"  {sentence}" for sentence in unknown)])])


def search_text(found: Found) -> str:
    """What a search found: for each of the best its figures and the flags that make it."""
    lines = [f"{found.tried} layouts traced; {found.too_large} do not fit, {len(found.refused)} kinds of refusal"]
    if not found.best:
        least = found.smallest
        lines.append(
            "nothing fits" + (f"; least memory: {least.fit.sentence}\n  {layout_flags(least.config)}" if least else "")
        )
    for place, plan in enumerate(found.best, 1):
        time = plan.time
        lines += [
            f"{place}. step {_seconds(time.seconds)}, MFU {time.mfu:.1%}, {show(plan.memory.total)} a device, bound by {time.bound_by}",
            f"   {layout_flags(plan.config)}",
        ]
        if plan.verdict:
            lines.append(f"   compiled: {_verdict_rows(plan.verdict)[-1][0]}")
    return "\n".join(lines)


def as_json(plan: Plan, name: str, depth: str) -> dict[str, Any]:
    """The plan's figures: bytes of one device, seconds, FLOPs; what `text` shows, unrounded."""
    count, fit = plan.parameters, plan.fit
    figures = {
        "config": name,
        "topology": plan.topology.text,
        "devices": plan.topology.num_devices,
        "mesh": {axis: getattr(plan.config.mesh, axis) for axis in AXES},
        "batch_size": plan.config.data.batch_size,
        "seq_len": plan.config.data.seq_len,
        "accumulation": plan.config.train.accumulation,
        "remat": plan.config.model.remat,
        "exchange": plan.config.model.moe.exchange,
        "depth": depth,
        "jax": jax.__version__,
        "parameters": {"total": count.total, "active": count.active},
        "flops": {"forward_of_a_token": plan.flops_per_token, "step": 3 * plan.flops_per_token * _tokens(plan)},
        "memory": dataclasses.asdict(plan.memory),
        "fits": plan.fits if fit or plan.verdict else None,
        "collectives": [
            {"purpose": roofline.purpose(entry), "executions": entry.executions, **_plain(entry)} for entry in plan.collectives
        ],
    }
    if plan.time:
        time = dataclasses.asdict(plan.time)
        time["network"] = [{"axes": axes, "purpose": what, "seconds": s} for (axes, what), s in plan.time.network.items()]
        figures["time"] = time
    if plan.verdict:
        figures["compiler"] = {name: value for name, value in vars(plan.verdict).items() if name != "compiled"}
    return figures


def _plain(entry):
    return {
        "kind": entry.kind,
        "axes": entry.axes,
        "dtype": entry.dtype,
        "bytes": entry.bytes,
        "upper_bound": entry.upper_bound,
    }


def _tokens(plan):
    return plan.config.data.batch_size * plan.config.data.seq_len


def _header(plan, name, depth):
    config, model, count = plan.config, plan.config.model, plan.parameters
    mesh = " x ".join(f"{axis} {size}" for axis in AXES if (size := getattr(config.mesh, axis)) > 1) or "one device"
    chip = plan.topology.chip
    devices = f"{plan.topology.num_devices} devices" + (f" of {show(chip.memory)}" if chip.memory else "")
    rows = config.data.batch_size
    return "\n".join(
        [
            f"{name} on {plan.topology.text}: {devices}, depth {depth}",
            f"  mesh {mesh}; remat {model.remat}, exchange {model.moe.exchange}, {config.train.accumulation} microbatch"
            + "es" * (config.train.accumulation > 1),
            f"  batch {rows:,} x {config.data.seq_len:,} = {_tokens(plan):,} tokens a step",
            f"  parameters {show(count.total, 1000)}, active {show(count.active, 1000)};"
            f" FLOPs forward {show(plan.flops_per_token, 1000)} a token, {show(3 * plan.flops_per_token * _tokens(plan), 1000)} a step",
        ]
    )


def _memory_rows(plan, largest):
    parts = dataclasses.asdict(plan.memory)
    rows = [(label, show(parts[part]), "") for part, label in PARTS.items() if parts[part]]
    rows.append(("total", show(plan.memory.total), f"the worst moment is at {plan.memory.at}"))
    if held := plan.memory.buffers:
        rows.append(
            (
                "of a layer's exchange, each way",
                show(held.static.bytes),
                f"{show(held.expected.bytes)} of it full at the expected load; {show(held.worst.bytes)} for any load",
            )
        )
    if plan.fit:
        rows.append((plan.fit.sentence, "", ""))
    if largest is not None:
        rows.append((_largest(plan, largest), "", ""))
    return rows


def _largest(plan, largest):
    return f"largest batch that fits: {largest:,} rows" if largest else "no batch fits on this mesh, not even one row a device"


def _verdict_rows(verdict):
    """The last row is the verdict in words: on a TPU it goes by whether the program compiled, whatever the sum."""
    if verdict.refusal:
        return [(f"does not fit: {verdict.refusal}", "", "")]
    names = ("arguments", "outputs", "temporaries", "code")
    rows = [(name, show(getattr(verdict, name)), "") for name in names]
    rows.append(("at the worst moment", show(verdict.peak), "without code and gaps"))
    rows.append(("sum of the first four", show(verdict.total), "more than is there at once"))
    needed = verdict.peak if verdict.depth == "tpu" else verdict.total
    word = ("compiles, and so fits" if verdict.depth == "tpu" else "fits") if verdict.fits else "does not fit"
    return [*rows, (f"{word}: {show(needed)} of {show(verdict.memory)}", "", "")]


def _traffic_rows(plan):
    """Collectives by part, phase, kind and axes, the largest first; those that together are less than a thousandth in one row."""
    every = sorted(traffic_table.table(plan.collectives, plan.config), key=lambda row: -row.step_bytes)
    total = total_bytes(plan.collectives)
    large = [row for row in every if row.step_bytes >= total / 1000]
    rows = []
    for row in large:
        most = "at most " * row.upper_bound
        each = f"{show(row.layer_bytes)} in each of {row.layers} layers, " if row.layers > 1 else ""
        what = f"{row.part}, {row.phase}: {row.kind} over {' x '.join(row.axes)}"
        rows.append((what, show(row.step_bytes), f"{most}{each}{row.executions:,} times"))
    if rest := every[len(large) :]:
        rows.append(
            ("smaller ones", show(sum(row.step_bytes for row in rest)), f"{sum(row.executions for row in rest):,} times")
        )
    rows.append(("a step", show(total), ""))
    for part in traffic_table.useful(plan.collectives, plan.config):
        note = f"of the {show(part.buffer_bytes)} that the buffers of the exchange over {part.axis} have room for"
        rows.append(("rows with a token in them", show(part.expected_bytes), note))
    return rows


def _time_rows(time):
    rows = [
        (part, _seconds(spent.seconds), f"matrix units {_seconds(spent.matrix)}, memory {_seconds(spent.memory)}")
        for part, spent in sorted(time.parts.items(), key=lambda item: -item[1].seconds)
    ]
    rows += [
        (f"network, {what} over {' x '.join(axes)}", _seconds(spent), "")
        for (axes, what), spent in sorted(time.network.items(), key=lambda item: -item[1])
    ]
    bounds = f"between {_seconds(time.bounds['all'])} (all overlaps) and {_seconds(time.bounds['none'])} (nothing does)"
    rows.append(("step", _seconds(time.seconds), bounds))
    rows.append(("tokens a second", f"{time.tokens_per_second:,.0f}", f"{time.tokens_per_second_per_device:,.0f} a device"))
    if time.mfu:
        rows.append(
            (
                "MFU",
                f"{time.mfu:.1%}",
                f"{time.mfu_whole_attention:.1%} with attention counted whole; of all FLOPs {time.hfu:.1%}",
            )
        )
    return [*rows, (f"bound by {time.bound_by}", "", "routing is taken to be perfectly balanced")]


def _load_rows(simulation: Simulation):
    cost = f"{simulation.seconds / simulation.balanced - 1:+.1%}; slowest {_seconds(simulation.slowest)}"
    rows = [("at perfect balance", _seconds(simulation.balanced), ""), ("as recorded", _seconds(simulation.seconds), cost)]
    for name, by_layer in (("experts", simulation.experts_L), ("exchange", simulation.exchange_L)):
        text = "by layer " + " ".join(f"{value:.2f}" for value in by_layer)
        rows.append((f"slowest device over the mean, {name}", f"{max(by_layer):.2f}", text))
    buffers = [(f"{b.name} {b.factor:g}", _seconds(b.seconds), f"{b.dropped:.2%} dropped") for b in simulation.buffers]
    return rows + buffers


def _seconds(value):
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} us"
