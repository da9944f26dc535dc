"""The machine's roofline made of measurements that are given, and the table of steps; nothing is timed for its time's sake."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

from moe_jax.analysis import bench_plan, plan_calibration
from moe_jax.analysis.ledger import Entry
from moe_jax.analysis.plan_calibration import Rates, Size
from moe_jax.plan import roofline
from moe_jax.plan.work import Product


def product(rows, terms, columns, *, batch=1, times=1.0, part="head"):
    return Product(part, "forward", "float32", batch, rows, terms, columns, times, 0.0, 0.0)


LARGE, SMALL, GROUPED = Size(False, 1, 256, 256, 256), Size(False, 1, 16, 256, 256), Size(True, 4, 64, 256, 256)
RATES = Rates(
    {LARGE: 1e-3, SMALL: 1e-3, GROUPED: 4e-3},  # the small one runs at a sixteenth of the large one's rate
    {4096: 1e-5, 65536: 2e-5, 2**20: 2e-4},
    {
        ("all-gather", 4, 2**12): 1e-4,
        ("all-gather", 4, 2**20): 1e-3,
        ("all-to-all", 4, 2**12): 1e-4,
        ("all-to-all", 4, 2**20): 1e-4,
    },
)
SIZES = {"data": 2, "expert": 4}


def test_sizes_are_rounded_and_the_large_shares_kept():
    assert plan_calibration.size_of(product(250, 300, 256)) == LARGE
    assert plan_calibration.size_of(product(60.0, 256, 256, batch=4, part="experts")) == GROUPED
    found = [product(256, 256, 256, times=90), product(16, 256, 256, times=140), product(2, 2, 2)]
    assert plan_calibration.sizes_that_matter(found) == [LARGE, SMALL]
    assert plan_calibration.sizes_that_matter([product(256, 256, 256, times=90), product(16, 256, 256, times=10)]) == [LARGE]


def test_a_product_runs_at_the_rate_of_its_size_or_the_nearest():
    assert RATES.matrix(product(256, 256, 256)) == pytest.approx(1e-3)
    assert RATES.matrix(product(200, 256, 256)) == pytest.approx(1e-3 * 200 / 256)
    assert RATES.matrix(product(8, 256, 256)) == pytest.approx(1e-3 / 2)  # as the one of 16 rows
    assert RATES.matrix(product(1024, 256, 256)) == pytest.approx(4e-3)  # as the one of 256
    assert RATES.matrix(product(32, 256, 256, batch=4, part="experts")) == pytest.approx(2e-3)  # the only grouped one


def test_passes_cost_something_each():
    assert RATES.memory(4096.0, 1) == pytest.approx(1e-5)
    assert RATES.memory(100 * 1024.0, 100) == pytest.approx(100 * 1e-5)  # no pass is shorter than the shortest measured
    assert RATES.memory(2 * (4096 + 65536) / 2, 2) == pytest.approx(2 * 1.5e-5)
    assert RATES.memory(2.0**22, 1) == pytest.approx(8e-4)
    assert RATES.memory(0.0, 0) == 0


def test_collectives_are_a_straight_line():
    """Three times the operand is sent; 4 KB take 0.1 ms and 1 MB takes 1 ms."""
    middle = 3 * (2**12 + 2**20) // 2
    assert RATES.network(Entry("all-gather", ("expert",), "float32", middle), SIZES) == pytest.approx(0.55e-3)
    assert RATES.network(Entry("all-gather", ("expert",), "float32", 3), SIZES) == pytest.approx(1e-4)
    assert RATES.network(Entry("ragged-all-to-all", ("expert",), "float32", 2**22), SIZES) == pytest.approx(1e-4)


def test_the_call_without_work_is_taken_off():
    made = {("call",): None, ("product", LARGE): 4, ("pass", 4096): 2, ("collective", "all-gather", 4, 2**12): 1}
    made = {name: plan_calibration.Probe(lambda: None, repeats or 1) for name, repeats in made.items()}
    seconds = {name: [0.002, 0.01, 0.018] for name in made} | {("call",): [0.002, 0.001, 0.003]}
    rates = plan_calibration.rates(seconds, made)
    assert rates.product == {LARGE: pytest.approx(0.008 / 4)}
    assert rates.passes == {4096: pytest.approx(0.008 / 2)}
    assert rates.collective == {("all-gather", 4, 2**12): pytest.approx(0.008)}


SENT = {("all-reduce", 4), ("reduce-scatter", 4)}


def test_probes_do_what_they_are_timed_for():
    """Each runs on eight devices at once; products of ones are sums over the terms, collectives give what their kind says."""
    made = plan_calibration.probes([Size(False, 2, 4, 8, 16), Size(True, 2, 4, 8, 16)], SENT, jax.devices())
    for name in made:
        if name[0] == "product" and not name[1].grouped:
            results = made[name].call()
            assert len(results) == made[name].repeats / plan_calibration.CALLS
            assert {float(x.max()) for x in results} == {float(x.min()) for x in results} == {8.0}
        elif (
            name[0] == "product"
        ):  # of y = x w and its own gradients: 8 terms, then 16 columns of eights, then 4 rows of eights
            results = made[name].call()
            assert 3 * len(results) == made[name].repeats / plan_calibration.CALLS
            assert {(float(dx.min()), float(dw.max())) for dx, dw in results} == {(128.0, 32.0)}
    assert {name[1:3] for name in made if name[0] == "collective"} == SENT
    made["pass", 4096].call()  # its arrays are given away, and its results taken for the next
    assert {float(x.min()) for x in made["pass", 4096].call()} == {1.0}
    summed = made["collective", "all-reduce", 4, 2**12].call()[0]
    assert (float(summed.min()), summed.shape) == (4.0, (8, 4, 256))
    assert made["collective", "reduce-scatter", 4, 2**12].call()[0].shape == (8, 1, 256)


def test_wrong_order_is_told():
    def row(mesh, predicted, measured):
        return {"model": "m", "mesh": mesh, "predicted_ms": predicted, "measured_ms": measured, "ratio": predicted / measured}

    table = [row("a", 10, 20), row("b", 15, 21), row("c", 9, 40)]
    assert bench_plan.out_of_order(table) == [("m / c", "m / a"), ("m / c", "m / b")]  # a and b are too near to tell
    assert bench_plan.out_of_order(table[:2]) == []
    sentence = bench_plan.verdict(table)
    assert "within a factor of 4.44, not in the right order: m / c is predicted to be as fast as m / a;" in sentence
    assert "2 steps predicted within a factor of 2.00, every two" in bench_plan.verdict(table[:2])


def test_a_row_tells_what_the_prediction_is_made_of():
    parts = {"head": roofline.PartTime(0.2, 0.1, 0.25), "optimizer": roofline.PartTime(0.0, 0.1, 0.1)}
    predicted = roofline.Prediction(parts, {(("data",), "weights"): 0.05}, 0.4, {}, 8, 20.0, 2.5, 0, 0, 0, "", ())
    row = bench_plan.step_row("dense / data 8", predicted, [0.9, 0.5, 1.0])
    assert (row["model"], row["mesh"], row["measured_ms"], row["measured_ms_max"]) == ("dense", "data 8", 900.0, 1000.0)
    assert row["ratio"] == pytest.approx(0.4 / 0.9)
    assert (row["matrix_ms"], row["memory_ms"], row["network_ms"]) == pytest.approx((200, 150, 50))


def test_every_round_calls_all_in_turn():
    order = []
    seconds = bench_plan.timed({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert order == list("ababab")  # the first round is not kept
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_freed_memory_is_kept_for_what_is_asked_for_next():
    """In a process of its own: an array as large as one that was freed touches no new page."""
    program = """
import resource

import numpy as np

from moe_jax.analysis.devices import keep_freed_memory

keep_freed_memory(2**27)
np.ones(2**26, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**26, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}  # with huge pages few are touched in any case
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # of 16,384


def test_the_nine_configs_are_valid_on_eight_devices():
    configs = bench_plan.configs()
    assert len(configs) == 9
    assert {dataclasses.replace(config.mesh, emulate=0) for config in configs.values()} == set(bench_plan.MESHES.values())
