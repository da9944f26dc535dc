"""Published utilisation beside what `roofline` predicts for the same setting, nothing tuned: the section docs/plans/published.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_jax.analysis.ledger import Entry
from moe_jax.config import Config
from moe_jax.plan import program, roofline, topology
from moe_jax.plan.topology import Topology

MAXTEXT = "MaxText, docs/reference/models/tiering.md"


@dataclass(frozen=True)
class Published:
    """A figure that somebody measured.

    Attributes:
      name: the model.
      topology: the devices, as `topology.parse` reads them.
      config: config file and argument of the same setting in this codebase.
      mfu: published, attention counted over the whole sequence.
      tokens_per_second: published, a device.
      source: who published it.
      setting: what is known of how it was run, and what had to be assumed.
    """

    name: str
    topology: str
    config: str
    mfu: float
    tokens_per_second: float
    source: str
    setting: str


_SAME = "model.moe.exchange_factor=0,mesh.data=1,mesh.expert=1,train.observe=False"
_MIXTRAL = f"configs/published/mixtral_8x7b.py:{_SAME}"
_V5P = (
    "36 sequences of 4,096 tokens a chip, parameters split over all chips (fsdp), no dropping, full recomputation, as MaxText's"
    " benchmark mixtral_8x7b_dropless_v5p_512 has it (512 cores are 256 chips). MaxText keeps weights in bfloat16 there, this"
    " codebase in float32. The table says 256 chips and 8x4x4, which is 128: both are planned."
)
FIGURES = (
    Published(
        *("Mixtral 8x7B", "v5p:4x8x8", f"{_MIXTRAL},mesh.fsdp=256,data.batch_size=9216"),
        *(0.5256, 2909, f"{MAXTEXT}: v5p, 8x4x4", _V5P),
    ),
    Published(
        *("Mixtral 8x7B", "v5p:4x4x8", f"{_MIXTRAL},mesh.fsdp=128,data.batch_size=4608"),
        *(0.5256, 2909, f"{MAXTEXT}: v5p, 8x4x4", "As above, on 128 chips."),
    ),
    Published(
        "Mixtral 8x7B",
        "v6e:16x16",
        f"{_MIXTRAL},mesh.fsdp=256,data.batch_size=3072",
        0.3523,
        3899,
        f"{MAXTEXT}: v6e-256",
        "12 sequences of 4,096 tokens a chip, fsdp over all chips, no dropping, full recomputation, as MaxText's benchmark"
        " mixtral_8x7b_dropless has it. Its other one, mixtral_8x7b_dropped, has a capacity factor of 1.25 and offloads activations to"
        " the host; which of the two the table shows is not told.",
    ),
)


def predictions(
    figure: Published, read: Callable[[str], Config], collectives: Callable[[program.Step], Sequence[Entry]]
) -> tuple[Topology, dict[str, roofline.Prediction]]:
    """The topology, and what is predicted of a published setting as this code would run there and with a fused attention kernel.

    Args:
      figure: one of `FIGURES`.
      read: from a config file and argument to the config.
      collectives: every collective of a step.
    """
    where, config = topology.parse(figure.topology), read(figure.config)
    step = program.trace(config, topology.abstract_mesh(config, where))
    entries = list(collectives(step))
    return where, {
        "as this code runs": roofline.predict(step, where, entries),
        "with a fused attention kernel": roofline.predict(step, where, entries, fused_attention=True),
    }


def section(read: Callable[[str], Config], collectives: Callable[[program.Step], Sequence[Entry]]) -> str:
    """The whole document in Markdown; arguments as `predictions`."""
    lines = [_INTRODUCTION]
    for figure in FIGURES:
        where, found = predictions(figure, read, collectives)
        lines += _of_figure(figure, where, found)
    return "\n".join(lines)


def _of_figure(figure, where, found):
    lines = [
        f"## {figure.name} on {figure.topology}",
        "",
        f"Source: {figure.source}. {figure.setting}",
        "",
        f"`{figure.config}`",
        "",
        "| | MFU, whole attention | tokens/s a device | step, s | least and most, s |",
        "|---|---|---|---|---|",
        f"| published | {figure.mfu:.2%} | {figure.tokens_per_second:,.0f} | | |",
    ]
    for name, p in found.items():
        bounds = f"{p.bounds['all']:.2f} - {p.bounds['none']:.2f}"
        speed = f"{p.tokens_per_second_per_device:,.0f}"
        lines.append(f"| predicted, {name} | {p.mfu_whole_attention:.2%} | {speed} | {p.seconds:.2f} | {bounds} |")
    ours = found["with a fused attention kernel"]
    apart = ours.mfu_whole_attention / figure.mfu
    lines += [
        "",
        f"Predicted with a fused kernel over published: {apart:.2f}. MFU with attention over its causal half: {ours.mfu:.2%};"
        f" HFU: {ours.hfu:.2%}; bound by {ours.bound_by}.",
        "",
        "| part | matrix units, s | memory, s |",
        "|---|---|---|",
    ]
    lines += [f"| {part} | {t.matrix:.3f} | {t.memory:.3f} |" for part, t in found["as this code runs"].parts.items()]
    lines += ["", "| network | s |", "|---|---|"]
    lines += [f"| {' x '.join(axes)}, {what} | {seconds:.3f} |" for (axes, what), seconds in ours.network.items()]
    return [*lines, "", f"Rates: {'; '.join(ours.machine)}.", ""]


_INTRODUCTION = """# Predictions beside published figures

Made by `moe_jax.plan.published.section`; no figure here is tuned to another. A prediction is of this codebase's program at the rates of the
data sheet, every product at full rate, routing perfectly balanced, no padding, no time per operation: an upper estimate of what could be
reached. MFU is counted as the source counts it: 6 FLOPs a parameter and token without the embedding, and attention over the whole
sequence; the published pairs of MFU and tokens/s agree with that count at 4,096 tokens to the last digit (a test holds it). MaxText runs
these models on synthetic batches; whether its router was balanced by force is not told. Where it was, Megatron-Core's own pairs of figures
say by how much that overstates throughput: 9 % (389 against 357 TFLOP/s a GPU, Qwen3-235B at 131,072 tokens) to 24 % (295 against 237 at
16,384). All figures of this page are of balanced routing; `moe_jax.plan.load` says what a measured routing costs.
"""
