"""OpenAI's own client library against a server: what it reads, and the exceptions it makes of refusals."""

import asyncio
import concurrent.futures

import openai
import pytest
from fake_generator import FakeGenerator
from serving import NAME, SECONDS, serving, until

from moe_jax.models.sampling import Sampling

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def served():
    with serving(FakeGenerator(rows=4, max_length=128), queue_size=100) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=SECONDS)


def expected(served, prompt, num_tokens, sampling=GREEDY):
    return bytes(served.engine.generator.expected([256, *prompt.encode()], num_tokens, sampling)).decode()


def test_a_completion(served, client):
    answer = client.completions.create(model=NAME, prompt="hello", max_tokens=7, temperature=0, logprobs=0)
    assert answer.choices[0].text == expected(served, "hello", 7)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs.text_offset == list(range(7))
    assert answer.usage.total_tokens == 13
    sampled = client.completions.create(model=NAME, prompt="hello", max_tokens=7, seed=3, extra_body={"top_k": 5, "min_p": 0.1})
    assert sampled.choices[0].text == expected(served, "hello", 7, Sampling(seed=3))


def test_a_chat(served, client):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=7, temperature=0, logprobs=True
    )
    text = expected(served, "system: be brief\nuser: hi\nassistant:", 7)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert [token.token for token in answer.choices[0].logprobs.content] == list(text)
    again = [*messages, answer.choices[0].message, {"role": "user", "content": "more"}]  # as the library gives it
    assert client.chat.completions.create(model=NAME, messages=again, max_tokens=2).usage.completion_tokens == 2


def test_streams(served, client):
    stream = client.completions.create(model=NAME, prompt="hello", max_tokens=7, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected(served, "hello", 7)
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=7,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(served, "user: hi\nassistant:", 7)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 7


def test_a_stream_that_is_closed_frees_its_row():
    generator = FakeGenerator(rows=1, held=True)
    with serving(generator) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
        with client.completions.create(model=NAME, prompt="a", max_tokens=40, stream=True) as stream:
            assert next(iter(stream)).choices[0].text
        until(lambda: all(ticket.cancelled for ticket in list(served.engine._running.values())))
        generator.go()
        until(lambda: not served.engine.busy)
        assert generator.steps == 1


def test_50_clients_at_once_in_asyncio(served):
    async def ask(client, i):
        answer = await client.completions.create(model=NAME, prompt=f"client {i}", max_tokens=1 + i % 17, temperature=0)
        return answer.choices[0].text

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(50)))

    assert asyncio.run(all_of_them()) == [expected(served, f"client {i}", 1 + i % 17) for i in range(50)]


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "moe_jax"


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"max_tokens": 200}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"frequency_penalty": 1}, openai.BadRequestError, "frequency_penalty", "unsupported_parameter"),
        ({"extra_body": {"mirostat": 1}}, openai.BadRequestError, "mirostat", "unknown_parameter"),
        ({"model": "gpt"}, openai.NotFoundError, "model", "model_not_found"),
        ({"prompt": "a" * (1 << 20)}, openai.APIStatusError, None, None),
    ],
)
def test_refusals_are_the_librarys_exceptions(client, fields, error, param, code):
    with pytest.raises(error) as refusal:
        client.completions.create(**({"model": NAME, "prompt": "hello"} | fields))
    assert (refusal.value.param, refusal.value.code) == (param, code)
    assert refusal.value.status_code == {openai.NotFoundError: 404, openai.APIStatusError: 413}.get(error, 400)


def test_a_full_queue_is_a_rate_limit_that_the_library_retries():
    generator = FakeGenerator(rows=1, held=True)
    with serving(generator, queue_size=0) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model=NAME, prompt="a", max_tokens=3, stream=True)
        until(lambda: generator.live)
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            client.completions.create(model=NAME, prompt="b")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            patient = client.with_options(max_retries=5).completions
            retried = pool.submit(patient.create, model=NAME, prompt="b", max_tokens=3, temperature=0)
            until(lambda: served.metric("requests_total", outcome="refused") == 2)
            generator.go(100)
            assert len(list(stream)) == 4
            assert retried.result().choices[0].text == expected(served, "b", 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_fails_in_a_stream_is_an_exception():
    generator = FakeGenerator(rows=1, fail_at=2)
    with serving(generator) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
        stream = client.completions.create(model=NAME, prompt="a", max_tokens=9, stream=True)
        with pytest.raises(openai.APIError, match="has failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="has failed"):
            client.completions.create(model=NAME, prompt="a")
