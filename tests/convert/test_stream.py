"""Folders of Hugging Face to run folders and back: bits, layouts, interruptions, refusals."""

import json

import jax
import numpy as np
import pytest
import tiny_hf

from moe_jax.config import Config, ConfigError, MeshConfig
from moe_jax.convert import stream
from moe_jax.convert.hf_config import differences
from moe_jax.convert.hugging_face import load_params
from moe_jax.convert.plan import Plan
from moe_jax.data.documents import DataError
from moe_jax.train import run
from moe_jax.train.stored_arrays import ArrayWriter, StoredArrays, chunk_shape
from moe_jax.validation import CheckpointError

MESH = MeshConfig(data=2, expert=4)
OTHER = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: folder} of checkpoints that no test changes."""
    folder = tmp_path_factory.mktemp("hf")
    return {name: tiny_hf.write(folder / name, name) for name in tiny_hf.CONFIGS}


@pytest.mark.parametrize(("name", "dtype"), [("mixtral", "bfloat16"), ("deepseek_v3", "float32")])
def test_there_and_back_bit_for_bit_and_the_same_on_another_mesh(folders, tmp_path, name, dtype):
    stream.from_hf(folders[name], Config(workdir=str(tmp_path / "run"), mesh=MESH), dtype)
    restored = run.restore(str(tmp_path / "run"), mesh=OTHER)
    model, *expected = load_params(folders[name])
    assert restored.step == 0
    assert differences(restored.config.model, model) == {}
    actual = [restored.params, restored.router_state]
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {np.dtype(np.float32)}
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(actual)} == {restored.mesh}
    stream.to_hf(tmp_path / "run", tmp_path / "back", original=folders[name])
    files = [len(list(of.glob("*.safetensors"))) for of in (tmp_path / "back", folders[name])]
    assert (
        0 <= files[1] - files[0] <= 2
    )  # no file is much larger than the original's largest; headers are a part of these small ones
    tiny_hf.assert_same(tmp_path / "back", folders[name])
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folders[name] / "config.json").read_text()
    )
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folders[name] / "tokenizer.json").read_bytes()
    assert not list(tmp_path.rglob("*partial*"))


def test_a_run_of_our_own_becomes_a_folder_with_its_tokenizer_and_comes_back(folders, tmp_path):
    """Without an original: the architecture, config.json and tokenizer are what the run says."""
    stream.from_hf(folders["deepseek_v3"], Config(workdir=str(tmp_path / "run"), mesh=MESH))
    stream.to_hf(tmp_path / "run", tmp_path / "hf")
    stream.from_hf(tmp_path / "hf", Config(workdir=str(tmp_path / "again"), mesh=MESH))
    before, after = (run.restore(str(tmp_path / name)) for name in ("run", "again"))
    assert after.config.model == before.config.model
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.router_state), (before.params, before.router_state))
    assert (after.tokenizer.eot, after.tokenizer.vocab_size) == (before.tokenizer.eot, before.tokenizer.vocab_size)
    np.testing.assert_array_equal(after.tokenizer.encode("the red"), before.tokenizer.encode("the red"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == before.tokenizer.eot


def test_a_stacked_array_is_in_chunks_of_one_layer_and_one_device(folders, tmp_path):
    stream.from_hf(folders["mixtral"], Config(workdir=str(tmp_path), mesh=OTHER))
    arrays = StoredArrays(tmp_path / "checkpoints" / "0")
    name = next(name for name in arrays if name.endswith("w_gate_EDF"))
    assert arrays[name].shape == (3, 8, 16, 24)
    assert arrays[name].chunk_layout.read_chunk.shape == (1, 4, 8, 12)


def test_large_chunks_are_halved_from_the_first_axis_on():
    assert chunk_shape((6, 8, 10), 4, most=40) == [3, 1, 5]
    assert chunk_shape((6, 8, 10), 4, parts=(6, 1, 2), most=40) == [1, 2, 5]
    assert chunk_shape((), 4) == []


def test_an_interrupted_conversion_looks_unfinished_and_goes_on(folders, tmp_path, monkeypatch):
    config = Config(workdir=str(tmp_path / "run"), mesh=MESH)
    write, writes = ArrayWriter.write, []

    def interrupted(self, name, *args):
        writes.append(name)
        if len(writes) == 20:
            raise KeyboardInterrupt
        write(self, name, *args)

    monkeypatch.setattr(ArrayWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.from_hf(folders["mixtral"], config)
    monkeypatch.setattr(ArrayWriter, "write", write)
    with pytest.raises(ConfigError, match="holds no run"):
        run.restore(config.workdir)
    with pytest.raises(CheckpointError, match="unfinished conversion with other arrays"):
        stream.from_hf(folders["mixtral"], config, "bfloat16")
    read, layers = Plan.read, []
    monkeypatch.setattr(Plan, "read", lambda *args: layers.append(args[1].layers[args[2]]) or read(*args))
    stream.from_hf(folders["mixtral"], config)
    assert set(layers) == {1, 2}  # those of no layer, and layer 0, were finished
    stream.to_hf(config.workdir, tmp_path / "back", original=folders["mixtral"])
    tiny_hf.assert_same(tmp_path / "back", folders["mixtral"])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.json",
        "tokenizer",
        "versions.json",
    ]


def _lose(name):
    return lambda folder: (folder / name).unlink()


def _cut(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])


REFUSED = {
    "no config": (_lose("config.json"), CheckpointError, "config.json is not there"),
    "no tokenizer": (_lose("tokenizer.json"), DataError, "has no tokenizer.json"),
    "a file cut off": (_cut, CheckpointError, "was probably cut off"),
    "no weights": (_lose("model.safetensors.index.json"), CheckpointError, "has neither model.safetensors nor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_checkpoint_leaves_nothing(tmp_path, case):
    damage, error, message = REFUSED[case]
    damage(tiny_hf.write(tmp_path / "hf"))
    with pytest.raises(error, match=message):
        stream.from_hf(tmp_path / "hf", Config(workdir=str(tmp_path / "run"), mesh=MESH))
    assert not (tmp_path / "run").exists()


def test_refusals_of_what_is_asked(folders, tmp_path):
    hf, config = folders["mixtral"], Config(workdir=str(tmp_path / "run"), mesh=MESH)
    with pytest.raises(CheckpointError, match="dtype = 'float16' is unknown"):
        stream.from_hf(hf, config, "float16")
    with pytest.raises(ConfigError, match=r"num_experts = 8 is not a multiple of mesh\.expert = 16|does not fit 8 devices"):
        stream.from_hf(hf, Config(workdir=config.workdir, mesh=MeshConfig(data=1, expert=16)))
    with pytest.raises(ConfigError, match="holds no run"):
        stream.to_hf(config.workdir, tmp_path / "back")
    assert not (tmp_path / "run").exists()
    stream.from_hf(hf, config)
    with pytest.raises(CheckpointError, match="already holds a run"):
        stream.from_hf(hf, config)
    with pytest.raises(ValueError, match="No complete checkpoint of step 3"):
        stream.to_hf(config.workdir, tmp_path / "back", step="3")
    with pytest.raises(CheckpointError, match="is not empty"):
        stream.to_hf(config.workdir, hf)
    assert not (tmp_path / "back").exists()
