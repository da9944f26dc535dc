"""Runs that start from a checkpoint of Hugging Face: its model and tokenizer, its first loss, what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_hf
import tiny_run
from flax import nnx
from meshes import mesh_of

from moe_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RouterConfig,
    TrainConfig,
)
from moe_jax.convert import initial, stream
from moe_jax.convert.hugging_face import load_params
from moe_jax.models.transformer import abstract
from moe_jax.train import loop, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus and the checkpoint `hf`."""
    folder = tmp_path_factory.mktemp("init_from")
    tiny_run.write_corpus(folder)
    tiny_hf.write(folder / "hf")
    return folder


def config(folder, workdir="run", steps=2, **model):
    data = DataConfig(
        corpus="files", paths=(str(folder / "corpus.jsonl"),), seq_len=16, batch_size=8, cache_dir=str(folder / "cache")
    )
    return Config(
        workdir=str(folder / workdir),
        init_from=f"hf:{folder / 'hf'}",
        model=ModelConfig(**{"scan_unroll": 1, "remat": "none"} | model),
        mesh=MeshConfig(data=2, expert=4),
        data=data,
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(steps=steps, log_every=1, eval_every=2, eval_rows=8, checkpoint_every=2, sample_tokens=0),
    )


def loss_of_checkpoint(folder, batch):
    """Mean cross-entropy of a batch under the checkpoint's weights on one device; the softmax is NumPy's."""
    model, params, router_state = load_params(folder / "hf")
    with jax.set_mesh(mesh_of()):
        graphdef = abstract(model)[0]
        arguments = (batch[name] for name in ("tokens", "segment_ids", "positions"))
        logits_BSV, _ = jax.jit(lambda p, r, *a: nnx.merge(graphdef, p, r)(*a))(params, router_state, *arguments)
    logits_BSV = np.asarray(logits_BSV, np.float64)
    of_target_BS = np.take_along_axis(logits_BSV, batch["targets"][..., None], -1)[..., 0]
    loss_BS = np.log(np.exp(logits_BSV).sum(-1)) - of_target_BS
    return (loss_BS * batch["loss_weights"]).sum() / batch["loss_weights"].sum()


def test_two_steps_begin_with_the_loss_of_the_checkpoint(folder, monkeypatch):
    shard_batch, batches = loop.shard_batch, []
    monkeypatch.setattr(loop, "shard_batch", lambda mesh, batch: batches.append(batch) or shard_batch(mesh, batch))
    loop.train(config(folder))
    first, second = tiny_run.metrics(folder / "run")
    assert first["train/loss"] == pytest.approx(loss_of_checkpoint(folder, batches[0]), rel=1e-5)
    assert second["train/loss"] != pytest.approx(loss_of_checkpoint(folder, batches[1]), rel=1e-5)
    restored = run.restore(str(folder / "run"))
    assert restored.step == 2
    assert restored.tokenizer.kind == "hf"
    assert restored.config.model.remat == "none"
    assert restored.config.model.num_layers == 3


@pytest.mark.slow
def test_a_converted_run_trains_as_one_that_starts_from_the_checkpoint_and_neither_needs_it_again(folder):
    tiny_hf.write(folder / "gone" / "hf")
    straight, converted = config(folder / "gone", "straight"), config(folder / "gone", "converted")
    straight, converted = (dataclasses.replace(of, data=config(folder).data) for of in (straight, converted))
    loop.train(straight)
    stream.from_hf(folder / "gone" / "hf", Config(workdir=converted.workdir, mesh=MeshConfig(data=8)))
    (folder / "gone" / "hf").rename(folder / "gone" / "elsewhere")
    for of in (converted, straight):
        loop.train(dataclasses.replace(of, train=dataclasses.replace(of.train, steps=3)))
    logs = [tiny_run.metrics(folder / "gone" / name) for name in ("straight", "converted")]
    losses = [[line["train/loss"] for line in lines] for lines in logs]
    assert losses[0][0] == losses[1][0]
    assert [len(each) for each in losses] == [3, 3]
    assert json.loads((folder / "gone" / "converted" / "config.json").read_text())["init_from"] == straight.init_from


def test_fields_at_their_default_are_the_checkpoints_and_free_ones_the_configs(folder):
    router = RouterConfig(name="mixtral", options={"normalize": "after"})
    moe = MoEConfig(router=router, balance_loss_weight=0.5)
    complete = initial.complete(config(folder, "none", dtype="bfloat16", moe=moe))
    assert (complete.model.d_model, complete.model.vocab_size, complete.model.moe.num_experts) == (16, 288, 8)
    assert (complete.model.dtype, complete.model.moe.balance_loss_weight) == ("bfloat16", 0.5)
    assert complete.data.tokenizer == f"hf:{folder / 'hf'}"
    assert initial.complete(Config()) == Config()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"d_model": 64}, r"model\.d_model = 64 and init_from = 'hf:.*' has a model with 16; .* leave model\.d_model out"),
        ({"moe": MoEConfig(num_experts=4)}, r"model\.moe\.num_experts = 4 and init_from"),
        ({"moe": MoEConfig(router=RouterConfig(name="mixtral", options={"normalize": "none"}))}, r"normalize"),
    ],
)
def test_another_function_is_refused_by_name(folder, model, message):
    with pytest.raises(ConfigError, match=message):
        loop.train(config(folder, "refused", **model))
    assert not (folder / "refused").exists()


def test_other_refusals(folder):
    asked = config(folder, "refused")
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'bpe' while init_from"):
        loop.train(dataclasses.replace(asked, data=dataclasses.replace(asked.data, tokenizer="bpe")))
    with pytest.raises(ConfigError, match="init_from = 'mixtral' is not hf:FOLDER"):
        Config(init_from="mixtral")
    with pytest.raises(ValueError, match=r"config\.json is not there"):
        loop.train(dataclasses.replace(asked, init_from=f"hf:{folder / 'nowhere'}"))
    assert not (folder / "refused").exists()
