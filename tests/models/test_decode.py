"""Sampling: the filters by hand, greedy text against the logits, and independence of batch and mesh."""

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.config import ConfigError
from moe_jax.mesh import make_mesh
from moe_jax.models.decode import check_sampling, filter_logits, make_next_token, sample
from moe_jax.models.transformer import build

PROMPTS = [np.array([3, 1, 4]), np.array([1]), np.array([5, 9, 2, 6, 5, 3, 5, 8, 9, 7])]


def test_filters_by_hand():
    """Probabilities .5 .3 .15 .05: top-2 keeps two; mass .6 needs the first two, .5 the first alone, .81 three."""
    logits = np.log([[0.3, 0.05, 0.5, 0.15]]).astype(np.float32)

    def kept(**options):
        return np.isfinite(filter_logits(logits, **(dict(temperature=1.0, top_k=0, top_p=1.0) | options)))[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, False, True, False]
    assert kept(top_p=0.6) == [True, False, True, False]
    assert kept(top_p=0.5) == [False, False, True, False]
    assert kept(top_p=0.81) == [True, False, True, True]
    np.testing.assert_allclose(filter_logits(logits, temperature=0.5, top_k=0, top_p=1.0), 2 * logits)


@pytest.mark.parametrize(
    ("arguments", "name"), [((-1.0, 0, 1.0), "temperature"), ((1.0, -1, 1.0), "top_k"), ((1.0, 0, 0.0), "top_p")]
)
def test_bad_sampling_is_refused(arguments, name):
    with pytest.raises(ConfigError, match=f"{name} = "):
        check_sampling(*arguments)


def texts(mesh_name, temperature, prompts=PROMPTS, seed=0):
    config = tiny.config("deepseek", mesh_name)
    mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
    with jax.set_mesh(mesh):
        graphdef, params, bias = build(config.model, seed=1)
        next_token = make_next_token(graphdef, tiny.VOCAB - 4, temperature=temperature, top_k=0, top_p=0.9)
        return sample(next_token, params, bias, mesh, prompts, 4, window=8, seed=seed)


def test_greedy_text_is_that_of_the_logits():
    """Recomputed here one prompt at a time, padded on the other side, and with the window sliding as it should."""
    config = tiny.config("deepseek")
    mesh = make_mesh(config, jax.devices()[:1])
    answers = texts("one device", 0.0)
    with jax.set_mesh(mesh):
        graphdef, params, bias = build(config.model, seed=1)
        model = nnx.merge(graphdef, params, bias)
        forward = jax.jit(lambda *arrays: model(*arrays)[0])
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            seen = list(prompt)
            for token in answer:
                text = np.array(seen[-8:], np.int32)
                left = 8 - len(text)  # padding before the text here, after it in the code
                arrays = [np.pad(a, (left, 0))[None] for a in (text, np.ones_like(text), np.arange(len(text), dtype=np.int32))]
                logits = np.asarray(forward(*map(jax.numpy.asarray, arrays)))[0, -1, : tiny.VOCAB - 4]
                assert token == logits.argmax()
                seen.append(token)


def test_draws_do_not_depend_on_the_mesh_and_do_on_the_seed():
    one = texts("one device", 1.0)
    many = texts("data 2 expert 4", 1.0)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(one, texts("one device", 1.0, seed=1), strict=True))


def test_stop_token_ends_a_row_and_is_left_out():
    config = tiny.config("deepseek")
    mesh = make_mesh(config, jax.devices()[:1])
    first = int(texts("one device", 0.0)[0][1])
    with jax.set_mesh(mesh):
        graphdef, params, bias = build(config.model, seed=1)
        next_token = make_next_token(graphdef, tiny.VOCAB - 4, temperature=0.0, top_k=0, top_p=0.9)
        answers = sample(next_token, params, bias, mesh, PROMPTS, 4, window=8, stop=first)
    assert first not in answers[0]
    assert len(answers[0]) < 4


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 0 has no token"):
        texts("one device", 0.0, prompts=[np.array([], np.int32)])
