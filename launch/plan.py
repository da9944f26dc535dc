"""What a config needs of hardware that is not here: memory, traffic and time of a train step, before anything is rented.

    python -m launch.plan --config=configs/published/mixtral_8x7b.py:v5p-64 --topology=v5p:4x4x4
    python -m launch.plan --config=configs/published/mixtral_8x7b.py:h100-64 --topology=h100:8x8 --depth=gpu
    python -m launch.plan search --config=configs/published/mixtral_8x7b.py:v5p-64 --topology=v5p:4x4x4
    python -m launch.plan --config=configs/quickstart.py --topology=v5e:2x4 --routing=runs/a.rec

--depth=jaxpr reads the traced step; --depth=gpu and --depth=tpu compile it for the chip too, which needs no chip but that platform's
compiler (docs/plans.md). `search` tries meshes, exchanges, remat policies and microbatches, and prints the flags of the best.
"""

import dataclasses
import json
import pathlib

import jax
from absl import app, flags
from ml_collections import config_flags

from launch import cli
from moe_jax.analysis.describe import with_known_vocabulary
from moe_jax.config import ConfigError
from moe_jax.mesh import AXES
from moe_jax.plan import load, memory, plan, report, topology
from moe_jax.plan.search import search
from moe_jax.train.files import write_atomic

CONFIG = cli.define_config("configs/published/mixtral_8x7b.py:v5p-64", "Config file; then --config.group.field=value.")
TOPOLOGY = flags.DEFINE_string(
    "topology", "v5p:4x4x4", "CHIP:SHAPE, e.g. v5p:4x4x4, v6e:16x16, h100:8x8 (hosts x GPUs), cpu:64."
)
DEPTH = flags.DEFINE_enum("depth", "jaxpr", plan.DEPTHS, "jaxpr reads the traced step; gpu and tpu compile it too.")
JSON = flags.DEFINE_string("json", "", "File for the plan's figures; none if empty.")
ROUTING = flags.DEFINE_string(
    "routing", "", "A record of train.record: what its imbalance costs, and what other capacities would buy."
)
BATCH = flags.DEFINE_bool("largest_batch", True, "Look for the largest batch that fits too: a few more traces.")
KEEP = flags.DEFINE_integer("keep", 3, "search: layouts to keep.", lower_bound=1)


def main(command: str = "plan"):
    if command not in ("plan", "search"):
        raise app.UsageError(f"unknown command {command!r}; there are plan (or none) and search.")
    jax.config.update("jax_platforms", "cpu")  # nothing runs on devices, which may be others' or none
    where = topology.parse(TOPOLOGY.value)
    plan.check_depth(DEPTH.value, where)
    if (command == "search" or ROUTING.value) and not where.chip.flops:
        raise ConfigError(
            f"topology = {where.text!r} has no data sheet, and {'search' if command == 'search' else '--routing'} goes by time; name an"
            " accelerator, e.g. v5p:4x4x4."
        )
    config = with_known_vocabulary(cli.read_config(CONFIG))
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).name.replace(".py", "")
    found = _search(name, config, where) if command == "search" else _plan(name, config, where)
    if JSON.value:
        write_atomic(pathlib.Path(JSON.value), json.dumps(found, indent=2) + "\n")
        print(f"written to {JSON.value}")


def _plan(name, config, where):
    found = plan.plan(config, where)
    simulation = _simulated(found) if ROUTING.value else None
    largest = memory.largest_batch(config, where) if BATCH.value and where.chip.memory else None
    if DEPTH.value != "jaxpr":
        found = plan.confirm(found)
    print(report.text(found, name, DEPTH.value, largest, simulation))
    figures = report.as_json(found, name, DEPTH.value)
    if largest is not None:
        figures["largest_batch"] = largest
    return figures | ({"routing": dataclasses.asdict(simulation)} if simulation else {})


def _simulated(found):
    sizes = {axis: getattr(found.config.mesh, axis) for axis in AXES}
    return load.simulate(found.time, load.from_record(ROUTING.value, found.config, sizes), found.config, sizes)


def _search(name, config, where):
    found = search(config, where, lambda candidate: plan.plan(candidate, where), KEEP.value)
    if DEPTH.value != "jaxpr":
        print(f"compiling {len(found.best)} of them")
        found = dataclasses.replace(found, best=tuple(plan.confirm(one) for one in found.best))
    print(report.search_text(found))
    return {"tried": found.tried, "best": [report.as_json(one, name, DEPTH.value) for one in found.best]}


if __name__ == "__main__":
    cli.run(main, argument="[COMMAND]")
