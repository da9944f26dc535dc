"""Checkpoints of every family without torch: names, single tensors by hand, round trips, a layer at a time, every refusal."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from meshes import mesh_of
from tiny_checkpoints import TINY, random_arrays, written

from moe_jax.convert.hf_config import from_hf
from moe_jax.convert.hugging_face import Export, load_params, open_checkpoint, save_hf
from moe_jax.convert.safetensors_files import TensorFiles, read_json, write_json, write_shards
from moe_jax.models.transformer import build
from moe_jax.validation import CheckpointError


def _same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


@pytest.mark.parametrize("name", TINY)
def test_round_trip(tmp_path, name):
    folder, model, params, router_state = written(tmp_path, name)
    found, *arrays = load_params(folder)
    assert found == model
    _same(arrays, [params, router_state])
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(arrays))


@pytest.mark.parametrize("name", TINY)
def test_half_precision_keeps_its_bits_and_dtypes(tmp_path, name):
    """Weights in bfloat16 and the balancing bias in float32, as DeepSeek-V3's."""
    folder, model, *arrays = written(tmp_path, name)
    mixed = {
        key: np.asarray(tensor, np.float32 if "correction_bias" in key else ml_dtypes.bfloat16)
        for key, tensor in TensorFiles(folder).items()
    }
    (tmp_path / "half").mkdir()
    write_shards(tmp_path / "half", mixed.items())
    write_json(tmp_path / "half" / "config.json", TINY[name])
    (tmp_path / "half" / "tokenizer.json").write_text("{}")
    model, *arrays = load_params(tmp_path / "half")
    save_hf(tmp_path / "again", model, *arrays, original=tmp_path / "half")
    again = TensorFiles(tmp_path / "again")
    assert set(again) == set(mixed)
    for key, tensor in mixed.items():
        assert again[key].dtype == tensor.dtype
        np.testing.assert_array_equal(np.asarray(again[key]), tensor)
    config = read_json(tmp_path / "again" / "config.json")
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    assert config == TINY[name] | {field: "bfloat16"}
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_names_as_published(tmp_path):
    """Mixtral's layer, and DeepSeek-V3's with its layer that predicts one token further."""
    folder, *_ = written(tmp_path, "mixtral")
    layer = {name.removeprefix("model.layers.1.") for name in TensorFiles(folder) if name.startswith("model.layers.1.")}
    assert layer == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        "block_sparse_moe.gate.weight",
        *(f"block_sparse_moe.experts.{e}.w{i}.weight" for e in (0, 1) for i in (1, 2, 3)),
    }
    model = dataclasses.replace(from_hf(TINY["deepseek_v3"]), mtp_layers=1)
    save_hf(tmp_path / "ahead", model, *random_arrays(model))
    names = set(TensorFiles(tmp_path / "ahead"))
    every = {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_a_proj.weight",
        "self_attn.q_a_layernorm.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
    }
    experts = {
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        *(
            f"mlp.{where}.{part}_proj.weight"
            for where in ("experts.0", "experts.1", "shared_experts")
            for part in ("gate", "up", "down")
        ),
    }
    ahead = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    dense = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    expected = {0: every | dense, 1: every | experts, 2: every | experts, 3: every | experts | ahead}
    whole = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names == whole | {f"model.layers.{i}.{name}" for i, layer in expected.items() for name in layer}


def test_tensors_by_hand(tmp_path):
    """Ours out of theirs by numpy: which layer, which expert, which half, which head."""
    folder, _, params, router_state = written(tmp_path, "deepseek_v3")
    tensor = {name: np.asarray(stored) for name, stored in TensorFiles(folder).items()}
    dense, moe = params["dense"], params["groups"]["moe"]
    kv_b = tensor["model.layers.2.self_attn.kv_b_proj.weight"].reshape(2, 4 + 5, 3)
    np.testing.assert_array_equal(moe["attention"]["wk_up_RHN"][1], kv_b[:, :4].transpose(2, 0, 1))
    np.testing.assert_array_equal(moe["attention"]["wv_up_RHN"][1], kv_b[:, 4:].transpose(2, 0, 1))
    kv_a = tensor["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    np.testing.assert_array_equal(dense["attention"]["wkv_down_DR"][0], kv_a[:3].T)
    np.testing.assert_array_equal(dense["attention"]["wk_rope_DN"][0], kv_a[3:].T)
    np.testing.assert_array_equal(dense["mlp"]["w_up_DF"][0], tensor["model.layers.0.mlp.up_proj.weight"].T)
    up = tensor["model.layers.1.mlp.experts.1.up_proj.weight"]
    np.testing.assert_array_equal(moe["moe"]["experts"]["w_up_EDF"][0, 1], up.T)
    bias = tensor["model.layers.2.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(router_state["groups"]["moe"]["moe"]["bias_E"][1], bias)


def test_tensors_by_hand_interleaved(tmp_path):
    folder, _, params, _ = written(tmp_path, "gpt_oss")
    experts = params["groups"]["moe"]["moe"]["experts"]
    fused = np.asarray(TensorFiles(folder)["model.layers.3.mlp.experts.gate_up_proj"])
    np.testing.assert_array_equal(experts["w_gate_EDF"][3], fused[..., ::2])
    np.testing.assert_array_equal(experts["w_up_EDF"][3], fused[..., 1::2])
    bias = np.asarray(TensorFiles(folder)["model.layers.0.mlp.experts.gate_up_proj_bias"])
    np.testing.assert_array_equal(experts["b_up_EF"][0], bias[:, 1::2])


def test_groups_of_layers(tmp_path):
    """Every other layer with experts: the dense ones of the groups are layers 0 and 2."""
    folder, model, params, _ = written(tmp_path, "qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 2])
    assert (model.moe.first_dense, model.moe.every) == (0, 2)
    w_up_DF = params["groups"]["dense_0"]["mlp"]["w_up_DF"]
    np.testing.assert_array_equal(w_up_DF[1], np.asarray(TensorFiles(folder)["model.layers.2.mlp.up_proj.weight"]).T)
    router = params["groups"]["moe"]["moe"]["w_router_DE"]
    np.testing.assert_array_equal(router[0], np.asarray(TensorFiles(folder)["model.layers.1.mlp.gate.weight"]).T)
    other = dataclasses.replace(model, remat="none", moe=dataclasses.replace(model.moe, every=1, first_dense=3))
    with pytest.raises(CheckpointError, match=r"model\.moe\.layers"):
        open_checkpoint(folder, other)


def test_names_in_memory_of_transformers(tmp_path):
    """Fused experts and the newer prefix are read as well, and written again as they were."""
    folder, _, params, router_state = written(tmp_path, "mixtral")
    fused = {name: np.asarray(tensor) for name, tensor in TensorFiles(folder).items()}
    for i in range(3):
        path = f"model.layers.{i}.block_sparse_moe"
        w1, w2, w3 = (np.stack([fused.pop(f"{path}.experts.{e}.w{j}.weight") for e in (0, 1)]) for j in (1, 2, 3))
        fused[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        fused[f"model.layers.{i}.mlp.experts.down_proj"] = w2
        fused[f"model.layers.{i}.mlp.gate.weight"] = fused.pop(f"{path}.gate.weight")
    write_shards(tmp_path / "fused", fused.items())
    write_json(tmp_path / "fused" / "config.json", TINY["mixtral"])
    model, *arrays = load_params(tmp_path / "fused")
    _same(arrays, [params, router_state])
    save_hf(tmp_path / "again", model, *arrays, original=tmp_path / "fused")
    again = TensorFiles(tmp_path / "again")
    assert set(again) == set(fused)
    for name, tensor in fused.items():
        np.testing.assert_array_equal(np.asarray(again[name]), tensor)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_layer_at_a_time(tmp_path, name, monkeypatch):
    """A slice of ours reads its own layer alone; a layer of theirs asks for its own slices alone."""
    folder, *_ = written(tmp_path, name)
    checkpoint, reads = open_checkpoint(folder), []
    original = TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", lambda self, tensor: reads.append(tensor) or original(self, tensor))
    for leaf in checkpoint.plan.leaves:
        for index, layer in enumerate(leaf.layers):
            reads.clear()
            part = checkpoint.plan.read(leaf, index, checkpoint.files, np.float32)
            assert part.shape == leaf.slice_shape
            assert reads
            assert all((tensor.startswith(f"model.layers.{layer}.")) == (layer is not None) for tensor in reads)
    asked = []

    def get(leaf, index):
        asked.append(leaf.layers[index])
        return checkpoint.plan.read(leaf, index, checkpoint.files, np.float32)

    whole = {}
    for layer in checkpoint.plan.layers:
        asked.clear()
        whole |= dict(checkpoint.plan.tensors(get, layers=[layer]))
        assert set(asked) == {layer}
    assert set(whole) == set(checkpoint.files)


def _changed(tmp_path, name, change, **config):
    """A tiny checkpoint whose tensors `change` has worked on."""
    folder, *_ = written(tmp_path, name)
    tensors = {key: np.asarray(tensor) for key, tensor in TensorFiles(folder).items()}
    change(tensors)
    write_shards(tmp_path / "changed", tensors.items())
    write_json(tmp_path / "changed" / "config.json", TINY[name] | config)
    return tmp_path / "changed"


UP = "model.layers.1.mlp.experts.1.up_proj.weight"
REFUSED = {
    "missing": ("qwen2_moe", lambda t: t.pop(UP), {}, r"experts\.1\.up_proj\.weight is missing"),
    "missing layers": ("llama", lambda t: None, {"num_hidden_layers": 4}, "and 10 more are missing"),
    "left over": (
        "llama",
        lambda t: None,
        {"num_hidden_layers": 2},
        r"model\.layers\.2\.\S+, .* 10 more are in the checkpoint but not in",
    ),
    "biases left over": (
        "llama",
        lambda t: None,
        {"attention_bias": False},
        r"proj\.bias, .* in the checkpoint but not in Llama",
    ),
    "shape": ("qwen2_moe", lambda t: t.update({UP: t[UP].T}), {}, r"up_proj\.weight has shape \[4, 3\] .* \[3, 4\]"),
    "vocabulary": ("mixtral", lambda t: None, {"vocab_size": 7}, r"embed_tokens\.weight has shape \[6, 4\] .* \[7, 4\]"),
    "integers": ("qwen2_moe", lambda t: t.update({UP: t[UP].astype(np.int8)}), {}, "holds int8 numbers of a quantised"),
    "float8": (
        "qwen2_moe",
        lambda t: t.update({UP: t[UP].astype(ml_dtypes.float8_e4m3fn)}),
        {},
        "float8_e4m3fn .* bfloat16 copy",
    ),
    "scales": ("qwen2_moe", lambda t: t.update({f"{UP}_scale_inv": t[UP]}), {}, "weight_scale_inv holds .* quantised"),
    "mxfp4": (
        "gpt_oss",
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj_blocks": np.zeros(3, np.uint8)}),
        {},
        "uint8",
    ),
    "not tied": (
        "llama",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        {},
        "tie_word_embeddings = True",
    ),
    "tied": (
        "llama",
        lambda t: None,
        {"tie_word_embeddings": False},
        r"tie_word_embeddings = False, but there is no lm_head\.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    name, change, config, message = REFUSED[case]
    folder = _changed(tmp_path, name, change, **config)
    with pytest.raises(CheckpointError, match=message):
        load_params(folder)


def test_ignored_and_harmless(tmp_path):
    """An old table of rotary frequencies, a head beside the table it is tied to, a layer that predicts further."""

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    load_params(_changed(tmp_path / "1", "llama", change))
    ahead = {
        "model.layers.3.enorm.weight": np.zeros(4, np.float32),
        "model.layers.3.embed_tokens.weight": np.zeros((6, 4), np.float32),
    }
    load_params(_changed(tmp_path / "2", "deepseek_v3", lambda tensors: tensors.update(ahead)))


def test_the_layer_ahead_is_read_when_asked_for(tmp_path):
    model = dataclasses.replace(from_hf(TINY["deepseek_v3"]), mtp_layers=1)
    params, router_state = random_arrays(model)
    save_hf(tmp_path / "model", model, params, router_state)
    assert read_json(tmp_path / "model" / "config.json")["num_nextn_predict_layers"] == 1
    _same(load_params(tmp_path / "model", model)[1:], (params, router_state))
    without = load_params(tmp_path / "model")
    _same(without[1], {name: tree for name, tree in params.items() if name != "mtp"})
    joined = np.asarray(TensorFiles(tmp_path / "model")["model.layers.3.eh_proj.weight"])
    np.testing.assert_array_equal(params["mtp"]["w_embed_DD"], joined[:, :4].T)
    np.testing.assert_array_equal(params["mtp"]["w_hidden_DD"], joined[:, 4:].T)


def test_a_model_of_ones_own_choice(tmp_path):
    """Another dtype and dispatch is welcome, another function not."""
    folder, model, params, _ = written(tmp_path, "mixtral")
    ours = dataclasses.replace(model, dtype="bfloat16", moe=dataclasses.replace(model.moe, dispatch="einsum"))
    found, loaded, _ = load_params(folder, ours, dtype=np.float16)
    assert found is ours
    _same(loaded, jax.tree.map(lambda array: array.astype(np.float16), params))
    with pytest.raises(CheckpointError, match=r"model\.norm_eps = 0\.1 but .* makes it 1e-05"):
        load_params(folder, dataclasses.replace(model, norm_eps=0.1))


def test_arrays_on_a_mesh(tmp_path):
    """A model that is spread over devices is written as it is."""
    model = from_hf(TINY["mixtral"])
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, tensor=1)):
        _, *arrays = build(model, seed=0)
        save_hf(tmp_path / "model", model, *arrays)
    _same(load_params(tmp_path / "model")[1:], jax.device_get(tuple(arrays)))


def test_a_bias_that_has_no_place(tmp_path):
    model = from_hf(TINY["deepseek_v2"])
    with pytest.raises(CheckpointError, match=r"groups\.moe\.moe\.bias_E is not 0\.0 everywhere, and DeepseekV2"):
        save_hf(tmp_path / "model", model, *random_arrays(model))


def test_arrays_that_have_no_place(tmp_path):
    model = dataclasses.replace(from_hf(TINY["mixtral"]), mtp_layers=1)
    with pytest.raises(CheckpointError, match=r"mtp\.\S+ .* has no tensor in MixtralForCausalLM"):
        Export(model)


def test_exports_that_make_no_sense(tmp_path):
    folder, model, params, router_state = written(tmp_path, "mixtral")
    with pytest.raises(CheckpointError, match="'Mixtral' is unknown"):
        save_hf(tmp_path / "new", model, params, router_state, architecture="Mixtral")
    with pytest.raises(CheckpointError, match=r"while .* is MixtralForCausalLM"):
        save_hf(tmp_path / "new", model, params, router_state, architecture="OlmoeForCausalLM", original=folder)
    with pytest.raises(CheckpointError, match=r"already holds config\.json"):
        save_hf(folder, model, params, router_state)
    assert not (tmp_path / "new").exists()


def test_half_precision_spares_the_balancing_bias(tmp_path):
    folder, *model = written(tmp_path, "glm4_moe")
    for name, original in ("new", None), ("like", folder):
        save_hf(tmp_path / name, *model, dtype="bfloat16", original=original)
        for key, tensor in TensorFiles(tmp_path / name).items():
            assert tensor.dtype == (np.float32 if "correction_bias" in key else ml_dtypes.bfloat16)
        config = read_json(tmp_path / name / "config.json")
        assert config["torch_dtype" if original else "dtype"] == "bfloat16"
