"""A server on a free port of this machine, in a thread, over any generator; and what its tests ask it."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from moe_jax.data.tokenizers import Bytes, Tokenizer
from moe_jax.serve.engine import Engine, Rows
from moe_jax.serve.http import make_app
from moe_jax.serve.prompts import Prompts
from moe_jax.serve.server import Server, bind, url

NAME = "tiny"
SECONDS = 60.0  # until a wait is given up


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    engine: Engine
    prompts: Prompts
    server: Server

    def get(self, path: str) -> httpx.Response:
        """What a path has."""
        return httpx.get(f"{self.url}{path}", timeout=SECONDS)

    def post(self, path: str, **body) -> httpx.Response:
        """A request with a JSON body."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=SECONDS)

    def complete(self, prompt, **body) -> httpx.Response:
        """A completion, greedy unless `body` says otherwise."""
        return self.post("/v1/completions", **({"model": NAME, "prompt": prompt, "temperature": 0} | body))

    def chat(self, content: str, **body) -> httpx.Response:
        """A chat completion of one message of the user's."""
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", **({"model": NAME, "messages": messages, "temperature": 0} | body))

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value in the registry; 0 where there is none yet."""
        return self.engine.metrics.registry.get_sample_value(f"moe_jax_{name}", labels) or 0.0


@contextlib.contextmanager
def serving(
    generator: Rows, *, tokenizer: Tokenizer | None = None, queue_size: int = 64, prompts: Prompts | None = None, **app
) -> Iterator[Served]:
    """Serves `generator` by real HTTP; no request is under way any more when it ends."""
    prompts = prompts or Prompts(tokenizer or Bytes())
    engine = Engine(generator, queue_size)
    listener = bind("127.0.0.1", 0)
    listener.listen()
    address = url(listener)
    server = Server(make_app(engine, prompts, NAME, **app), engine, drain_seconds=SECONDS, ready=lambda: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Served(address, engine, prompts, server)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert not engine.busy


def until(condition, what: str = "it") -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"{what} did not come to pass"
        time.sleep(0.005)


def events(response: httpx.Response) -> list[dict]:
    """The objects of server-sent events, of which the last must be [DONE]."""
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
