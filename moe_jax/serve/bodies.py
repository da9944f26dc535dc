"""Bodies of /v1/completions and /v1/chat/completions: what is asked for, checked to the last field, as requests for the engine."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.config import ConfigError
from moe_jax.models.sampling import Sampling
from moe_jax.serve.engine import Engine, Request
from moe_jax.serve.fields import Fields, parse_json
from moe_jax.serve.prompts import Prompts, check_encodable
from moe_jax.serve.refusals import ApiError, show

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
KNOWN = ("model", "max_tokens", "n", "stop", "stream", "stream_options", "logprobs", *SAMPLING)
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
)
FIXED = {"presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},)}
FIXED_COMPLETION = FIXED | {"echo": (False,), "best_of": (1,), "suffix": ("",)}
FIXED_CHAT = FIXED | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
ROLES = ("system", "developer", "user", "assistant")
MAX_STOPS = 4
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for a completion; a chat may fill the context


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks for.

    Attributes:
      requests: one for each choice of the response; `n` of the first prompt, then those of the next.
      prompt_tokens: of all prompts, each once.
      stops: strings that end an answer.
    """

    requests: Sequence[Request]
    prompt_tokens: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: bool


class Reader:
    """Reads bodies for one model.

    Args:
      name: of the model, which clients give as `model`.
      prompts: how it is asked.
      engine: that will answer; its generator's lengths and its capacity are limits.
    """

    def __init__(self, name: str, prompts: Prompts, engine: Engine):
        self.name, self.prompts = name, prompts
        self._max_length, self._vocab_size = engine.generator.max_length, engine.generator.vocab_size
        self._capacity = engine.capacity

    def completion(self, body: bytes) -> Asked:
        """A body of /v1/completions. Raises ApiError."""
        fields = Fields(parse_json(body), (*KNOWN, "prompt"), IGNORED, FIXED_COMPLETION)
        self._check_model(fields)
        prompts = self._prompts(fields.raw("prompt", '"a text", or a list of texts or of tokens'))
        limit = fields.integer("max_tokens", None, 1)
        logprobs = fields.integer("logprobs", None, 0, 0, "for that of the chosen tokens: those of others are not kept")
        return self._asked(fields, prompts, limit, COMPLETION_TOKENS, (), logprobs is not None)

    def chat(self, body: bytes) -> Asked:
        """A body of /v1/chat/completions. Raises ApiError."""
        known = (*KNOWN, "messages", "max_completion_tokens", "top_logprobs")
        fields = Fields(parse_json(body), known, IGNORED, FIXED_CHAT)
        self._check_model(fields)
        messages = _messages(fields.raw("messages", '[{"role": "user", "content": "..."}]'))
        fields.integer("top_logprobs", None, 0, 0, "the log-probabilities of tokens that were not chosen are not kept")
        limits = [fields.integer(name, None, 1) for name in ("max_completion_tokens", "max_tokens")]
        if None not in limits and limits[0] != limits[1]:
            raise ApiError(f"max_completion_tokens = {limits[0]} and max_tokens = {limits[1]} differ; give one.", "max_tokens")
        logprobs = fields.get("logprobs", bool, False)
        prompt_T = self.prompts.chat(messages)
        limit = next((limit for limit in limits if limit is not None), None)
        return self._asked(fields, [prompt_T], limit, self._max_length, self.prompts.chat_stops, logprobs)

    def _asked(self, fields, prompts, limit, default_limit, own_stops, logprobs):
        field = "messages" if "messages" in fields else "prompt"
        n = fields.integer("n", 1, 1)
        self._check_number(n * len(prompts), "n")
        samplings = _samplings(fields, n)
        requests = []
        for prompt_T in prompts:
            max_tokens = self._max_tokens(prompt_T, limit, default_limit, field)
            requests += [Request(prompt_T, max_tokens, sampling, self.prompts.stop_tokens) for sampling in samplings]
        stream = fields.get("stream", bool, False)
        return Asked(
            requests,
            sum(map(len, prompts)),
            (*_stops(fields), *own_stops),
            stream,
            _include_usage(fields, stream),
            logprobs,
        )

    def _check_model(self, fields):
        model = fields.get("model", str, self.name)
        if model != self.name:
            raise ApiError(
                f"model = {show(model)} is not served here; give {show(self.name)}.", "model", "model_not_found", 404
            )

    def _check_number(self, number, field):
        if number > self._capacity:
            raise ApiError(
                f"{field} makes this {number} answers, and this server works on at most {self._capacity} at once; ask for fewer.",
                field,
            )

    def _prompts(self, value: Any) -> list[np.ndarray]:
        """Of a text, a list of texts, a list of tokens or a list of these."""
        many = value if isinstance(value, list) and value and not _is_integer(value[0]) else [value]
        self._check_number(len(many), "prompt")
        return [self._prompt(item, "prompt" if many is not value else f"prompt[{i}]") for i, item in enumerate(many)]

    def _prompt(self, value, place):
        if isinstance(value, str):
            check_encodable(value, "prompt")
            return self.prompts.text(value)
        if not isinstance(value, list) or not value or not all(map(_is_integer, value)):
            raise ApiError(f"{place} = {show(value)} must be a text or a list of at least one token, an integer.", "prompt")
        wrong = next((token for token in value if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise ApiError(f"{place} has the token {show(wrong)}; the model's are from 0 to {self._vocab_size - 1}.", "prompt")
        return np.array(value, np.int32)

    def _max_tokens(self, prompt_T, limit, default, field):
        """How many tokens may be drawn. Raises ApiError for what does not fit the context."""
        room = self._max_length - len(prompt_T)
        if room < (limit or 1):
            asked = f"{len(prompt_T)} tokens, and the answer up to {limit}," if limit else f"{len(prompt_T)} tokens,"
            raise ApiError(
                f"{field} has {asked} which is more than the model's context of {self._max_length} tokens; shorten"
                f" {field}{' or lower max_tokens' if limit else ''}.",
                field,
                "context_length_exceeded",
            )
        return limit or min(room, default)


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _samplings(fields, n):
    """`n` of them, whose seeds follow on each other; from a random one where none is given."""
    given = {name: fields.get(name, int if name == "top_k" else float) for name in SAMPLING[:-1]}
    seed = fields.get("seed", int)
    seed = secrets.randbits(32) if seed is None else seed
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return [Sampling(**given, seed=(seed + i) % 2**32) for i in range(n)]
    except (ConfigError, OverflowError) as error:
        param = next((name for name in SAMPLING if str(error).startswith(name)), None)
        raise ApiError(str(error), param) from error


def _stops(fields):
    stops = fields.raw("stop", "") if "stop" in fields else []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(f"stop = {show(stops)} must be a string or a list of at most {MAX_STOPS}, none of them empty.", "stop")
    return stops


def _include_usage(fields, stream):
    if "stream_options" not in fields:
        return False
    if not stream:
        raise ApiError("stream_options is given without stream = true; leave one out or give the other.", "stream_options")
    options = Fields(fields.get("stream_options", dict), ("include_usage",), ("include_obfuscation",), {})
    return options.get("include_usage", bool, False)


def _messages(value):
    """`role` and `content` of each message, the parts of a content joined."""
    if not isinstance(value, list) or not value:
        raise ApiError(f"messages = {show(value)} must be a list of at least one message.", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message, place):
    if not isinstance(message, dict):
        raise ApiError(f'{place} = {show(message)} must be an object, {{"role": ..., "content": ...}}.', "messages")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ApiError(f"{place}.role = {show(role)} must be one of {', '.join(ROLES)}.", "messages")
    if extra := next((name for name, value in message.items() if name not in ("role", "content") and value), None):
        raise ApiError(f"{place} has {show(extra)}, which is not supported; give role and content alone.", "messages")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(f"{place}.content = {show(content)} must be a text, or a list of parts of type text.", "messages")
    text = "".join(part["text"] for part in parts)
    check_encodable(text, "messages")
    return {"role": role, "content": text}
