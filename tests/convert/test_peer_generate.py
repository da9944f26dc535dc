"""Greedy text of every family in miniature: ours, many prompts at once, against `generate` of transformers, one prompt at a time."""

import functools

import hf_models
import jax
import numpy as np
import pytest

from moe_jax.config import Config, MeshConfig
from moe_jax.convert import initial
from moe_jax.mesh import make_mesh
from moe_jax.models.generator import Generator
from moe_jax.models.inference_weights import lay_out_for_inference
from moe_jax.models.sampling import Sampling

pytestmark = pytest.mark.slow  # torch is an extra that this tier installs
MESHES = {"one": MeshConfig(data=1), "eight": MeshConfig(data=1, expert=4, tensor=2)}
ON_EIGHT = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
LENGTHS, NEW_TOKENS = (1, 9, 4, 14), 12  # past the windows of 5, and past the 16 positions before YaRN stretches


def prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(0, hf_models.VOCAB, length).astype(np.int32) for length in LENGTHS]


@functools.cache
def theirs(name):
    """(tokens, log-probabilities), each [prompts, NEW_TOKENS], with the library's own cache; no choice between near equals."""
    import torch

    model, tokens, log_probs = hf_models.build(name, seed=0).eval(), [], []
    for prompt in prompts():
        ids = torch.tensor(prompt, dtype=torch.long)[None]
        options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        best = torch.stack(out.logits)[:, 0].log_softmax(-1).topk(2).values.numpy()
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "two tokens are nearly equal: choose other prompts"
        tokens.append(out.sequences[0, len(prompt) :].numpy())
        log_probs.append(best[:, 0])
    return np.array(tokens), np.array(log_probs)


def ours(name, mesh_config):
    """As `theirs`, prompts together in the rows of one generator: two of them have three tokens before the others come."""
    config = initial.complete(Config(init_from=f"hf:{hf_models.theirs(name).folder}", mesh=mesh_config))
    mesh = make_mesh(config, jax.devices()[: np.prod(mesh_config.shape)])
    with jax.set_mesh(mesh):
        weights = initial.load(initial.open_for(config), config, mesh)
    sizes = dict(vocab_size=hf_models.VOCAB, rows=len(LENGTHS), max_length=max(LENGTHS) + NEW_TOKENS)
    generator, drawn = Generator(lay_out_for_inference(config.model, *weights, mesh), **sizes), [[] for _ in LENGTHS]

    def keep(step):
        for row, one in step.items():
            drawn[row].append(one)
            if len(drawn[row]) == NEW_TOKENS:
                generator.release(row)

    for rows in ((2, 0), (1, 3)):
        keep(generator.admit({row: prompts()[row] for row in rows}, dict.fromkeys(rows, Sampling(temperature=0.0))))
        for _ in range(2 if rows == (2, 0) else NEW_TOKENS - 1):
            keep(generator.step())
    assert not generator.live
    return np.array([[one.token for one in row] for row in drawn]), np.array([[one.log_prob for one in row] for row in drawn])


@pytest.mark.parametrize(("name", "mesh"), [*((n, "one") for n in hf_models.CASES), *((n, "eight") for n in ON_EIGHT)])
def test_greedy_text_is_that_of_transformers(name, mesh):
    tokens, log_probs = ours(name, MESHES[mesh])
    np.testing.assert_array_equal(tokens, theirs(name)[0])
    np.testing.assert_allclose(log_probs, theirs(name)[1], atol=1e-4)
