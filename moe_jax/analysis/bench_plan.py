"""Predicted against measured time of whole train steps on emulated devices: three models on three meshes.

The machine's roofline (`plan_calibration`) is measured in the same rounds as the steps, in turn with them, for each model anew. A
prediction is the reading "none" of `plan.roofline`: devices that share cores overlap nothing. The process keeps the memory that it frees
(`devices.keep_freed_memory`): what a kernel takes to find pages is no part of a step.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.analysis import plan_calibration
from moe_jax.analysis.bench_train import stepper
from moe_jax.analysis.devices import keep_freed_memory, start_with
from moe_jax.analysis.ledger import Entry
from moe_jax.config import AttentionConfig, Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, RouterConfig, TrainConfig
from moe_jax.mesh import make_mesh, shard_batch
from moe_jax.plan import program, roofline, topology, work
from moe_jax.plan.traffic import collectives as all_collectives

DEVICES = 8
READY = 8 * 2**30  # bytes; more than the steps of one model and their calibration hold
MESHES = {
    "data 8": MeshConfig(data=8),
    "data 2 expert 4": MeshConfig(data=2, expert=4),
    "fsdp 4 tensor 2": MeshConfig(data=1, fsdp=4, tensor=2),
}
DATA = DataConfig(seq_len=128, batch_size=16)


def models() -> dict[str, ModelConfig]:
    """The three models by name: no experts, few wide ones, many narrow ones."""
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=32)
    dense = ModelConfig(vocab_size=2048, d_model=256, num_layers=2, d_ff=1024, attention=attention, remat="none")
    dense = dataclasses.replace(dense, moe=MoEConfig(num_experts=0))

    def with_experts(number, width, top_k):
        moe = MoEConfig(number, width, num_shared_experts=0, router=RouterConfig("mixtral", top_k))
        return dataclasses.replace(dense, moe=moe)

    return {"dense": dense, "8 experts, 2 a token": with_experts(8, 512, 2), "16 experts, 4 a token": with_experts(16, 256, 4)}


def configs() -> dict[str, Config]:
    """The nine steps by "model / mesh"."""
    return {
        f"{model} / {mesh}": Config(model=m, mesh=shape, data=DATA, train=TrainConfig(observe=False))
        for model, m in models().items()
        for mesh, shape in MESHES.items()
    }


def rows(
    repeats: int,
    collectives: Callable[[program.Step], Sequence[Entry]] = all_collectives,
    made_of: dict[str, Config] | None = None,
) -> dict[str, list[dict]]:
    """One table of the steps, one of the machine.

    Keys of a step: model, mesh, predicted_ms, measured_ms (median, and `_min`, `_max`), ratio (predicted over measured), and what its
    prediction is made of: matrix_ms, memory_ms (beyond the products'), network_ms.

    Args:
      repeats: rounds, in each of which every step and every part of the calibration runs once.
      collectives: every collective of a step.
      made_of: what to measure, by "model / mesh"; the nine of this module by default.
    """
    keep_freed_memory(READY)
    start_with(DEVICES)
    made_of = made_of or configs()
    tables = {"steps": [], "machine": []}
    for model in dict.fromkeys(name.split(" / ")[0] for name in made_of):
        own = {name: config for name, config in made_of.items() if name.split(" / ")[0] == model}
        steps, rates = _measured(own, repeats, collectives)
        tables["steps"] += steps
        tables["machine"] += [{"beside": model} | row for row in _machine_rows(rates)]
        jax.clear_caches()  # else every model's states and programs would stay
    return tables


def _measured(made_of, repeats, collectives):
    """(rows of these steps, rates of the machine), all timed in turn."""
    where = topology.parse(f"cpu:{DEVICES}")
    traced = {name: program.trace(config, topology.abstract_mesh(config, where)) for name, config in made_of.items()}
    wanted = {size for step in traced.values() for size in plan_calibration.sizes_that_matter(work.products(step))}
    sent = {name: list(collectives(step)) for name, step in traced.items()}
    kinds = {
        (plan_calibration.measured_kind(entry), math.prod(traced[name].mesh.shape[axis] for axis in entry.axes))
        for name, entries in sent.items()
        for entry in entries
    }
    made = plan_calibration.probes(sorted(wanted, key=str), kinds, jax.devices())
    calls = {**{name: probe.call for name, probe in made.items()}, **{("step", n): _step(c) for n, c in made_of.items()}}
    seconds = timed(calls, repeats)
    rates, table = plan_calibration.rates(seconds, made), []
    for name, step in traced.items():
        machine = rates.machine(dict(step.mesh.shape))
        predicted = roofline.predict(step, where, sent[name], overlap="none", machine=machine)
        table.append(step_row(name, predicted, seconds["step", name]))
    return table, rates


def timed(calls: dict[Any, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[Any, list[float]]:
    """Seconds of each call, every repeat calling all in turn."""
    seconds = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def out_of_order(table: Sequence[dict], apart: float = 1.25) -> list[tuple[str, str]]:
    """Pairs of steps of which the slower is predicted to be the faster, of those measured at least `apart` times as long."""
    return [
        (f"{a['model']} / {a['mesh']}", f"{b['model']} / {b['mesh']}")
        for a in table
        for b in table
        if a["measured_ms"] > apart * b["measured_ms"] and a["predicted_ms"] <= b["predicted_ms"]
    ]


def verdict(table: Sequence[dict]) -> str:
    """One sentence: how far the predictions are off, and whether they have the steps in the right order."""
    off = max(max(row["ratio"], 1 / row["ratio"]) for row in table)
    wrong = "; ".join(f"{slower} is predicted to be as fast as {faster}" for slower, faster in out_of_order(table))
    order = f"not in the right order: {wrong}" if wrong else "every two that differ by a quarter in the right order"
    return f"{len(table)} steps predicted within a factor of {off:.2f}, {order}."


def _step(config):
    """A function that takes one more step of `config` on random tokens."""
    mesh = make_mesh(config)
    rng, shape = np.random.default_rng(0), (config.data.batch_size, config.data.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, (2, *shape)).astype(np.int32)
    ones, places = np.ones(shape, np.int32), np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {"tokens": tokens[0], "targets": tokens[1], "segment_ids": ones, "positions": places}
    batch["loss_weights"] = ones.astype(np.float32)
    with jax.set_mesh(mesh):
        one_step = stepper(config, shard_batch(mesh, batch))

    def call():
        with jax.set_mesh(mesh):
            return one_step()

    return call


def step_row(name: str, predicted: roofline.Prediction, seconds: Sequence[float]) -> dict:
    """The row of the step "model / mesh" by what was predicted and measured."""
    model, mesh = name.split(" / ")
    measured = statistics.median(seconds)
    matrix = sum(part.matrix for part in predicted.parts.values())
    return {
        "model": model,
        "mesh": mesh,
        "predicted_ms": 1e3 * predicted.seconds,
        "measured_ms": 1e3 * measured,
        "measured_ms_min": 1e3 * min(seconds),
        "measured_ms_max": 1e3 * max(seconds),
        "ratio": predicted.seconds / measured,
        "matrix_ms": 1e3 * matrix,
        "memory_ms": 1e3 * (sum(part.seconds for part in predicted.parts.values()) - matrix),
        "network_ms": 1e3 * sum(predicted.network.values()),
    }


def _machine_rows(rates):
    """The calibration, one row a probe, in GFLOP/s or GB/s of all devices together."""
    count = jax.device_count()
    products = [
        {
            "probe": f"{'grouped ' * s.grouped}{s.batch} x [{s.rows}, {s.terms}] [{s.terms}, {s.columns}]",
            "microseconds": 1e6 * t,
            "rate": count * s.flops / t / 1e9,
            "unit": "GFLOP/s",
        }
        for s, t in rates.product.items()
    ]
    passes = [
        {"probe": f"pass over {size:,} bytes", "microseconds": 1e6 * t, "rate": count * size / t / 1e9, "unit": "GB/s"}
        for size, t in rates.passes.items()
    ]
    sent = [
        {"probe": f"{kind} of {group}, {size:,} bytes", "microseconds": 1e6 * t, "rate": count * size / t / 1e9, "unit": "GB/s"}
        for (kind, group, size), t in rates.collective.items()
    ]
    return products + passes + sent
