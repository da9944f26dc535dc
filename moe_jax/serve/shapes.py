"""Responses in OpenAI's shapes: a completion and a chat completion, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.serve.text import CUT, TokenText


class Usage(NamedTuple):
    """Tokens of the prompts, each once, and of the answers."""

    prompt: int
    completion: int

    def tree(self) -> dict[str, int]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Shape:
    """One response: its id, and how its choices are written.

    Args:
      model: name of it.
      tokenizer: for the texts of single tokens.
      logprobs: the client asked for log-probabilities.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool):
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict], usage: Usage) -> dict[str, Any]:
        """The response in one."""
        return {**self._named(self.whole_object), "choices": choices, "usage": usage.tree()}

    def chunk(self, choices: list[dict], **usage: dict | None) -> dict[str, Any]:
        """A part of a streamed response; `usage` is there only if the client wants one."""
        return {**self._named(self.chunk_object), "choices": choices, **usage}

    def opening(self, index: int) -> list[dict]:
        """What comes before the text of choice `index` in a stream."""
        return []

    def choice(self, index: int, text: str, tokens: Sequence[TokenText], reason: str) -> dict[str, Any]:
        """A choice of a whole response."""
        raise NotImplementedError

    def delta(self, index: int, text: str, tokens: Sequence[TokenText], reason: str | None) -> dict[str, Any]:
        """A choice of a chunk."""
        raise NotImplementedError

    def _named(self, name):
        head = dict(self._head)
        return {"id": head.pop("id"), "object": name, **head}


class Completion(Shape):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index, text, tokens, reason):
        return {"text": text, "index": index, "logprobs": self._logprobs_tree(tokens), "finish_reason": reason}

    def delta(self, index, text, tokens, reason):
        return self.choice(index, text, tokens, reason) | ({} if tokens else {"logprobs": None})

    def _logprobs_tree(self, tokens):
        if not self._logprobs:
            return None
        return {
            "tokens": [self._tokenizer.decode([token.token]) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": None,
            "text_offset": [token.offset for token in tokens],
        }


class ChatCompletion(Shape):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index):
        return [self._choice(index, "delta", {"role": "assistant", "content": ""}, None, None)]

    def choice(self, index, text, tokens, reason):
        return self._choice(index, "message", {"role": "assistant", "content": text, "refusal": None}, tokens, reason)

    def delta(self, index, text, tokens, reason):
        return self._choice(index, "delta", {"content": text} if text else {}, tokens or None, reason)

    def _choice(self, index, kind, message, tokens, reason):
        logprobs = None
        if self._logprobs and tokens is not None:
            logprobs = {"content": [self._token(token) for token in tokens], "refusal": None}
        return {"index": index, kind: message, "logprobs": logprobs, "finish_reason": reason}

    def _token(self, token):
        text = self._tokenizer.decode([token.token])
        known = None if CUT in text else list(text.encode())  # a part of a character has no text of its own
        return {"token": text, "logprob": token.log_prob, "bytes": known, "top_logprobs": []}
