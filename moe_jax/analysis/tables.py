"""Routing figures as plain text, for terminals."""

import numpy as np


def load_table(load_LE: np.ndarray, first_layer: int = 0, every: int = 1) -> str:
    """Per-layer expert load: each expert's share of the balanced share (1.00 = balanced), and MaxVio = largest - 1.

    Args:
      load_LE: counts [L, E] of the MoE layers.
      first_layer: index in the model of the first MoE layer.
      every: distance between MoE layers.
    """
    load_LE = np.asarray(load_LE, np.float64)
    share_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
    num_experts = load_LE.shape[1]
    shown = range(num_experts) if num_experts <= 16 else [*range(8), None, *range(num_experts - 4, num_experts)]
    header = "layer  MaxVio  dead  " + " ".join("   .." if e is None else f"{'e' + str(e):>5}" for e in shown)
    lines = [header]
    for i, row in enumerate(share_LE):
        cells = " ".join("   .." if e is None else f"{row[e]:5.2f}" for e in shown)
        lines.append(f"{first_layer + i * every:5d}  {row.max() - 1:6.2f}  {int((row == 0).sum()):4d}  {cells}")
    return "\n".join(lines)


def evaluation_table(metrics: dict[str, float]) -> str:
    """Loss, perplexity and bits per byte by domain, from `train.evaluate.evaluate`'s flat metrics."""
    domains = sorted({name.split("/")[1] for name in metrics if name.startswith("eval/") and name.count("/") == 2})
    lines = [f"{'domain':<12} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}"]
    for domain, prefix in [*((d, f"eval/{d}/") for d in domains), ("all", "eval/")]:
        bits = metrics.get(f"{prefix}bits_per_byte", float("nan"))
        lines.append(f"{domain:<12} {metrics[f'{prefix}loss']:8.4f} {metrics[f'{prefix}perplexity']:11.3f} {bits:10.4f}")
    return "\n".join(lines)


def row_table(rows: list[dict]) -> str:
    """Rows with equal keys as an aligned table; floats to four digits."""

    def show(value):
        return (
            f"{value:,.0f}"
            if isinstance(value, float) and abs(value) >= 1e3
            else f"{value:.4g}"
            if isinstance(value, float)
            else str(value)
        )

    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
