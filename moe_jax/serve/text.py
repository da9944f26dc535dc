"""The text of an answer as its tokens come: whole characters only, and nothing that may be the beginning of a stop string."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.data.tokenizers import Tokenizer

CUT = "\ufffd"  # what a tokenizer gives for a character cut in its bytes
LONGEST_CUT = 3  # bytes of a character that lacks its last one


class Detokenizer:
    """Tokens to text, a character when its last byte has come; put together, the texts are `tokenizer.decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tail: list[int] = []  # tokens that the character under way may have begun in
        self._sent = 0  # characters of the tail's text that were given before

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        self._tail.append(token)
        text = self._tokenizer.decode(self._tail)
        whole = text.removesuffix(CUT)  # at most the last one is not settled: an error is replaced as soon as it is certain
        new = whole[self._sent :]
        self._tail = self._unsettled() if whole != text else []
        self._sent = len(self._tokenizer.decode(self._tail)) - 1 if self._tail else 0
        return new

    def finish(self) -> str:
        """What is left when no token follows: a character that stays cut."""
        text = self._tokenizer.decode(self._tail)[self._sent :]
        self._tail, self._sent = [], 0
        return text

    def _unsettled(self) -> list[int]:
        """The last tokens of the tail, which hold the cut character: its first byte begins a character whatever stands before."""
        with_bytes = [i for i, token in enumerate(self._tail) if self._tokenizer.decode([token])]
        return self._tail[with_bytes[-LONGEST_CUT:][0] :]


class TokenText(NamedTuple):
    """A token of an answer with its log-probability; `offset` characters of the answer come before it."""

    token: int
    log_prob: float
    offset: int


class Piece(NamedTuple):
    """What of an answer can be sent: characters, and the tokens that begin in them."""

    text: str
    tokens: tuple[TokenText, ...]


class AnswerText:
    """An answer that ends before the first of its stop strings, which may be spread over tokens.

    Attributes:
      stopped: a stop string has come; nothing follows.
      num_tokens: pushed.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.stopped, self.num_tokens = False, 0
        self._tokenizer, self._detokenizer, self._stops = tokenizer, Detokenizer(tokenizer), stops
        self._held, self._length = "", 0  # text that may begin a stop string; characters given
        self._tokens: collections.deque[TokenText] = collections.deque()

    def push(self, token: int, log_prob: float) -> Piece:
        """What can be sent now that `token` has come."""
        self.num_tokens += 1
        new, before = self._detokenizer.push(token), self._length + len(self._held)
        if new.startswith(CUT):  # this token shows that the one before was cut: its own characters come after that
            own = self._tokenizer.decode([token]).removesuffix(CUT)
            before += len(new) - len(own) if new.endswith(own) else 0
        self._tokens.append(TokenText(token, log_prob, before))
        return self._give(new, last=False)

    def finish(self) -> Piece:
        """The rest, when no token follows."""
        return self._give(self._detokenizer.finish(), last=True)

    def _give(self, new, last):
        text = self._held + new
        found = [i for i in map(text.find, self._stops) if i >= 0]
        self.stopped = self.stopped or bool(found)
        end = min(found) if found else len(text) - (0 if last else self._partial(text))
        self._held = "" if self.stopped else text[end:]
        self._length += end
        tokens = []
        while self._tokens and (self._tokens[0].offset < self._length or (last and not self.stopped)):
            tokens.append(self._tokens.popleft())
        return Piece(text[:end], tuple(tokens))

    def _partial(self, text):
        """Length of the longest end of `text` that a stop string begins with."""
        return max(
            (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if stop.startswith(text[-n:])),
            default=0,
        )
