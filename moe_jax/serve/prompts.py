"""Prompts: a text or a conversation as the tokens that the model continues, and the tokens that end its answer."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from moe_jax.convert.safetensors_files import read_json
from moe_jax.data.tokenizers import Pretrained, Tokenizer
from moe_jax.serve.chat_template import find_template
from moe_jax.serve.refusals import ApiError

ASSISTANT = "assistant:"
NEXT_TURN = "\nuser:"


class Prompts:
    """How one model is asked.

    A model of our own sees its texts after the end-of-text token, as in training. A checkpoint of Hugging Face that is served as it
    is sees them as transformers encodes them: special tokens in a text are special, and before it stands what its tokenizer puts
    there, usually one token that begins a text, or nothing.

    Args:
      tokenizer: of the model.
      folder: the checkpoint of Hugging Face that the tokenizer is from, if it is; it may be gone.
      as_is: the weights are that checkpoint's.
      plain: conversations are written plainly though the folder has a chat template.

    Attributes:
      stop_tokens: end an answer: the end-of-text token, and what the folder names beside it.
      chat_stops: strings that end an answer in a conversation.
      chat_format: a word on how conversations are written.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path | None = None, *, as_is: bool = False, plain: bool = False):
        self.tokenizer = tokenizer
        hf = _parsing(tokenizer) if isinstance(tokenizer, Pretrained) else None
        self._encode_as_is = hf.encode if as_is and hf is not None else None
        self._template = find_template(folder, hf) if folder is not None and hf is not None and not plain else None
        self.stop_tokens = frozenset({tokenizer.eot, *(_ends(folder, hf) if folder is not None and hf is not None else ())})
        self.chat_stops = () if self._template else (NEXT_TURN,)
        self.chat_format = "the checkpoint's chat template" if self._template else "plain chat format"

    def text(self, text: str) -> np.ndarray:
        """int32 tokens of a prompt."""
        if self._encode_as_is is None:
            return np.concatenate([[self.tokenizer.eot], self.tokenizer.encode(text)]).astype(np.int32)
        ids = self._encode_as_is(text).ids
        return np.array(ids or [self.tokenizer.eot], np.int32)

    def chat(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """int32 tokens of a conversation (`role` and `content` of each message) up to where the assistant's answer begins.

        Raises:
          ApiError: the chat template refuses the messages.
        """
        if self._template:
            return np.array(self._template(messages), np.int32)
        return self.text("".join(f"{message['role']}: {message['content']}\n" for message in messages) + ASSISTANT)


def check_encodable(text: str, field: str) -> None:
    """Raises ApiError for half a surrogate pair, which no encoding of text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(
            f"{field} has half a surrogate pair at character {error.start}, which is no text; take it out.", field
        ) from error


def _parsing(tokenizer: Pretrained) -> tokenizers.Tokenizer:
    """The tokenizer as transformers uses it: the names of special tokens in a text are these tokens."""
    hf = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    hf.encode_special_tokens = False
    hf.no_truncation()
    hf.no_padding()
    return hf


def _ends(folder: Path, hf: tokenizers.Tokenizer) -> set[int]:
    """Every token that a file of the checkpoint's says to end a text or a turn."""
    ends = set()
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        tree = read_json(folder / file) if (folder / file).is_file() else {}
        ids, token = tree.get("eos_token_id"), tree.get("eos_token")
        ends.update(itertools.chain([ids] if isinstance(ids, int) else ids or ()))
        name = token["content"] if isinstance(token, dict) else token
        if isinstance(name, str) and (found := hf.token_to_id(name)) is not None:
            ends.add(found)
    return ends
