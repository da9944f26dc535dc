"""The answers to one HTTP request, put together from the engine's events: whole, or as server-sent events."""

from collections.abc import AsyncIterator
from typing import NamedTuple

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.serve.bodies import Asked
from moe_jax.serve.engine import End, EngineError, Token
from moe_jax.serve.refusals import error_tree, to_json
from moe_jax.serve.shapes import Shape, Usage
from moe_jax.serve.streams import AsyncStream
from moe_jax.serve.text import AnswerText, Piece

DONE = "data: [DONE]\n\n"


class Part(NamedTuple):
    """The next piece of choice `index`; with a reason it is the last, after `num_tokens` drawn."""

    index: int
    piece: Piece
    reason: str | None
    num_tokens: int


async def parts(asked: Asked, stream: AsyncStream, tokenizer: Tokenizer) -> AsyncIterator[Part]:
    """The answers' text as it comes, each choice until it ends. Raises EngineError for one that was broken off."""
    texts = [AnswerText(tokenizer, asked.stops) for _ in asked.requests]
    left = set(range(len(texts)))
    async for index, event in stream:
        text = texts[index]
        if isinstance(event, Token) and not text.stopped:
            piece, reason = text.push(event.token, event.log_prob), None
            if text.stopped:
                stream.cancel(index, "stop")
                reason = "stop"
        elif isinstance(event, End) and index in left:
            if event.message:
                raise EngineError(event.message)
            piece, text.num_tokens = text.finish(), event.num_tokens
            reason = "stop" if text.stopped else event.reason
        else:
            continue
        if piece.text or piece.tokens or reason:
            yield Part(index, piece, reason, text.num_tokens)
        if reason:
            left.discard(index)
            if not left:
                return


async def whole(asked: Asked, stream: AsyncStream, tokenizer: Tokenizer, shape: Shape) -> dict:
    """The response in one. Raises EngineError."""
    pieces = [[] for _ in asked.requests]
    reasons, completion = [""] * len(pieces), 0
    async for part in parts(asked, stream, tokenizer):
        pieces[part.index].append(part.piece)
        if part.reason:
            reasons[part.index] = part.reason
            completion += part.num_tokens
    choices = [
        shape.choice(index, "".join(piece.text for piece in own), [token for piece in own for token in piece.tokens], reason)
        for index, (own, reason) in enumerate(zip(pieces, reasons, strict=True))
    ]
    return shape.whole(choices, Usage(asked.prompt_tokens, completion))


async def server_sent_events(asked: Asked, stream: AsyncStream, tokenizer: Tokenizer, shape: Shape) -> AsyncIterator[str]:
    """The response as it comes, `[DONE]` last; after an error, the error last."""
    usage = {"usage": None} if asked.include_usage else {}
    completion = 0
    for index in range(len(asked.requests)):
        for choice in shape.opening(index):
            yield _event(shape.chunk([choice], **usage))
    try:
        async for part in parts(asked, stream, tokenizer):
            if part.piece.text or part.piece.tokens:
                yield _event(shape.chunk([shape.delta(part.index, part.piece.text, part.piece.tokens, None)], **usage))
            if part.reason:
                completion += part.num_tokens
                yield _event(shape.chunk([shape.delta(part.index, "", (), part.reason)], **usage))
    except EngineError as error:
        yield _event(error_tree(str(error), 503))
        return
    if asked.include_usage:
        yield _event(shape.chunk([], usage=Usage(asked.prompt_tokens, completion).tree()))
    yield DONE


def _event(tree):
    return f"data: {to_json(tree)}\n\n"
