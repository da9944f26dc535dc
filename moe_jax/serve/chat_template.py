"""The chat template of a Hugging Face checkpoint: messages to text as Jinja says, and special tokens in that text to their ids."""

import datetime
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from moe_jax.config import ConfigError
from moe_jax.convert.safetensors_files import read_json
from moe_jax.serve.refusals import ApiError

TOKENIZER_CONFIG = "tokenizer_config.json"
FIX = "correct it, or serve with --chat_format=plain"


class ChatTemplate:
    """A template and the tokenizer it was written for.

    Args:
      source: of the template.
      names: of special tokens that it may use, `bos_token` and the like.
      tokenizer: encodes the rendered text, special tokens as such.
      place: where the template stands, for messages.

    Raises:
      ConfigError: Jinja is not installed or cannot read the template.
    """

    def __init__(self, source: str, names: dict[str, str], tokenizer: tokenizers.Tokenizer, place: str):
        if importlib.util.find_spec("jinja2") is None:
            raise ConfigError(f"{place} has a chat template, which needs jinja2; pip install -e '.[serve]', or {FIX}.")
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template of {place} cannot be read ({error.message}); {FIX}.") from error
        self._error = jinja2.TemplateError
        self._names, self._tokenizer = names, tokenizer
        self._special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]

    def __call__(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of the conversation, and of what begins the assistant's answer. Raises ApiError."""
        for i, message in enumerate(messages):
            if found := next((name for name in self._special if name in message["content"]), None):
                raise ApiError(
                    f"messages[{i}].content has {found!r} in it, which is a special token of this model; take it out.",
                    "messages",
                )
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, tools=None, **self._names)
        except self._error as error:
            raise ApiError(f"the model's chat template does not take these messages: {error}", "messages") from error
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def find_template(folder: Path, tokenizer: tokenizers.Tokenizer) -> ChatTemplate | None:
    """The template of a checkpoint's folder: chat_template.jinja, or in tokenizer_config.json; None without. Raises as ChatTemplate."""
    described = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    place, source = folder / TOKENIZER_CONFIG, described.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        place = folder / "chat_template.jinja"
        source = place.read_text(encoding="utf-8")
    if isinstance(source, list):  # several, each with a name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if source is None:
        return None
    tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in described.items()}
    names = {name: token for name, token in tokens.items() if name.endswith("_token") and isinstance(token, str)}
    return ChatTemplate(source, names, tokenizer, str(place))


def _refuse(message: str):
    raise ApiError(f"the model's chat template does not take these messages: {message}", "messages")
