"""The HTTP interface: completions and chat completions as OpenAI has them, the model's name, health, metrics."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import prometheus_client
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from moe_jax.serve.answers import server_sent_events, whole
from moe_jax.serve.bodies import Asked, Reader
from moe_jax.serve.engine import READY, Engine, EngineError, QueueFullError
from moe_jax.serve.prompts import Prompts
from moe_jax.serve.refusals import ApiError, error_tree, show, to_json
from moe_jax.serve.shapes import ChatCompletion, Completion, Shape
from moe_jax.serve.streams import AsyncStream
from moe_jax.validation import RefusalError

MAX_BODY = 1 << 20  # bytes
RETRY_SECONDS = 1
CLIENT_GONE = 499  # for nobody: the client is not there


def make_app(engine: Engine, prompts: Prompts, name: str, max_body: int = MAX_BODY) -> Starlette:
    """The application, in which `engine` answers as the model `name`; bodies have at most `max_body` bytes."""
    endpoints = _Endpoints(engine, prompts, name, max_body)
    app = Starlette(
        routes=[
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics),
        ],
        exception_handlers={
            RefusalError: endpoints.refused,
            QueueFullError: endpoints.full,
            EngineError: endpoints.unavailable,
            HTTPException: endpoints.no_route,
            ClientDisconnect: endpoints.gone,
            Exception: endpoints.fault,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Endpoints:
    def __init__(self, engine, prompts, name, max_body):
        self._engine, self._tokenizer, self._name, self._max_body = engine, prompts.tokenizer, name, max_body
        self._reader = Reader(name, prompts, engine)
        self._model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "moe_jax"}

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self._reader.completion, Completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self._reader.chat, ChatCompletion)

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != self._name:
            raise ApiError(
                f"model = {show(asked)} is not served here; ask for {show(self._name)}.", "model", "model_not_found", 404
            )
        return json_response(self._model)

    async def health(self, request: Request) -> Response:
        engine = self._engine
        if engine.status == READY:
            return json_response({"status": engine.status})
        return json_response({"status": engine.status, "message": engine.message}, 503)

    def metrics(self, request: Request) -> Response:  # not async: it waits for the engine, in a thread of Starlette's
        exposition = prometheus_client.generate_latest(self._engine.metrics.registry)
        return Response(exposition, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def _answer(self, request: Request, read: Callable[[bytes], Asked], make_shape: type[Shape]) -> Response:
        asked = await run_in_threadpool(read, await self._body(request))
        shape = make_shape(self._name, self._tokenizer, asked.logprobs)
        stream = AsyncStream(self._engine, asked.requests)
        if asked.stream:
            return _EventStream(stream, server_sent_events(asked, stream, self._tokenizer, shape))
        watch = asyncio.create_task(_cancel_when_gone(request, stream))
        try:
            return json_response(await whole(asked, stream, self._tokenizer, shape))
        finally:
            watch.cancel()
            stream.cancel()

    async def _body(self, request):
        """The body, read no further than it may be long."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a browser sends no such thing to another site unasked
            raise ApiError(f"Content-Type is {show(kind)}; send the body as application/json.", status=415)
        length = request.headers.get("content-length", "")
        size, chunks = int(length) if length.isdecimal() else 0, []
        if size <= self._max_body:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > self._max_body:
                    break
                chunks.append(chunk)
        if size > self._max_body:
            raise ApiError(f"the body is longer than {self._max_body} bytes, the most that is taken; send less.", status=413)
        return b"".join(chunks)

    def refused(self, request: Request, error: RefusalError) -> Response:
        self._engine.metrics.requests.labels("invalid").inc()
        status, param, code = (error.status, error.param, error.code) if isinstance(error, ApiError) else (400, None, None)
        return json_response(error_tree(str(error), status, param, code), status)

    def full(self, request: Request, error: QueueFullError) -> Response:
        tree = error_tree(str(error), 429, code="rate_limit_exceeded")
        return json_response(tree, 429, {"Retry-After": str(RETRY_SECONDS)})

    def unavailable(self, request: Request, error: EngineError) -> Response:
        return json_response(error_tree(str(error), 503), 503)

    def no_route(self, request: Request, error: HTTPException) -> Response:
        path, methods = show(request.url.path), dict(error.headers or {}).get("Allow", "")
        message = (
            f"there is no {path} here; the paths are /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics."
        )
        if error.status_code == 405:
            message = f"{path} does not take {request.method}; use {methods}."
        return json_response(error_tree(message, error.status_code), error.status_code, error.headers)

    def gone(self, request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    def fault(self, request: Request, error: Exception) -> Response:
        return json_response(error_tree("the server has a fault, which is in its log; report it.", 500), 500)


class _EventStream(StreamingResponse):
    """Server-sent events; however the response ends, no request of it goes on."""

    def __init__(self, stream, events):
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._stream = stream

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.cancel()


async def _cancel_when_gone(request, stream):
    with contextlib.suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stream.cancel()


def json_response(tree: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(to_json(tree), status, headers, "application/json")
