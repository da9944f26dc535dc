"""The rival of the train benchmark: the same model with a dense FFN, equal in the weights that a token uses."""

import dataclasses

import pytest
import tiny

from configs import base, quickstart
from moe_jax.analysis.bench_train import dense_twin, rows
from moe_jax.config import from_dict
from moe_jax.sizes import flops_per_token, num_params, with_vocabulary

CONFIGS = {
    "quickstart": with_vocabulary(from_dict(quickstart.get_config()), 257),
    "three experts a token": tiny.config("deepseek", d_ff=7),
    "every other layer": tiny.config("mixtral", first_dense=1, every=2),
    "no shared expert": tiny.config("switch", num_shared_experts=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_dense_twin_has_the_active_parameters_but_for_the_router(name):
    config = CONFIGS[name]
    twin = dense_twin(config)
    moe, dense = num_params(config.model), num_params(twin.model)
    assert moe.router == config.model.num_moe_layers * config.model.moe.num_experts * config.model.d_model
    assert dense.total == dense.active == moe.active - moe.router + _rounding(config, twin)
    assert dense.total < moe.total
    assert abs(_rounding(config, twin)) < 0.01 * dense.total
    tokens = config.data.seq_len
    router_flops = 2 * moe.router
    assert flops_per_token(twin.model, tokens) == flops_per_token(config.model, tokens) - router_flops + 2 * _rounding(
        config, twin
    )


def _rounding(config, twin):
    """Weights that the twin has more because its width is a whole number: 3 matrices of D rows a layer."""
    model = config.model
    widths = [
        (model.moe.router.top_k + model.moe.num_shared_experts) * model.moe.d_ff if model.is_moe_layer(i) else model.d_ff
        for i in range(model.num_layers)
    ]
    return 3 * model.d_model * (model.num_layers * twin.model.d_ff - sum(widths))


def test_nothing_else_of_the_config_changes():
    config = CONFIGS["quickstart"]
    twin = dense_twin(config)
    assert twin.model.num_moe_layers == 0
    assert dataclasses.replace(twin, model=config.model) == config
    assert dataclasses.replace(twin.model, moe=config.model.moe, d_ff=config.model.d_ff) == config.model


@pytest.mark.slow
def test_rows_of_a_small_config():
    config = from_dict(base.get_config("debug,mesh.emulate=8,mesh.expert=4"))
    moe, dense = rows(config, repeats=1)
    assert (moe["config"], dense["config"]) == ("moe", "dense")
    assert moe["parameters"] > moe["active"] > dense["parameters"]
    assert moe["mesh"] == dense["mesh"] == "2x1x1x4x1"
    tokens = config.data.batch_size * config.data.seq_len
    assert moe["tokens_per_second"] == pytest.approx(1e3 * tokens / moe["milliseconds"])
    assert moe["ratio_to_dense_active"] == pytest.approx(moe["tokens_per_second"] / dense["tokens_per_second"])
    assert dense["ratio_to_dense_active"] == 1
