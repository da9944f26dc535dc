"""Tables by example."""

import math

import numpy as np

from moe_jax.analysis.tables import evaluation_table, load_table, row_table


def test_loads_are_shares_of_the_balanced_share():
    """Loads 1 2 3 2 of mean 2; the second layer has an expert nobody uses. Layers 1 and 3 of the model are MoE."""
    assert load_table(np.array([[1, 2, 3, 2], [0, 8, 4, 4]]), first_layer=1, every=2).splitlines() == [
        "layer  MaxVio  dead     e0    e1    e2    e3",
        "    1    0.50     0   0.50  1.00  1.50  1.00",
        "    3    1.00     1   0.00  2.00  1.00  1.00",
    ]


def test_many_experts_are_cut_in_the_middle():
    load_E = np.full(20, 10)
    load_E[[3, 12]] = [0, 20]
    header, row = load_table(load_E[None]).splitlines()
    assert header.split() == ["layer", "MaxVio", "dead", *(f"e{e}" for e in range(8)), "..", *(f"e{e}" for e in range(16, 20))]
    cells = row.split()
    assert cells[:3] == ["0", "1.00", "1"]  # the expert that is not shown counts
    assert cells[6] == "0.00"
    assert len(header) == len(row)
    assert ".." not in load_table(np.ones((1, 16)))


def test_a_layer_without_load_is_no_error():
    assert load_table(np.zeros((1, 2))).splitlines()[1].split() == ["0", "-1.00", "2", "0.00", "0.00"]


def test_evaluation_by_domain_and_altogether():
    metrics = {
        "eval/loss": 2.0,
        "eval/perplexity": math.e**2,
        "eval/bits_per_byte": 1.25,
        "eval/dropped_fraction": 0.5,
        "eval/prose/loss": 2.5,
        "eval/prose/perplexity": 12.18249,
        "eval/prose/bits_per_byte": 1.5,
        "eval/code/loss": 1.5,
        "eval/code/perplexity": 4.48169,
        "train/loss": 9.0,
    }
    header, *rows = evaluation_table(metrics).splitlines()
    assert header.split() == ["domain", "loss", "perplexity", "bits/byte"]
    assert [row.split() for row in rows] == [
        ["code", "1.5000", "4.482", "nan"],
        ["prose", "2.5000", "12.182", "1.5000"],
        ["all", "2.0000", "7.389", "1.2500"],
    ]
    assert len({len(line) for line in (header, *rows)}) == 1


def test_rows_are_aligned_and_numbers_short():
    rows = [
        {"name": "dense", "speed": 123456.7, "ratio": 1.23456, "steps": 7},
        {"name": "moe", "speed": 9999.9, "ratio": 0.5, "steps": 12345},
    ]
    assert row_table(rows).splitlines() == [
        " name    speed  ratio  steps",
        "dense  123,457  1.235      7",
        "  moe   10,000    0.5  12345",
    ]
