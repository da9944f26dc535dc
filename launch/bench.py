"""Benchmarks, one form for all: `python -m launch.bench NAME --out=DIR [flags]` prints a table and writes DIR/NAME.json.

    python -m launch.bench comm --out=bench
    python -m launch.bench grouped_matmul --out=bench
    python -m launch.bench train --out=bench --config=configs/quickstart.py
    python -m launch.bench train --out=bench --peer=transformers
    python -m launch.bench inference --out=bench
    python -m launch.bench inference --out=bench --peer=transformers
    python -m launch.bench expert_path --out=bench
    python -m launch.bench observe --out=bench --config=configs/quickstart.py
    python -m launch.bench plan --out=bench

`inference` draws DIR/inference.png too and says in sentences what the numbers mean; beside a peer it writes DIR/inference_PEER.json.

Rivals are measured in turn; figures are medians, with the spread beside them.
"""

import json
import pathlib

import jax
from absl import app, flags

from launch import cli
from moe_jax.analysis import (
    bench_comm,
    bench_expert_path,
    bench_grouped_matmul,
    bench_inference,
    bench_inference_comm,
    bench_inference_peer,
    bench_moe,
    bench_observe,
    bench_peer,
    bench_plan,
    bench_train,
)
from moe_jax.analysis.figure import make_figure
from moe_jax.analysis.inference_plot import save_inference_plot
from moe_jax.analysis.inference_reading import reading
from moe_jax.analysis.tables import row_table
from moe_jax.train.files import write_atomic
from moe_jax.train.run_info import git_commit

BENCHMARKS = {
    "comm": bench_comm.rows,
    "expert_path": lambda: bench_expert_path.rows(repeats=REPEATS.value),
    "grouped_matmul": lambda: bench_grouped_matmul.rows(repeats=REPEATS.value),
    "inference": lambda: bench_inference_peer.rows(REPEATS.value) if PEER.value else inference(),
    "moe": lambda: bench_moe.rows(repeats=REPEATS.value),
    "observe": lambda: bench_observe.rows(cli.read_config(CONFIG), REPEATS.value),
    "plan": lambda: bench_plan.rows(REPEATS.value),
    "train": lambda: bench_peer.rows(REPEATS.value) if PEER.value else bench_train.rows(cli.read_config(CONFIG), REPEATS.value),
}
OUT = flags.DEFINE_string("out", "bench", "Folder for NAME.json.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each contender.", lower_bound=1)
CONFIG = cli.define_config("configs/quickstart.py", "Config of the benchmarks train and observe.")
PEER = flags.DEFINE_enum("peer", None, ["transformers"], "Measure train's or inference's own shapes beside this library.")


def inference() -> dict[str, list[dict]]:
    """The rows, and what is sent between devices."""
    make_figure(1, 1)  # a picture that cannot be drawn is refused now
    return {"rows": bench_inference.rows(repeats=REPEATS.value), "communication": bench_inference_comm.rows_elsewhere()}


def main(name: str):
    if name not in BENCHMARKS:
        raise app.UsageError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}.")
    tables = BENCHMARKS[name]()
    tables = {"rows": tables} if isinstance(tables, list) else tables
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{name} on {device}, jax {jax.__version__}")
    for table in tables.values():
        print(row_table(table), end="\n\n" if len(tables) > 1 else "\n")
    commit = (git_commit() or {}).get("commit")
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    report = {"device": device, "jax": jax.__version__, "commit": commit, **tables}
    file = out / (f"{name}_{PEER.value}.json" if name == "inference" and PEER.value else f"{name}.json")
    write_atomic(file, json.dumps(report, indent=2) + "\n")
    print(f"written to {file}")
    if name == "plan":
        print(bench_plan.verdict(tables["steps"]))
    if "communication" in tables:
        print(reading(**tables))
        save_inference_plot(tables["rows"], out / f"{name}.png")
        print(f"drawn in {out / f'{name}.png'}")


if __name__ == "__main__":
    cli.run(main, argument="NAME")
