"""Published utilisation: that its source counts as we do, and the document made of it."""

import importlib

import pytest

from moe_jax.config import from_dict
from moe_jax.plan import published, topology
from moe_jax.sizes import flops_per_token
from tests import tiny


def read(text):
    path, argument = text.split(":", maxsplit=1)
    return from_dict(importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config(argument))


@pytest.mark.parametrize("figure", published.FIGURES, ids=lambda figure: figure.topology)
def test_the_published_pair_agrees_with_our_count(figure):
    """Tokens a second times our FLOPs, attention over the whole sequence, is the published share of the peak."""
    config, chip = read(figure.config), topology.parse(figure.topology).chip
    flops = 3 * flops_per_token(config.model, 2 * config.data.seq_len - 1)
    assert figure.tokens_per_second * flops / chip.matrix_rate("bfloat16") == pytest.approx(figure.mfu, abs=1e-4)


def test_the_section_has_every_figure(monkeypatch):
    made = tiny.config("mixtral", "data 2 expert 4", model={"dtype": "bfloat16"})
    figure = published.Published("tiny", "v5p:2x2x2", "tiny.py:", 0.5, 1234.0, "nobody", "In miniature.")
    monkeypatch.setattr(published, "FIGURES", (figure,))
    text = published.section(lambda _: made, lambda _: [])
    assert "| published | 50.00% | 1,234 | | |" in text
    assert "## tiny on v5p:2x2x2\n\nSource: nobody. In miniature." in text
    for row in ("predicted, as this code runs", "predicted, with a fused attention kernel", "experts", "optimizer"):
        assert f"\n| {row} | " in text
