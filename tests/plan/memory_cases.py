"""Configs on topologies whose memory the plan's estimate is compared with the compilers', and ten meshes of one of them.

python tests/plan/memory_cases.py FIGURES.jsonl [NAME ...]   compiles those that the file lacks, one after the other, minutes each
python tests/plan/memory_cases.py FIGURES.jsonl --table      the tables of docs/plans/memory.md
"""

import dataclasses
import importlib
import json
import os
import pathlib
import sys
from dataclasses import dataclass

import jax

from moe_jax.config import Config, from_dict
from moe_jax.plan import memory as plan_memory
from moe_jax.plan import program, targets
from moe_jax.plan import topology as topologies

HALF = "data.batch_size=128"  # 2 rows of 4,096 tokens on each of 64 chips


@dataclass(frozen=True)
class Case:
    """A published config with an argument, on a topology."""

    module: str
    argument: str
    topology: str

    def config(self) -> Config:
        """As the programs read it."""
        return from_dict(importlib.import_module(f"configs.published.{self.module}").get_config(self.argument))


QWEN = "mesh.data=1,mesh.fsdp=2,mesh.expert=8,data.batch_size=16,model.moe.exchange_factor=2.0"
PAIRS = {
    "olmoe h100": Case("olmoe_1b_7b", "mesh.data=1,mesh.expert=8,data.batch_size=16", "h100:8"),
    "mixtral h100": Case("mixtral_8x7b", "h100-64", "h100:8x8"),
    "mixtral h100 dots": Case("mixtral_8x7b", "h100-64,model.remat=dots", "h100:8x8"),
    "mixtral h100 none": Case("mixtral_8x7b", "h100-64,model.remat=none", "h100:8x8"),
    "qwen3-30b h100": Case("qwen3_30b_a3b", QWEN, "h100:2x8"),
    "gpt-oss-120b h100": Case("gpt_oss_120b", "h100-64,data.batch_size=64", "h100:8x8"),
    "deepseek-v3 h100": Case("deepseek_v3", "h100-64,mesh.fsdp=32,mesh.expert=8,data.batch_size=256", "h100:32x8"),
    "mixtral v5p": Case("mixtral_8x7b", "v5p-64", "v5p:4x4x4"),
    "olmoe v6e": Case("olmoe_1b_7b", "mesh.data=1,mesh.fsdp=2,mesh.expert=8,data.batch_size=16", "v6e:4x4"),
    "qwen3-30b v6e": Case("qwen3_30b_a3b", QWEN, "v6e:4x4"),
}
MESHES = {  # data, fsdp, expert, tensor
    f"mixtral v5p {data}x{fsdp}x{expert}x{tensor}": Case(
        "mixtral_8x7b",
        f"v5p-64,{HALF},mesh.data={data},mesh.fsdp={fsdp},mesh.expert={expert},mesh.tensor={tensor}",
        "v5p:4x4x4",
    )
    for data, fsdp, expert, tensor in (
        (1, 8, 8, 1),
        (1, 16, 4, 1),
        (1, 32, 2, 1),
        (1, 64, 1, 1),
        (2, 4, 8, 1),
        (4, 4, 4, 1),
        (2, 32, 1, 1),
        (1, 4, 8, 2),
        (1, 8, 4, 2),
        (1, 2, 8, 4),
    )
}
CASES = PAIRS | MESHES


def predicted(case: Case) -> plan_memory.Memory:
    """The estimate, from the trace alone."""
    config, topology = case.config(), topologies.parse(case.topology)
    return plan_memory.memory(program.trace(config, topologies.abstract_mesh(config, topology)), topology)


def compiled(case: Case, *, quick: bool = False) -> targets.Verdict:
    """The compiler's account."""
    config, topology = case.config(), topologies.parse(case.topology)
    return targets.verdict(program.trace(config, targets.device_mesh(config, topology)), topology, quick=quick)


def measure(name: str) -> dict:
    """Both, as the figures' file has them; bytes."""
    ours, theirs = predicted(CASES[name]), compiled(CASES[name], quick=name in MESHES)
    figures = {field: value for field, value in dataclasses.asdict(ours).items() if isinstance(value, int)}
    account = {
        field.name: value
        for field in dataclasses.fields(theirs)
        if isinstance(value := getattr(theirs, field.name), int | float | str)
    }
    return {"name": name, "predicted": figures, "compiled": account}


def table(lines: list[dict], names) -> str:
    """Markdown, in the order of `names`."""
    by_name = {line["name"]: line for line in lines}
    rows = [
        "| config, topology | arguments | predicted | compiler's peak | off by | its careful sum |",
        "|---|---|---|---|---|---|",
    ]
    for name in (name for name in names if name in by_name):
        ours, theirs = by_name[name]["predicted"], by_name[name]["compiled"]
        what = f"`{CASES[name].module}:{CASES[name].argument}` on {CASES[name].topology}"
        if theirs["refusal"]:
            rows.append(f"| {what} | | {_gib(ours['total'])} | refused | | {_gib(theirs['total'])} by its message |")
            continue
        off = f"{100 * (ours['total'] / theirs['peak'] - 1):+.1f} %"
        cells = [what, *map(_gib, (theirs["arguments"], ours["total"], theirs["peak"])), off, _gib(theirs["total"])]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _gib(number):
    return f"{number / 2**30:.2f}"


def main(path: str, *names: str) -> None:
    """See above."""
    file = pathlib.Path(path)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if names == ("--table",):
        print(table(lines, PAIRS), table(lines, MESHES), sep="\n\n")
        return
    done = {line["name"] for line in lines}
    for name in names or CASES:
        if name not in done:
            with file.open("a") as out:
                print(json.dumps(measure(name)), file=out)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    main(*sys.argv[1:])
