"""The interface over real HTTP: shapes, refusals, streams, clients that go, limits."""

import concurrent.futures
import json
import signal
import socket

import httpx
import numpy as np
import pytest
from fake_generator import FakeGenerator, letters, log_prob
from serving import NAME, SECONDS, events, serving, until

from moe_jax.config import ConfigError
from moe_jax.data.tokenizers import Bytes
from moe_jax.models.sampling import Sampling
from moe_jax.serve.server import bind, url

GREEDY = Sampling(temperature=0.0)
SNOWMAN = "é日🙂\u2028"
JSON = {"Content-Type": "application/json"}
CHAT_PROMPT = "user: hi\nassistant:"


def unicode(prompt, sampling, num_tokens, vocab_size):
    """An answer whose characters take several tokens each, and the end-of-text token after three rounds."""
    tokens = [*(SNOWMAN.encode() * 3), 256]
    return (tokens * num_tokens)[:num_tokens]


@pytest.fixture(scope="module")
def served():
    with serving(FakeGenerator(rows=4, max_length=64)) as served:
        yield served


def expected(served, prompt, num_tokens, sampling=GREEDY):
    """The text that the fake gives after `prompt`."""
    return bytes(served.engine.generator.expected([256, *prompt.encode()], num_tokens, sampling)).decode()


def test_a_completion_has_openais_shape(served):
    response = served.complete("hello", max_tokens=5)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    tree = response.json()
    assert tree.pop("id").startswith("cmpl-")
    assert isinstance(tree.pop("created"), int)
    text = expected(served, "hello", 5)
    assert tree == {
        "object": "text_completion",
        "model": NAME,
        "choices": [{"text": text, "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11},
    }


def test_a_chat_completion_has_openais_shape(served):
    tree = served.chat("hi", max_completion_tokens=5).json()
    assert tree.pop("id").startswith("chatcmpl-")
    assert isinstance(tree.pop("created"), int)
    message = {"role": "assistant", "content": expected(served, CHAT_PROMPT, 5), "refusal": None}
    assert tree == {
        "object": "chat.completion",
        "model": NAME,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1 + len(CHAT_PROMPT), "completion_tokens": 5, "total_tokens": 6 + len(CHAT_PROMPT)},
    }


def test_a_streamed_completion_has_openais_shape(served):
    response = served.complete("hello", max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    head = {name: chunks[0][name] for name in ("id", "object", "created", "model")}
    assert head["object"] == "text_completion"
    text = expected(served, "hello", 3)
    given = [({"text": letter, "finish_reason": None}) for letter in text] + [{"text": "", "finish_reason": "length"}]
    want = [{**head, "choices": [{**choice, "index": 0, "logprobs": None}], "usage": None} for choice in given]
    usage = {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}
    assert chunks == [*want, {**head, "choices": [], "usage": usage}]


def test_a_streamed_chat_has_openais_shape(served):
    chunks = events(served.chat("hi", max_tokens=2, stream=True))
    head = {name: chunks[0][name] for name in ("id", "object", "created", "model")}
    assert head["object"] == "chat.completion.chunk"
    text = expected(served, CHAT_PROMPT, 2)
    deltas = [{"role": "assistant", "content": ""}, {"content": text[0]}, {"content": text[1]}, {}]
    reasons = [None, None, None, "length"]
    for chunk, delta, reason in zip(chunks, deltas, reasons, strict=True):
        assert chunk == {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}


def test_log_probabilities_of_the_chosen_tokens(served):
    text = expected(served, "hello", 3)
    whole = served.complete("hello", max_tokens=3, logprobs=0).json()["choices"][0]["logprobs"]
    scores = [log_prob(ord(letter)) for letter in text]
    assert whole == {"tokens": list(text), "token_logprobs": scores, "top_logprobs": None, "text_offset": [0, 1, 2]}
    streamed = [
        chunk["choices"][0]["logprobs"] for chunk in events(served.complete("hello", max_tokens=3, logprobs=0, stream=True))
    ]
    assert [tree and (tree["tokens"], tree["text_offset"]) for tree in streamed] == [
        *(([text[i]], [i]) for i in range(3)),
        None,
    ]
    text = expected(served, CHAT_PROMPT, 3)
    scores = [log_prob(ord(letter)) for letter in text]
    whole = served.chat("hi", max_tokens=3, logprobs=True).json()["choices"][0]["logprobs"]
    content = [{"token": t, "logprob": s, "bytes": [ord(t)], "top_logprobs": []} for t, s in zip(text, scores, strict=True)]
    assert whole == {"content": content, "refusal": None}
    chunks = events(served.chat("hi", max_tokens=3, logprobs=True, stream=True))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert streamed == [None, *({"content": [token], "refusal": None} for token in content), None]


def test_every_form_of_a_prompt_and_several_choices(served):
    texts, generator = ["ab", "c"], served.engine.generator
    one = [expected(served, text, 4) for text in texts]
    assert [choice["text"] for choice in served.complete(texts, max_tokens=4).json()["choices"]] == one
    ids = [[256, *text.encode()] for text in texts]
    assert [choice["text"] for choice in served.complete(ids, max_tokens=4).json()["choices"]] == one
    assert served.complete(ids[0], max_tokens=4).json()["choices"][0]["text"] == one[0]
    assert served.complete("ab", max_tokens=4, model=None).json()["choices"][0]["text"] == one[0]
    tree = served.complete(texts, max_tokens=4, n=2, seed=-1, temperature=1).json()
    seeds = [2**32 - 1, 0]  # follow on each other, modulo 2**32
    drawn = [bytes(generator.expected(row, 4, Sampling(seed=seed))).decode() for row in ids for seed in seeds]
    assert [(choice["index"], choice["text"]) for choice in tree["choices"]] == list(enumerate(drawn))
    assert tree["usage"] == {"prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21}
    streamed = [""] * 4
    for chunk in events(served.complete(texts, max_tokens=4, n=2, seed=-1, temperature=1, stream=True)):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == drawn
    unseeded = {served.complete("ab", temperature=1).json()["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) == 3


def test_max_tokens_not_given(served):
    assert served.complete("ab").json()["usage"]["completion_tokens"] == 16
    assert served.complete("a" * 55).json()["usage"]["completion_tokens"] == 8
    assert served.chat("hi").json()["usage"]["total_tokens"] == 64
    assert served.complete("a" * 60, max_tokens=3).json()["usage"]["total_tokens"] == 64


def test_characters_are_whole_and_the_end_of_text_ends_the_answer():
    with serving(FakeGenerator(answer=unicode)) as served:
        tree = served.complete("x", max_tokens=60, logprobs=0).json()
        choice = tree["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (SNOWMAN * 3, "stop")
        assert tree["usage"]["completion_tokens"] == 3 * len(SNOWMAN.encode()) + 1
        assert len(choice["logprobs"]["tokens"]) == 3 * len(SNOWMAN.encode())
        response = served.complete("x", max_tokens=60, stream=True)
        assert response.text.isascii()  # what some clients take for the end of a line is escaped
        assert [chunk["choices"][0]["text"] for chunk in events(response)] == [*SNOWMAN * 3, ""]
        assert served.complete("x", max_tokens=4).json()["choices"][0]["text"] == "é\ufffd"
        tree = served.chat("x", logprobs=True, max_tokens=3).json()["choices"][0]["logprobs"]["content"]
        assert [token["bytes"] for token in tree] == [None] * 3


def test_stop_strings():
    with serving(FakeGenerator(answer=unicode)) as served:
        for stop, text in (("日🙂", "é"), (["🙂", "\u2028é日"], "é日"), ([SNOWMAN * 2], ""), (["nowhere"], SNOWMAN * 3)):
            tree = served.complete("x", max_tokens=60, stop=stop).json()
            assert (tree["choices"][0]["text"], tree["choices"][0]["finish_reason"]) == (text, "stop")
            chunks = events(served.complete("x", max_tokens=60, stop=stop, stream=True))
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        cut = served.complete("x", max_tokens=3, stop="\ufffd").json()["choices"][0]  # only its end shows what the last byte is
        assert (cut["text"], cut["finish_reason"]) == ("é", "stop")
        assert served.complete("x", max_tokens=60, stop="日🙂").json()["usage"]["completion_tokens"] == 9
        until(lambda: served.metric("requests_total", outcome="stop") == 9)  # one by each stop string or end of text
        assert served.metric("requests_total", outcome="cancelled") == 0


def test_a_plain_chat_ends_before_the_next_turn():
    def answer(prompt, sampling, num_tokens, vocab_size):
        return list((b"yes\nuser: no" * num_tokens)[:num_tokens])

    with serving(FakeGenerator(answer=answer)) as served:
        choice = served.chat("hi").json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("yes", "stop")


def connect(served):
    """A bare connection."""
    client = socket.create_connection(served.url.removeprefix("http://").split(":"))
    client.settimeout(SECONDS)
    return client


def completion(**fields):
    return ("/v1/completions", {"model": NAME, "prompt": "ab"} | fields)


def chat(**fields):
    return ("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": "ab"}]} | fields)


REFUSED = [
    (completion(prompt=None), "prompt", "prompt is missing; give"),
    (completion(prompt=3), "prompt", "prompt = 3 must be a text or a list"),
    (completion(prompt=[]), "prompt", "prompt = [] must be"),
    (completion(prompt=[[]]), "prompt", "prompt[0] = [] must be"),
    (completion(prompt=["a", 3]), "prompt", "prompt[1] = 3 must be"),
    (completion(prompt=[1, True]), "prompt", "prompt = [1, true] must be"),
    (completion(prompt=[0, 257]), "prompt", "prompt has the token 257; the model's are from 0 to 256"),
    (completion(prompt=[[1], [-1]]), "prompt", "prompt[1] has the token -1"),
    (completion(prompt="a\ud800"), "prompt", "half a surrogate pair at character 1"),
    (completion(prompt=["a"] * 100), "prompt", "prompt makes this 100 answers, and this server works on at most 68"),
    (completion(n=69), "n", "n makes this 69 answers"),
    (completion(n=0), "n", "n = 0 must be at least 1"),
    (completion(max_tokens=0), "max_tokens", "max_tokens = 0 must be at least 1"),
    (completion(max_tokens=2.5), "max_tokens", "max_tokens = 2.5 must be an integer"),
    (completion(max_tokens="5"), "max_tokens", 'max_tokens = "5" must be an integer'),
    (completion(temperature=-1), "temperature", "temperature = -1 must be 0 (greedy) or more"),
    (completion(temperature=True), "temperature", "temperature = true must be a number"),
    (completion(top_p=0), "top_p", "top_p = 0 must be more than 0"),
    (completion(top_k=-1), "top_k", "top_k = -1 must be 0"),
    (completion(min_p=2), "min_p", "min_p = 2 must be"),
    (completion(seed=1.5), "seed", "seed = 1.5 must be an integer"),
    (completion(stop=["a"] * 5), "stop", "a list of at most 4"),
    (completion(stop=["a", ""]), "stop", "none of them empty"),
    (completion(stop=7), "stop", "stop = 7 must be a string"),
    (completion(stream=1), "stream", "stream = 1 must be true or false"),
    (completion(stream_options={"include_usage": True}), "stream_options", "without stream = true"),
    (completion(stream=True, stream_options={"x": 1}), "x", '"x" is not a field'),
    (completion(logprobs=3), "logprobs", "logprobs = 3 must be 0, for that of the chosen tokens"),
    (completion(echo=True), "echo", "echo = true is not supported, only false is; leave echo out"),
    (completion(best_of=3), "best_of", "best_of = 3 is not supported"),
    (completion(suffix="x"), "suffix", 'suffix = "x" is not supported'),
    (completion(presence_penalty=0.5), "presence_penalty", "presence_penalty = 0.5 is not supported, only 0 is"),
    (completion(logit_bias={"5": 1}), "logit_bias", "is not supported, only {} is"),
    (completion(max_token=5), "max_token", "\"max_token\" is not a field that this server knows; did you mean 'max_tokens'?"),
    (completion(**{"\ud800": 5}), "\ud800", "is not a field that this server knows"),
    (completion(prompt="a" * 64), "prompt", "prompt has 65 tokens, which is more than the model's context of 64 tokens"),
    (
        completion(max_tokens=62),
        "prompt",
        "prompt has 3 tokens, and the answer up to 62, which is more than the model's context",
    ),
    (completion(max_tokens=10**30), "prompt", "is more than the model's context"),
    (chat(messages=None), "messages", "messages is missing; give"),
    (chat(messages=[]), "messages", "messages = [] must be a list of at least one message"),
    (chat(messages=["hi"]), "messages", 'messages[0] = "hi" must be an object'),
    (chat(messages=[{"role": "tool", "content": "x"}]), "messages", 'messages[0].role = "tool" must be one of system'),
    (chat(messages=[{"role": "user"}]), "messages", "messages[0].content = null must be a text"),
    (chat(messages=[{"role": "user", "content": "\udc00"}]), "messages", "half a surrogate pair"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "messages",
        "a list of parts of type text",
    ),
    (chat(messages=[{"role": "user", "content": "x", "name": "Ann"}]), "messages", 'has "name", which is not supported'),
    (chat(messages=[{"role": "user", "content": "a" * 64}]), "messages", "messages has 82 tokens, which is more than"),
    (chat(max_tokens=3, max_completion_tokens=4), "max_tokens", "max_completion_tokens = 4 and max_tokens = 3 differ"),
    (chat(logprobs=True, top_logprobs=2), "top_logprobs", "top_logprobs = 2 must be 0"),
    (chat(logprobs=1), "logprobs", "logprobs = 1 must be true or false"),
    (chat(tools=[{"type": "function"}]), "tools", "is not supported, only [] is"),
    (chat(response_format={"type": "json_object"}), "response_format", "is not supported"),
    (chat(reasoning_effort="low"), "reasoning_effort", 'reasoning_effort = "low" is not supported; leave reasoning_effort out'),
]


@pytest.mark.parametrize(("request_", "param", "sentence"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_refused_is_told_in_a_sentence(served, request_, param, sentence):
    path, body = request_
    response = httpx.post(f"{served.url}{path}", content=json.dumps(body), headers=JSON, timeout=SECONDS)
    assert response.status_code == 400
    error = response.json()["error"]
    assert sentence in error["message"]
    assert error["message"].endswith((".", "?"))
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"] == "context_length_exceeded") == ("context" in error["message"])


def test_fields_that_change_nothing_are_taken(served):
    neutral = {"echo": False, "best_of": 1, "suffix": None, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "n": None}
    assert served.complete("ab", **neutral).status_code == 200
    message = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": None}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    body = {
        "messages": [message, parts],
        "tools": [],
        "response_format": {"type": "text"},
        "metadata": {"a": "b"},
        "store": False,
    }
    response = served.post("/v1/chat/completions", max_tokens=4, temperature=0, **body)
    assert response.json()["choices"][0]["message"]["content"] == expected(served, "assistant: a\nuser: ab\nassistant:", 4)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"a"',
        b"\xff",
        b'{"prompt": "a", "user": NaN}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
    ids=lambda body: body[:20],
)
def test_a_body_that_is_no_request(served, body):
    response = httpx.post(f"{served.url}/v1/completions", content=body, headers=JSON, timeout=SECONDS)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_other_refusals(served):
    def check(response, status, words, **error):
        assert response.status_code == status
        tree = response.json()["error"]
        assert words in tree["message"]
        assert tree.items() >= error.items()
        return response

    invalid = served.metric("requests_total", outcome="invalid")
    check(served.complete("a", model="other"), 404, 'model = "other" is not served here', code="model_not_found", param="model")
    check(served.get("/v1/models/other"), 404, "is not served here", code="model_not_found")
    assert served.metric("requests_total", outcome="invalid") == invalid + 2
    check(served.post("/v1/nothing"), 404, 'there is no "/v1/nothing" here')
    check(served.get("/v1/models/"), 404, "is not served here")
    assert check(served.get("/v1/completions"), 405, "does not take GET; use POST").headers["allow"] == "POST"
    check(httpx.post(f"{served.url}/v1/completions", data={"prompt": "a"}, timeout=SECONDS), 415, "application/json")


def test_models(served):
    tree = served.get("/v1/models").json()
    assert tree["object"] == "list"
    (model,) = tree["data"]
    assert served.get(f"/v1/models/{NAME}").json() == model
    assert (model["id"], model["object"], model["owned_by"]) == (NAME, "model", "moe_jax")
    assert isinstance(model["created"], int)


def test_a_body_that_is_too_long_is_read_no_further():
    with serving(FakeGenerator(), max_body=1000) as served:
        assert served.complete("a" * 10).status_code == 200
        response = served.complete("a" * 2000)
        assert response.status_code == 413
        assert "longer than 1000 bytes" in response.json()["error"]["message"]
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        with connect(served) as client:  # no length is announced, and the body never ends
            client.sendall((head + "400\r\n" + " " * 0x400 + "\r\n").encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 413")
        assert served.complete("a" * 10).status_code == 200


def test_a_full_queue_is_429_and_the_rest_go_on():
    generator = FakeGenerator(rows=1, held=True)
    with serving(generator, queue_size=1) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(served.complete, "a", max_tokens=3)
        until(lambda: generator.live)
        second = pool.submit(served.complete, "b", max_tokens=3)
        until(lambda: served.metric("queue_length") == 1)
        refused = served.complete("c")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "queue is full" in refused.json()["error"]["message"]
        generator.go(100)
        assert [call.result().json()["choices"][0]["text"] for call in (first, second)] == [
            expected(served, text, 3) for text in "ab"
        ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(stream):
    generator = FakeGenerator(rows=1, held=True)
    with serving(generator) as served:
        body = json.dumps({"prompt": "a", "max_tokens": 40, "stream": stream})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client = connect(served)
        client.sendall((head + body).encode())
        until(lambda: generator.live)
        if stream:
            assert b"200 OK" in client.recv(1000)
        client.close()
        until(lambda: all(ticket.cancelled for ticket in list(served.engine._running.values())))
        generator.go()
        until(lambda: not generator.live)
        assert generator.steps == 1
        generator.go(100)
        assert served.complete("b", max_tokens=3).json()["choices"][0]["text"] == expected(served, "b", 3)
        assert served.metric("requests_total", outcome="cancelled") == 1


def test_50_clients_get_their_own_answers(served):
    """Mixed lengths, streamed and not, chats and completions, some of which go away or ask for too much in between."""

    def client(i):
        rng = np.random.default_rng(i)
        prompt, n = "".join(map(chr, rng.integers(97, 123, rng.integers(1, 20)))), int(rng.integers(1, 27))
        if i % 10 == 8:
            body = {"prompt": prompt, "stream": True}
            with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=SECONDS) as response:
                return next(response.iter_lines()).startswith("data: ")
        if i % 10 == 9:
            return served.complete(prompt, max_tokens=1000).status_code == 400
        if i % 2:
            chunks = events(served.chat(prompt, max_tokens=n, stream=True))
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            return text == expected(served, f"user: {prompt}\nassistant:", n)
        return served.complete(prompt, max_tokens=n).json()["choices"][0]["text"] == expected(served, prompt, n)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        assert all(pool.map(client, range(50)))
    until(lambda: not served.engine.busy)
    assert not served.engine.generator.live


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_fails_answers_everyone_and_is_not_healthy():
    generator = FakeGenerator(rows=1, held=True, fail_at=2)
    with serving(generator) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        assert served.get("/health").json() == {"status": "ready"}
        whole, streamed = (pool.submit(served.complete, "a", max_tokens=9, stream=stream) for stream in (False, True))
        until(lambda: generator.live and served.metric("queue_length") == 1)
        generator.go(2)
        assert whole.result().status_code == 503
        assert "has failed (FloatingPointError)" in whole.result().json()["error"]["message"]
        *_, last = streamed.result().text.strip().split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["type"], "has failed" in error["message"]) == ("server_error", True)
        assert served.complete("a").status_code == 503
        health = served.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")


def test_metrics_are_prometheus(served):
    served.complete("ab", max_tokens=4)
    response = served.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    assert float(samples["moe_jax_generated_tokens_total"]) > 0
    assert float(samples['moe_jax_expert_tokens_total{expert="3",moe_layer="1"}']) > 0
    assert samples["moe_jax_rows_in_use"] == "0.0"
    for name in ("first_token_seconds", "token_seconds"):
        assert float(samples[f"moe_jax_{name}_count"]) > 0


def test_a_fault_of_the_server_is_500(served, monkeypatch):
    monkeypatch.setattr(served.prompts, "text", lambda text: 1 / 0)
    response = served.complete("a")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"


def test_a_shutdown_finishes_what_runs_and_ends_the_rest():
    generator = FakeGenerator(rows=1, held=True)
    with serving(generator) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(served.complete, "a", max_tokens=4)
        until(lambda: generator.live)
        served.server.handle_exit(signal.SIGTERM, None)
        until(lambda: served.engine.status == "draining")
        with pytest.raises(httpx.ConnectError):
            until(lambda: served.complete("b").status_code == 0)
        generator.go(100)
        assert running.result().json()["choices"][0]["text"] == expected(served, "a", 4)
        until(lambda: served.engine.status == "stopped")


def test_an_address_that_cannot_be_had_is_refused():
    listener = bind("127.0.0.1", 0)
    listener.listen()
    assert url(listener).startswith("http://127.0.0.1:")
    with pytest.raises(ConfigError, match=r"cannot be listened on .*choose others"):
        bind("127.0.0.1", listener.getsockname()[1])
    listener.close()
    six = bind("::1", 0)
    assert url(six).startswith("http://[::1]:")
    six.close()


def test_the_fake_is_a_function_of_prompt_and_seed():
    assert Bytes().decode(letters([1], GREEDY, 3, 257)) != Bytes().decode(letters([2], GREEDY, 3, 257))
    assert letters([1], GREEDY, 9, 257) != letters([1], Sampling(seed=1), 9, 257)
