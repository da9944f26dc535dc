"""A dense run becomes step 0 of a run with experts, which trains on."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run
from randomised import randomised

from moe_jax.config import Config, ConfigError, to_dict
from moe_jax.convert.upcycle import upcycle
from moe_jax.convert.upcycle_run import upcycle_run
from moe_jax.data.corpus import save_tokenizer
from moe_jax.data.tokenizers import Bytes
from moe_jax.mesh import make_mesh
from moe_jax.models.transformer import build
from moe_jax.sizes import with_vocabulary
from moe_jax.train import loop, run
from moe_jax.train.run_info import write_run_info

COPIES = {"model__moe__d_ff": 16, "model__moe__num_shared_experts": 0}


def dense_run(folder) -> Config:
    """The folder of a run of a dense model, at step 7, with parameters that no seed gives."""
    config = with_vocabulary(tiny_run.config(folder, "dense", model__moe__num_experts=0), Bytes().vocab_size)
    with run.checkpoints(config) as saved, jax.set_mesh(make_mesh(config)):
        params = randomised(build(config.model, 0)[1])
        saved.save(7, {"params": params, "router_state": {}}, {"data": None, "metrics": {}, "origin": None})
    write_run_info(config.workdir, to_dict(config))
    save_tokenizer(Bytes(), config.workdir)
    return config


def test_a_dense_run_becomes_step_0(tmp_path):
    dense = dense_run(tmp_path)
    asked = tiny_run.config(tmp_path, "moe", **COPIES)
    config = upcycle_run(dense.workdir, asked, asked.workdir, method="drop", drop_fraction=0.25)
    assert config.model.vocab_size == dense.model.vocab_size > 0
    restored, theirs = run.restore(config.workdir), run.restore(dense.workdir)
    assert restored.step == 0
    assert restored.config == config
    expected = upcycle(dense.model, theirs.params, config.model, seed=0, method="drop", drop_fraction=0.25)
    jax.tree.map(np.testing.assert_array_equal, (restored.params, restored.router_state), expected)


@pytest.mark.slow
def test_training_goes_on_from_there(tmp_path, capsys):
    tiny_run.write_corpus(tmp_path)
    dense = dense_run(tmp_path)
    asked = tiny_run.config(tmp_path, "moe", train__steps=2, train__accumulation=1, **COPIES)
    before = run.restore(upcycle_run(dense.workdir, asked, asked.workdir).workdir)
    loop.train(asked)
    assert "continuing from step 0" in capsys.readouterr().out
    after = run.restore(asked.workdir)
    assert after.step == 2
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), after.params, before.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1  # two steps from there, not from elsewhere


def test_refusals_write_nothing(tmp_path):
    dense = dense_run(tmp_path)
    asked = tiny_run.config(tmp_path, "moe", **COPIES)
    with pytest.raises(ConfigError, match=r"out = .*dense' holds a run already"):
        upcycle_run(dense.workdir, asked, dense.workdir)
    with pytest.raises(ConfigError, match=r"workdir = .*nowhere' holds no run"):
        upcycle_run(str(tmp_path / "nowhere"), asked, asked.workdir)
    bpe = dataclasses.replace(asked, data=dataclasses.replace(asked.data, tokenizer="bpe"))
    with pytest.raises(ConfigError, match=r"data.tokenizer = 'bpe' while .* set data.tokenizer=bytes"):
        upcycle_run(dense.workdir, bpe, asked.workdir)
    wide = dataclasses.replace(
        asked, model=dataclasses.replace(asked.model, d_ff=32, moe=dataclasses.replace(asked.model.moe, d_ff=32))
    )
    with pytest.raises(ConfigError, match=r"model.d_ff = 32 but 16 in the dense model"):
        upcycle_run(dense.workdir, wide, asked.workdir)
    assert not (tmp_path / "moe").exists()
