"""The server over a model: 50 clients of mixed lengths at once, each of which gets what it gets alone."""

import concurrent.futures
import dataclasses

import jax
import numpy as np
import pytest
import tiny
from serving import serving

from moe_jax.data.tokenizers import Bytes
from moe_jax.mesh import make_mesh
from moe_jax.models.generator import Generator, continue_texts
from moe_jax.models.inference_weights import lay_out_for_inference
from moe_jax.models.sampling import Sampling
from moe_jax.models.transformer import build

CLIENTS, ROWS = 50, 8


@pytest.fixture(scope="module")
def generator():
    config = tiny.config("mixtral", "data 2 expert 4", model={"num_layers": 2})
    tokenizer = Bytes()
    model = dataclasses.replace(config.model, vocab_size=-(-tokenizer.vocab_size // 8) * 8)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        weights = build(model, seed=1)[1:]
    return Generator(lay_out_for_inference(model, *weights, mesh), vocab_size=tokenizer.vocab_size, rows=ROWS, max_length=64)


def test_50_clients_get_what_they_get_alone(generator):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef ("), rng.integers(1, 28))) for _ in range(CLIENTS)]
    lengths = [int(n) for n in rng.integers(1, 30, CLIENTS)]
    with serving(generator, queue_size=CLIENTS) as served:

        def ask(i):
            answer = served.complete(words[i], max_tokens=lengths[i], temperature=i % 2, seed=i)
            assert answer.status_code == 200, answer.text
            return answer.json()

        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(ask, range(CLIENTS)))
        prompts, stop = [served.prompts.text(text) for text in words], served.prompts.stop_tokens
    for i in range(CLIENTS):
        (alone,) = continue_texts(generator, [prompts[i]], [Sampling(i % 2, seed=i)], lengths[i], stop)
        choice, usage = answers[i]["choices"][0], answers[i]["usage"]
        assert choice["text"] == Bytes().decode(alone)
        assert choice["finish_reason"] == ("length" if len(alone) == lengths[i] else "stop")
        assert usage["prompt_tokens"] == len(prompts[i])
    assert not generator.live
