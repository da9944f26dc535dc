"""Reading a prompt and decoding after it give the logits of the whole text read at once by the model that was trained."""

import dataclasses
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from meshes import mesh_of
from tolerance import assert_close

from configs import published
from moe_jax.config import ConfigError, ModelConfig, RouterConfig, from_dict
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.models import inference_weights
from moe_jax.models.inference_weights import decoder_graph, decoder_weights, inference_config
from moe_jax.models.transformer import build

ROWS, SEQ_LEN, STEPS = 8, 13, 6
PUBLISHED = sorted(
    path.stem for path in pathlib.Path(published.__file__).parent.glob("*.py") if path.stem not in ("__init__", "presets")
)
LENGTHS = np.array([7, 1, 4, 6, 2, 7, 5, 3], np.int32)  # of the prompts; STEPS tokens follow each
# one of each architecture: the others (the matrix) differ in numbers that are the same in miniature
SPREAD = ("dbrx", "deepseek_moe_16b", "deepseek_v2_lite", "deepseek_v3", "glm_45", "gpt_oss_20b", "grok_1", "llama3_8b")
SPREAD += ("olmoe_1b_7b", "phi_35_moe", "qwen15_moe_a27b", "qwen3_30b_a3b", "switch_base")
FAST = ("mixtral_8x7b", "gpt_oss_20b", "deepseek_v3")
MOST_UNLIKE = ("deepseek_v3", "gpt_oss_20b", "qwen3_30b_a3b", "dbrx", "switch_base")  # over eight devices in the slow tier


def published_model(name: str) -> ModelConfig:
    """The miniature in float32, dropless, with weights far from zero, and its window, if it has one, shorter than the text."""
    model = from_dict(importlib.import_module(f"configs.published.{name}").get_config("debug")).model
    attention = dataclasses.replace(model.attention, window=5 if model.attention.window else 0)
    moe = dataclasses.replace(model.moe, dispatch="dropless")
    changes = {"vocab_size": tiny.VOCAB, "dtype": "float32", "init_std": 0.2, "remat": "none", "mtp_layers": 0}
    return dataclasses.replace(model, attention=attention, moe=moe, **changes)


def both_ways(model: ModelConfig, mesh_sizes=None, *, dispatch="touched", cache_dtype="float32", absorbed=True):
    """Logits [B, STEPS + 1, V] after each prompt and each token that follows: of the whole text at once, and decoded."""
    mesh = mesh_of(**(mesh_sizes or {}))
    rng = np.random.default_rng(3)
    tokens_BS = rng.integers(0, tiny.VOCAB, (ROWS, SEQ_LEN)).astype(np.int32)
    row_P = np.array([3, 0, 6, 1, 7, 2, 5, 4], np.int32)  # texts do not sit in the order in which they came

    @jax.jit
    def whole(params, state, tokens_BS):
        positions_BS = jnp.broadcast_to(jnp.arange(SEQ_LEN, dtype=jnp.int32), tokens_BS.shape)
        return nnx.merge(graph, params, state)(tokens_BS, jnp.ones_like(tokens_BS), positions_BS)[0]

    @jax.jit
    def decoded(params, state, tokens_BS, row_P):
        weights = decoder_weights(model, params, state)
        decoder = nnx.merge(decoder_graph(inference_config(model, dispatch), weights[0]), *weights)
        for layer in decoder.layers:
            if isinstance(layer.attention, LatentAttention):
                layer.attention.absorbed = absorbed
        cache = decoder.new_cache(ROWS, SEQ_LEN, cache_dtype)
        first_PV, _, cache = decoder.prefill(cache, tokens_BS, LENGTHS, row_P)
        texts_BS, length_B = (jnp.zeros_like(array).at[row_P].set(array) for array in (tokens_BS, jnp.asarray(LENGTHS)))

        def step(cache, i):
            token_B = jnp.take_along_axis(texts_BS, (length_B + i)[:, None], axis=1)[:, 0]
            logits_BV, _, cache = decoder.decode(cache, token_B, length_B + i, jnp.ones_like(token_B, bool))
            return cache, logits_BV

        later_SBV = jax.lax.scan(step, cache, jnp.arange(STEPS))[1]
        return first_PV, later_SBV

    with jax.set_mesh(mesh):
        graph, params, state = build(model, seed=1)
        state = jax.tree.map(
            lambda bias: bias + 0.3 * jnp.cos(jnp.arange(bias.size, dtype=jnp.float32)).reshape(bias.shape), state
        )
        whole_BSV = np.asarray(whole(params, state, tokens_BS))
        first_PV, later_SBV = map(np.asarray, decoded(params, state, tokens_BS, row_P))
    expected = np.stack([whole_BSV[b, n - 1 : n + STEPS] for b, n in enumerate(LENGTHS)])
    actual = np.concatenate([first_PV[:, None], later_SBV.swapaxes(0, 1)[row_P]], axis=1)
    return expected, actual


def tier(name, fast, slow):
    return () if name in fast else pytest.mark.slow if name in slow else pytest.mark.matrix


@pytest.mark.parametrize("name", [pytest.param(name, marks=tier(name, FAST, SPREAD)) for name in PUBLISHED])
def test_decoding_is_the_full_forward_pass(name):
    expected, actual = both_ways(published_model(name))
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mixtral_8x7b", {"data": 2, "expert": 2, "tensor": 2}),
        *(pytest.param(name, {"data": 1, "expert": 4, "tensor": 2}, marks=tier(name, (), MOST_UNLIKE)) for name in SPREAD),
        pytest.param("glm_45", {"data": 1, "fsdp": 2, "expert_outer": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
)
def test_on_eight_devices(name, mesh):
    expected, actual = both_ways(published_model(name), mesh)
    assert_close(actual, expected)


def test_latents_written_out():
    """`absorbed` off, in which form keys and values are made of every latent; the other form is that of all other tests. The scale
    is the usual one here, where the published models give theirs."""
    model = published_model("deepseek_v2_lite")
    model = dataclasses.replace(model, attention=dataclasses.replace(model.attention, scale=0.0))
    expected, actual = both_ways(model, absorbed=False)
    assert_close(actual, expected)


def test_a_window_that_every_layer_has_and_grouped_experts():
    model = published_model("mixtral_8x7b")
    attention = dataclasses.replace(model.attention, window=4, softcap=2.0)
    expected, actual = both_ways(dataclasses.replace(model, attention=attention), dispatch="dropless")
    assert_close(actual, expected)


def test_experts_in_a_stack(monkeypatch):
    """As they are on GPUs and TPUs, whose grouped products read only what they have rows for."""
    monkeypatch.setattr(inference_weights, "separates", lambda: False)
    expected, actual = both_ways(published_model("mixtral_8x7b"), dispatch="dropless")
    assert_close(actual, expected)


@pytest.mark.parametrize(("cache_dtype", "least", "most"), [("bfloat16", 1e-5, 2e-2), ("int8", 1e-4, 5e-2)])
def test_a_narrow_cache_costs_a_little(cache_dtype, least, most):
    """The first logits after the prompt have not met the cache; later ones have."""
    expected, actual = both_ways(published_model("deepseek_v2_lite"), cache_dtype=cache_dtype)
    assert_close(actual[:, 0], expected[:, 0])
    off = np.sqrt(np.mean((actual[:, 1:] - expected[:, 1:]) ** 2)) / np.sqrt(np.mean(expected**2))
    assert least < off < most


def test_a_router_that_looks_at_other_tokens_is_refused():
    model = tiny.config().model
    router = RouterConfig("expert_choice", 2, {"group": "position"})
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, router=router))
    with pytest.raises(ConfigError, match=r"model.moe.router.name = 'expert_choice' chooses for a token by other tokens"):
        inference_config(model, "dropless")
