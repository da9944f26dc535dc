"""Folders of safetensors files: what is written is read again, lazily, and every fault has its sentence."""

import json

import ml_dtypes
import numpy as np
import pytest

from moe_jax.convert.safetensors_files import TensorFiles, read_json, write_shards
from moe_jax.validation import CheckpointError

BF16 = ml_dtypes.bfloat16


def _tensors():
    rng = np.random.default_rng(0)
    return {f"layer.{i}.w": rng.normal(size=(4, 8)).astype([np.float32, BF16, np.float16][i % 3]) for i in range(7)}


def _folder(tmp_path, max_shard_bytes=200):
    write_shards(tmp_path / "model", _tensors().items(), max_shard_bytes)
    return tmp_path / "model"


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(10**6, 1), (200, 4), (1, 7)])
def test_written_and_read(tmp_path, max_shard_bytes, files):
    folder = _folder(tmp_path, max_shard_bytes)
    assert len(list(folder.glob("*.safetensors"))) == files
    assert (folder / "model.safetensors.index.json").exists() == (files > 1)
    found, tensors = TensorFiles(folder), _tensors()
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(np.asarray(found[name]), tensor)
        assert np.asarray(found[name], np.float32).dtype == np.float32


def test_shards_are_as_large_as_allowed(tmp_path):
    folder = _folder(tmp_path, 200)
    index = read_json(folder / "model.safetensors.index.json")
    sizes = {}
    for name, file in index["weight_map"].items():
        sizes[file] = sizes.get(file, 0) + _tensors()[name].nbytes
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert max(sizes.values()) <= 200
    assert sorted(sizes) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


def test_one_shard_at_a_time_is_in_memory(tmp_path):
    """The writer has flushed all earlier shards when it asks for a tensor."""
    folder, seen = tmp_path / "model", []

    def tensors():
        for name, tensor in _tensors().items():
            seen.append(len(list(folder.glob("*.partial"))))
            yield name, tensor

    write_shards(folder, tensors(), 1)
    assert seen == [0, 0, 1, 2, 3, 4, 5]


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    folder, reads = _folder(tmp_path), []
    original = TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", lambda self, name: reads.append(name) or original(self, name))
    found = TensorFiles(folder)
    assert reads == []
    np.asarray(found["layer.3.w"])
    assert reads == ["layer.3.w"]


def test_an_array_that_is_not_contiguous_and_one_without_axes(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.float32(3.0).reshape(())}
    write_shards(tmp_path / "model", arrays.items())
    found = TensorFiles(tmp_path / "model")
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array)
        assert found[name].shape == array.shape


def test_no_folder_and_no_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*pytorch_model\.bin"):
        TensorFiles(tmp_path)
    with pytest.raises(CheckpointError, match="there is: nothing"):
        TensorFiles(tmp_path / "nowhere")


def test_missing_shard(tmp_path):
    folder = _folder(tmp_path)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00004\.safetensors is missing.* 2 tensors"):
        TensorFiles(folder)


def test_index_that_names_another_file(tmp_path):
    folder = _folder(tmp_path)
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["layer.9.w"] = "model-00001-of-00004.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layer\.9\.w is in model-00001-of-00004\.safetensors, and it is not there"):
        TensorFiles(folder)


@pytest.mark.parametrize("keep", [-5, 20, 0])
def test_truncated_file(tmp_path, keep):
    folder = _folder(tmp_path, 10**6)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors \({path.stat().st_size} bytes\) cannot be read"):
        TensorFiles(folder)


def test_a_pointer_in_place_of_the_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_json_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="download it again"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="is not there"):
        read_json(tmp_path / "other.json")


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path):
    def tensors():
        yield from _tensors().items()
        raise CheckpointError("the eighth")

    with pytest.raises(CheckpointError, match="the eighth"):
        write_shards(tmp_path / "model", tensors(), 1)
    assert list((tmp_path / "model").iterdir()) == []


def test_a_folder_with_weights_is_not_written_to(tmp_path):
    folder = _folder(tmp_path)
    with pytest.raises(CheckpointError, match="already holds"):
        write_shards(folder, _tensors().items())
