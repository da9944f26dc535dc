"""Several texts at once: each as if it were alone, wherever it sits, whoever comes and goes beside it, on every mesh."""

import functools

import jax
import numpy as np
import pytest
import tiny
from tolerance import assert_close

from moe_jax.config import ConfigError
from moe_jax.mesh import make_mesh
from moe_jax.models.generator import Generator, continue_texts
from moe_jax.models.inference_weights import lay_out_for_inference
from moe_jax.models.sampling import Sampling
from moe_jax.models.transformer import build
from moe_jax.ops.quantised import Quantised, dequantise, format_of
from moe_jax.ops.quantised_tree import quantise_tree
from moe_jax.validation import RefusalError

PROMPTS = [np.array([3, 1, 4]), np.array([1]), np.array([5, 9, 2, 6, 5, 3, 5, 8, 9, 7])]
VOCAB = tiny.VOCAB - 4
HOT = [Sampling(1.0, top_p=0.9, seed=seed) for seed in range(3)]
COLD = [Sampling(0.0)] * 3


@functools.cache
def generator(mesh_name="one device", rows=8) -> Generator:
    config = tiny.config("deepseek", mesh_name)
    mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
    with jax.set_mesh(mesh):
        _, params, state = build(config.model, seed=1)
    return Generator(lay_out_for_inference(config.model, params, state, mesh), vocab_size=VOCAB, rows=rows, max_length=20)


def texts(samplings, mesh_name="one device", num_tokens=6, **options):
    return continue_texts(generator(mesh_name), PROMPTS, samplings, num_tokens, **options)


def test_greedy_tokens_are_the_best_and_scores_are_of_the_same_model():
    """`score` reads the whole text at once; that it is the trained model's, test_decoder.py says."""
    g = generator("one device")
    drawn = {row: [one] for row, one in g.admit(dict(enumerate(PROMPTS)), dict(enumerate(COLD))).items()}
    for _ in range(5):
        for row, one in g.step().items():
            drawn[row].append(one)
    for row in drawn:
        g.release(row)
    whole = [np.concatenate([prompt, [one.token for one in drawn[row]]]) for row, prompt in enumerate(PROMPTS)]
    for row, score in enumerate(g.score(whole)):
        assert len(score) == len(whole[row]) - 1
        np.testing.assert_allclose(score[len(PROMPTS[row]) - 1 :], [one.log_prob for one in drawn[row]], atol=1e-5)
    others = [np.concatenate([whole[0][:-1], [token]]) for token in range(VOCAB)]
    last = [score[-1] for score in g.score(others)]
    assert np.argmax(last) == whole[0][-1]
    np.testing.assert_allclose(np.exp(last).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("mesh_name", ["data 2 expert 4", pytest.param("fsdp 2 expert 2 tensor 2", marks=pytest.mark.slow)])
def test_the_mesh_changes_no_text(mesh_name):
    for samplings in (COLD, HOT):
        for one, many in zip(texts(samplings), texts(samplings, mesh_name), strict=True):
            np.testing.assert_array_equal(one, many)


def test_a_text_is_its_own_whoever_comes_and_goes():
    """The first row is read alone and goes on; the second comes later and elsewhere, and the third when the first has gone."""
    expected, g, rows = texts(HOT), generator("one device"), (6, 2, 6)
    got = [[], [], []]
    got[0].append(g.admit({6: PROMPTS[0]}, {6: HOT[0]})[6].token)
    got[0].append(g.step()[6].token)
    got[1].append(g.admit({2: PROMPTS[1]}, {2: HOT[1]})[2].token)
    for i in (0, 1, 2):
        if i == 2:
            g.release(6)
            got[2].append(g.admit({6: PROMPTS[2]}, {6: HOT[2]})[6].token)
        while len(got[i]) < 6:
            drawn = g.step()
            assert set(drawn) == g.live
            for j in range(3):
                if rows[j] in drawn and (j != 2 or i == 2) and (j != 0 or i < 2) and len(got[j]) < 6:
                    got[j].append(drawn[rows[j]].token)
    for row in (2, 6):
        g.release(row)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_draws_depend_on_the_seed_and_never_leave_the_vocabulary():
    hot, other = texts(HOT), texts([Sampling(1.0, seed=9)] * 3)
    assert any((a != b).any() for a, b in zip(hot, other, strict=True))
    for tokens in texts([Sampling(50.0, seed=i) for i in range(3)], num_tokens=10):  # nearly even chances
        assert (tokens < VOCAB).all()
        assert len(set(tokens.tolist())) > 5  # each draw has noise of its own


def test_a_stop_token_ends_a_text_and_is_left_out():
    stop = int(texts(COLD)[0][1])
    cut = texts(COLD, stop_tokens={stop})
    np.testing.assert_array_equal(cut[0], texts(COLD)[0][:1])
    assert all(stop not in tokens for tokens in cut)


def test_choices_are_counted():
    g = generator("one device")
    before = g.expert_load.copy()
    texts(COLD, num_tokens=4)
    tokens = sum(map(len, PROMPTS)) + 3 * len(PROMPTS)  # what was read, and what was fed: all drawn but the last
    np.testing.assert_array_equal((g.expert_load - before).sum(axis=1), [3 * tokens] * 2)


def test_one_program_for_a_bucket_of_shapes():
    g = Generator(_laid_out(), vocab_size=VOCAB, rows=2, max_length=40)
    for length in (1, 5, 16):
        continue_texts(g, [np.arange(length)], [HOT[0]], 2)
    assert g._prefill._cache_size() == g._decode._cache_size() == 1
    continue_texts(g, [np.arange(17)], [COLD[0]], 2)
    assert (g._prefill._cache_size(), g._decode._cache_size()) == (2, 1)


@functools.cache
def _laid_out():
    config = tiny.config("mixtral", model={"num_layers": 2})
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return lay_out_for_inference(config.model, *build(config.model, seed=1)[1:], mesh)


@pytest.mark.parametrize("weights", ["int8", "int4:4"])
@pytest.mark.parametrize("mesh_name", ["one device", pytest.param("expert_outer 2 expert 2 tensor 2", marks=pytest.mark.slow)])
def test_quantised_weights_are_those_that_are_decoded(weights, mesh_name):
    """Against the model whose parameters went there and back before they were laid out: experts have the same scales either way."""
    config = tiny.config("mixtral", mesh_name, model={"num_layers": 2})
    mesh = make_mesh(config, jax.devices()[: np.prod(config.mesh.shape)])
    with jax.set_mesh(mesh):
        params, state = build(config.model, seed=1)[1:]
        small, report = quantise_tree(params, format_of(weights))
        back = jax.tree.map(lambda w: dequantise(w, np.float32), small, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    sizes = {"vocab_size": VOCAB, "rows": 8, "max_length": 20}
    models = [lay_out_for_inference(config.model, *of, mesh) for of in ((params, state), (back, state))]
    quantised = Generator(lay_out_for_inference(config.model, params, state, mesh, weights), **sizes)
    exact, decoded = (Generator(model, **sizes) for model in models)
    (score,), (expected,), (before,) = (g.score([PROMPTS[2]]) for g in (quantised, decoded, exact))
    assert_close(score, expected)
    assert np.abs(score - before).max() > 1e-4
    assert quantised.model.report.bytes_after == report.bytes_after < 0.6 * report.bytes_before


def test_refusals():
    g = generator("one device")
    with pytest.raises(RefusalError, match="the prompt has no token"):
        g.admit({0: np.array([], np.int32)}, {0: COLD[0]})
    with pytest.raises(RefusalError, match="10 tokens and 11 are to follow, but max_length = 20"):
        g.check(PROMPTS[2], 11)
    with pytest.raises(RefusalError, match=r"not in \[0, 60\)"):
        g.admit({0: np.array([60])}, {0: COLD[0]})
    with pytest.raises(RefusalError, match="nothing to score"):
        g.score([np.array([1])])
    with pytest.raises(ValueError, match="row 8 is not a free row of 8"):
        g.admit({8: PROMPTS[0]}, {8: COLD[0]})
    assert not g.live
    with pytest.raises(ConfigError, match=r"rows = 6 must be a multiple of 8"):
        generator("data 2 expert 4", rows=6)
    with pytest.raises(ConfigError, match="cache_dtype = 'float16' is unknown"):
        Generator(_laid_out(), vocab_size=VOCAB, rows=1, max_length=8, cache_dtype="float16")


def test_a_full_row_is_told():
    g = Generator(_laid_out(), vocab_size=VOCAB, rows=1, max_length=5)
    g.admit({0: PROMPTS[0]}, {0: COLD[0]})
    g.step(), g.step()
    with pytest.raises(ValueError, match="row 0 has 5 tokens, which is all it has room for"):
        g.step()
