"""The observatory's benchmark: what it compares, and that its sums are right."""

import dataclasses

import pytest
import tiny

from configs import base
from moe_jax.analysis.bench_observe import rows
from moe_jax.config import ConfigError, MoEConfig, from_dict


@pytest.mark.slow
def test_rows_of_a_small_config():
    config = from_dict(base.get_config("debug,mesh.emulate=8,mesh.expert=4,train.eval_every=5"))
    measured = rows(config, repeats=2)
    assert [row["part"] for row in measured] == ["evaluation", "step", "both", "step", "both"]
    assert [row["config"] for row in measured[1:]] == ["as configured"] * 2 + ["with a balance loss"] * 2
    evaluation, as_configured = measured[:2]
    for step, both in (measured[1:3], measured[3:]):
        assert both["added_percent"] == pytest.approx(step["added_percent"] + evaluation["added_percent"])
        assert step["added_percent_min"] <= step["added_percent"] <= step["added_percent_max"]
    added = evaluation["milliseconds"] - evaluation["milliseconds_without"]  # of two repeats the median is the mean
    assert evaluation["added_percent"] == pytest.approx(100 * added / 5 / as_configured["milliseconds_without"])


def test_a_dense_model_is_refused():
    config = tiny.config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=MoEConfig(num_experts=0)))
    with pytest.raises(ConfigError, match="no router that chooses"):
        rows(config, repeats=1)
