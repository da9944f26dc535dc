"""The rivals of the MoE benchmark: the same layer by `ragged_dot`, and a dense FFN of the same active FLOPs."""

import jax
import numpy as np
import pytest
from tolerance import assert_close

from moe_jax.analysis import bench_moe as bench
from moe_jax.sizes import num_params

SMALL = bench.Shape(8, 2, 64, 8, 12)


@pytest.mark.parametrize("shape", bench.SHAPES)
def test_the_dense_rival_has_the_active_width(shape):
    model = shape.config.model
    count = num_params(model)
    assert 3 * model.d_model * model.d_ff * model.num_layers == count.active_experts
    assert model.moe.num_shared_experts == 0


def test_ragged_dot_computes_the_same_layer_and_gradients():
    (y_BSD, gradients), (ragged_y_BSD, ragged_gradients) = (
        bench.make_call(layer, SMALL)() for layer in (bench._Moe, bench._RaggedDot)
    )
    assert_close(y_BSD, ragged_y_BSD)
    assert len(jax.tree.leaves(gradients)) == 5  # three expert matrices, the router, the tokens
    for a, e in zip(jax.tree.leaves(gradients), jax.tree.leaves(ragged_gradients), strict=True):
        assert np.any(np.asarray(e) != 0)
        assert_close(a, e)


def test_rows_of_a_small_layer_on_eight_devices():
    (row,) = bench.rows([SMALL._replace(devices=8)], repeats=1)
    assert (row["experts"], row["top_k"], row["tokens"], row["devices"], row["dispatch"]) == (8, 2, 64, 8, "dropless")
    assert 0 < row["ratio_to_dense_min"] <= row["ratio_to_dense"] <= row["ratio_to_dense_max"]
    assert row["ratio_to_one_device"] > 0
    assert row["ratio_to_ragged_dot"] > 0
