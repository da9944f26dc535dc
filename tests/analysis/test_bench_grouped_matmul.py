import numpy as np

from moe_jax.analysis import bench_grouped_matmul as bench
from moe_jax.analysis import timing


def test_interleaved_calls_rivals_in_turn_and_drops_the_warm_up():
    calls = []
    seconds = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_taken_repeat_by_repeat():
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == (3.0, 2.0, 4.0)


def test_rows_have_what_a_table_needs():
    shapes = [bench.Shape(96, 8, 12, 3), bench.Shape(96, 8, 12, 3, "zipf")]
    rows = bench.rows(shapes, repeats=2, backends=("cpu", "reference"))
    assert [(r["backend"], r["sizes"]) for r in rows] == [(b, s) for s in ("uniform", "zipf") for b in ("cpu", "reference")]
    for row in rows:
        assert (row["tokens"], row["d_in"], row["d_out"], row["experts"]) == (96, 8, 12, 3)
        for direction in ("forward", "backward"):
            least, median, most = (row[f"{direction}_ratio{end}"] for end in ("_min", "", "_max"))
            assert 0 < least <= median <= most


def test_group_sizes_sum_to_the_tokens():
    for sizes in ("uniform", "zipf"):
        shape = bench.Shape(1000, 8, 8, 7, sizes)
        assert bench.group_sizes(shape).sum() == 1000
    assert np.argmax(bench.group_sizes(shape)) == 0
