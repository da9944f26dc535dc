"""The comparison with transformers: that both sides train the same model, and what is refused. Nothing is timed."""

import sys

import pytest

from moe_jax.analysis import bench_peer
from moe_jax.analysis.bench_peer import MESHES, Shape, import_peer, our_config, peer_model, random_batch
from moe_jax.config import ConfigError
from moe_jax.sizes import num_params
from moe_jax.validation import check_devices

TINY = Shape(experts=8, top_k=2, d_ff=8, d_model=16, layers=2, heads=2, vocabulary=32, batch=8, length=8)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_peer_is_refused_in_a_sentence_that_names_the_extra(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)  # there, whether or not it is installed
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"needs {missing}, which is not installed; .*\[hf\]"):
        import_peer()


@pytest.mark.parametrize("shape", bench_peer.SHAPES, ids=str)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_meshes_fit_the_shapes_and_nothing_is_recomputed_clipped_or_dropped(shape, mesh):
    config = our_config(shape, MESHES[mesh])
    check_devices(config, 1 if mesh == "1" else bench_peer.EMULATED)
    moe = config.model.moe
    assert (config.model.remat, config.optimizer.clip_norm, config.model.dtype) == ("none", 0, "float32")
    assert (moe.dispatch, moe.exchange_factor, moe.num_shared_experts) == ("dropless", 0, 0)
    assert moe.balance_loss_weight > 0


def test_both_shapes_use_as_many_weights_for_a_token():
    few, many = (num_params(our_config(shape, MESHES["1"]).model) for shape in bench_peer.SHAPES)
    assert few.active - few.router == many.active - many.router
    assert many.experts == 2 * few.experts


def test_the_batch_is_whole_rows_shifted_by_one():
    batch = random_batch(TINY)
    assert batch["tokens"].shape == (TINY.batch, TINY.length)
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
    assert batch["loss_weights"].min() == batch["segment_ids"].min() == 1


@pytest.mark.slow
def test_the_peer_has_the_same_parameters():
    import transformers  # of the slow tier alone

    model = peer_model(transformers, TINY, "eager")
    assert sum(p.numel() for p in model.parameters()) == num_params(our_config(TINY, MESHES["1"]).model).total
    assert model.training
    assert model.config.output_router_logits


@pytest.mark.slow
def test_rows_of_a_small_shape():
    one, *emulated = bench_peer.rows(1, [TINY], [("eager", "fused")])
    assert [row["mesh"] for row in (one, *emulated)] == list(MESHES)
    assert [list(row) for row in emulated] == [list(one)] * 2
    assert one["ratio"] == pytest.approx(one["ours_tokens_per_second"] / one["peer_tokens_per_second"])
    assert (one["peer_experts"], one["peer_adamw"]) == ("eager", "fused")
    assert all(row["ratio"] > 0 and row["share_of_matmul_rate"] > 0 for row in (one, *emulated))
    assert all(row["peer_tokens_per_second"] is None for row in emulated)
