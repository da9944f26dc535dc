"""Both ways to run the experts give the same answers, and the table has a row for every number of tokens."""

from tolerance import assert_close

from moe_jax.analysis import bench_expert_path
from moe_jax.analysis.bench_expert_path import Shape, make_call

SHAPE = Shape(4, 2, 8, 16)


def test_both_ways_are_the_same_function():
    assert_close(make_call(SHAPE, 5, "touched")(), make_call(SHAPE, 5, "dropless")())


def test_rows():
    rows = bench_expert_path.rows([SHAPE], (1, 3), repeats=1)
    assert [(row["tokens"], row["tokens_k_by_experts"]) for row in rows] == [(1, 0.5), (3, 1.5)]
    assert all(row["touched_milliseconds"] > 0 < row["dropless_milliseconds"] for row in rows)
