"""Benchmarks, one form for all: `python -m launch.bench NAME --out=DIR [flags]` prints a table and writes DIR/NAME.json.

    python -m launch.bench comm --out=bench
    python -m launch.bench grouped_matmul --out=bench
    python -m launch.bench train --out=bench --config=configs/quickstart.py
    python -m launch.bench train --out=bench --peer=transformers

Rivals are measured in turn; figures are medians, with the spread beside them.
"""

import json
import pathlib

import jax
from absl import app, flags

from launch import cli
from moe_jax.analysis import bench_comm, bench_grouped_matmul, bench_moe, bench_peer, bench_train
from moe_jax.analysis.tables import row_table
from moe_jax.train.files import write_atomic
from moe_jax.train.run_info import git_commit

BENCHMARKS = {
    "comm": bench_comm.rows,
    "grouped_matmul": lambda: bench_grouped_matmul.rows(repeats=REPEATS.value),
    "moe": lambda: bench_moe.rows(repeats=REPEATS.value),
    "train": lambda: bench_peer.rows(REPEATS.value) if PEER.value else bench_train.rows(cli.read_config(CONFIG), REPEATS.value),
}
OUT = flags.DEFINE_string("out", "bench", "Folder for NAME.json.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each contender.", lower_bound=1)
CONFIG = cli.define_config("configs/quickstart.py", "Config of the train benchmark.")
PEER = flags.DEFINE_enum("peer", None, ["transformers"], "Measure the train benchmark's own shapes beside this library.")


def main(name: str):
    if name not in BENCHMARKS:
        raise app.UsageError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}.")
    rows = BENCHMARKS[name]()
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{name} on {device}, jax {jax.__version__}")
    print(row_table(rows))
    commit = (git_commit() or {}).get("commit")
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    report = {"device": device, "jax": jax.__version__, "commit": commit, "rows": rows}
    write_atomic(out / f"{name}.json", json.dumps(report, indent=2) + "\n")
    print(f"written to {out / f'{name}.json'}")


if __name__ == "__main__":
    cli.run(main, argument="NAME")
