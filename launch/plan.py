"""What a config needs of hardware that is not here: memory, traffic and time of a train step, before anything is rented.

    python -m launch.plan --config=configs/published/mixtral_8x7b.py:v5p-64 --topology=v5p:4x4x4
    python -m launch.plan --config=configs/published/mixtral_8x7b.py:h100-64 --topology=h100:8x8 --depth=gpu
    python -m launch.plan search --config=configs/published/mixtral_8x7b.py:v5p-64 --topology=v5p:4x4x4
    python -m launch.plan --config=configs/quickstart.py --topology=cpu:8 --routing=runs/a.rec

--depth=jaxpr reads the traced step; --depth=gpu and --depth=tpu compile it for the chip too, which needs no chip but that platform's
compiler (docs/plans.md). `search` tries meshes, exchanges, remat policies and microbatches, and prints the flags of the best.
"""

import json
import pathlib

from absl import app, flags
from ml_collections import config_flags

from launch import cli
from moe_jax.analysis.describe import with_known_vocabulary
from moe_jax.plan import load, plan, report, topology
from moe_jax.plan.search import search
from moe_jax.train.files import write_atomic

CONFIG = cli.define_config("configs/published/mixtral_8x7b.py:v5p-64", "Config file; then --config.group.field=value.")
TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "CHIP:SHAPE, e.g. v5p:4x4x4, v6e:16x16, h100:8x8 (hosts x GPUs), cpu:64.")
DEPTH = flags.DEFINE_enum("depth", "jaxpr", plan.DEPTHS, "jaxpr reads the traced step; gpu and tpu compile it too.")
JSON = flags.DEFINE_string("json", "", "File for the plan's figures; none if empty.")
ROUTING = flags.DEFINE_string("routing", "", "A record of train.record: what its imbalance costs, and what other capacities would buy.")
KEEP = flags.DEFINE_integer("keep", 3, "search: layouts to keep.", lower_bound=1)


def main(command: str = "plan"):
    if command not in ("plan", "search"):
        raise app.UsageError(f"unknown command {command!r}; there are plan (or none) and search.")
    where = topology.parse(TOPOLOGY.value)
    plan.check_depth(DEPTH.value, where)
    config = with_known_vocabulary(cli.read_config(CONFIG))
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).name.replace(".py", "")
    found = _search(name, config, where) if command == "search" else _plan(name, config, where)
    if JSON.value:
        write_atomic(pathlib.Path(JSON.value), json.dumps(found, indent=2) + "\n")
        print(f"written to {JSON.value}")
