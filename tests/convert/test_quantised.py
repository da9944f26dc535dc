"""Quantised checkpoints: numbers by hand and by transformers, whole checkpoints, and what is refused."""

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import TINY, written

from moe_jax.convert.hugging_face import load_params, save_hf
from moe_jax.convert.quantised import dequantised
from moe_jax.convert.safetensors_files import TensorFiles, read_json, write_json, write_shards
from moe_jax.validation import CheckpointError

FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [2, 3]}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
FLOAT8 = ml_dtypes.float8_e4m3fn


def test_float8_by_hand():
    """Blocks of 2 x 3 over a matrix of 3 x 4: the last row and the last column have scales of their own."""
    numbers = np.array([[1, 2, 3, 4], [-1, 0.5, 0, 8], [1.5, 1, 1, -2]]).astype(FLOAT8)
    scales = np.array([[1, 10], [100, 0.25]], np.float32)
    found = dequantised({"w": numbers, "w_scale_inv": scales, "norm": np.ones(3, np.float32)}, FP8)
    assert set(found) == {"w", "norm"}
    assert (found["w"].shape, found["w"].dtype) == ((3, 4), ml_dtypes.bfloat16)
    expected = np.array([[1, 2, 3, 40], [-1, 0.5, 0, 80], [150, 100, 100, -0.5]])
    np.testing.assert_array_equal(np.asarray(found["w"]).astype(np.float64), expected)


def test_float8_has_blocks_of_128_unless_told():
    numbers, scales = np.ones((200, 130)).astype(FLOAT8), np.array([[1, 2], [3, 4]], np.float32)
    w = np.asarray(dequantised({"w": numbers, "w_scale_inv": scales}, {"quantization_config": {"quant_method": "fp8"}})["w"])
    assert [float(w[row, column]) for row, column in ((127, 127), (127, 128), (128, 127), (199, 129))] == [1, 2, 3, 4]


def test_four_bits_by_hand():
    """The low half of a byte comes first; 127 is 2^0; rows of the file are columns of ours."""
    blocks, scales = np.zeros((1, 2, 1, 16), np.uint8), np.array([[[127], [125]]], np.uint8)
    blocks[0, 0, 0, 0], blocks[0, 1, 0, 15] = 0x71, 0xF2
    found = dequantised({"w_blocks": blocks, "w_scales": scales}, MXFP4)
    assert set(found) == {"w"}
    w = np.asarray(found["w"]).astype(np.float64)
    assert w.shape == found["w"].shape == (1, 32, 2)
    expected = np.zeros((1, 32, 2))
    expected[0, 0, 0], expected[0, 1, 0] = 0.5, 6.0
    expected[0, 30, 1], expected[0, 31, 1] = 0.25, -1.5
    np.testing.assert_array_equal(w, expected)


@pytest.mark.slow
def test_four_bits_as_transformers_reads_them():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 5, 4, 16), np.uint8)
    scales = rng.integers(100, 140, (3, 5, 4), np.uint8)
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.bfloat16)
    ours = np.asarray(dequantised({"w_blocks": blocks, "w_scales": scales}, MXFP4)["w"])
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())


def _quantise_float8(tensors, rng):
    """Every matrix of the layers but the routers', in blocks of 2 x 3; and what they stand for."""
    quantised, meant = {}, {}
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        if array.ndim != 2 or "layers" not in name or name.endswith("mlp.gate.weight"):
            quantised[name] = meant[name] = array
            continue
        quantised[name] = array.astype(FLOAT8)
        scales = rng.uniform(0.1, 2.0, [-(-array.shape[0] // 2), -(-array.shape[1] // 3)]).astype(np.float32)
        quantised[f"{name}_scale_inv"] = scales
        whole = np.array([[scales[i // 2, j // 3] for j in range(array.shape[1])] for i in range(array.shape[0])])
        meant[name] = (quantised[name].astype(np.float32) * whole).astype(ml_dtypes.bfloat16)
    return quantised, meant


def _quantise_four_bits(tensors, rng):
    """The experts' tensors [E, in, out] drawn anew; what they stand for is read, and held to transformers above."""
    quantised = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, out = tensor.shape
            quantised[f"{name}_blocks"] = rng.integers(0, 256, (experts, out, width // 32, 16), np.uint8)
            quantised[f"{name}_scales"] = rng.integers(118, 128, (experts, out, width // 32), np.uint8)
        else:
            quantised[name] = np.asarray(tensor)
    return quantised, {name: np.asarray(tensor) for name, tensor in dequantised(quantised, MXFP4).items()}


CASES = {
    "deepseek_v3": (_quantise_float8, FP8, {}),
    "gpt_oss": (_quantise_four_bits, MXFP4, {"hidden_size": 32, "intermediate_size": 64}),
}


def _quantised(tmp_path, name):
    """Folders of a quantised checkpoint and of the one that it stands for."""
    quantise, config, sizes = CASES[name]
    folder, *_ = written(tmp_path, name, **sizes)
    for kind, tensors in zip(("quantised", "meant"), quantise(TensorFiles(folder), np.random.default_rng(0)), strict=True):
        write_shards(tmp_path / kind, tensors.items())
        write_json(tmp_path / kind / "config.json", TINY[name] | sizes | (config if kind == "quantised" else {}))
    return tmp_path / "quantised", tmp_path / "meant"


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_checkpoint_is_the_one_that_it_stands_for(tmp_path, name):
    quantised, meant = _quantised(tmp_path, name)
    (model, *arrays), (expected_model, *expected) = load_params(quantised), load_params(meant)
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)
    save_hf(tmp_path / "again", model, *arrays, original=quantised)
    again, like = TensorFiles(tmp_path / "again"), TensorFiles(meant)
    assert set(again) == set(like)
    for tensor in like:
        assert again[tensor].dtype == like[tensor].dtype
        np.testing.assert_array_equal(np.asarray(again[tensor]), np.asarray(like[tensor]))
    assert "quantization_config" not in read_json(tmp_path / "again" / "config.json")


REFUSED = {
    "no scales": ({"w_scale_inv": None}, r"w is quantised, and its scales w_scale_inv are missing; download all files"),
    "other scales": ({"w_scale_inv": np.ones((1, 2), np.float32)}, r"w_scale_inv has shape \[1, 2\] and w makes it \[2, 2\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_scales_that_do_not_fit_are_refused(case):
    change, message = REFUSED[case]
    tensors = {"w": np.ones((3, 4)).astype(FLOAT8), "w_scale_inv": np.ones((2, 2), np.float32)} | change
    with pytest.raises(CheckpointError, match=message):
        dequantised({name: tensor for name, tensor in tensors.items() if tensor is not None}, FP8)
