"""A generator without a model: what it answers is a function of the prompt and the seed alone, and it checks how it is used."""

import threading
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.models.sampling import Sampling
from moe_jax.validation import RefusalError


def letters(prompt: Sequence[int], sampling: Sampling, num_tokens: int, vocab_size: int) -> list[int]:
    """Small letters as bytes; sampled answers depend on the seed, greedy ones do not."""
    seed = sampling.seed + 1 if sampling.temperature else 0
    return np.random.default_rng([seed, *map(int, prompt)]).integers(ord("a"), ord("z") + 1, num_tokens).tolist()


class FakeGenerator:
    """Rows of texts, each continued by `answer`.

    Args:
      rows, max_length, vocab_size: as of the generator.
      answer: (prompt, sampling, num_tokens, vocab_size) -> tokens.
      fail_at: the step, counted from 1, that raises.
      held: steps wait until `go` has been called as often.
    """

    def __init__(self, rows=4, max_length=64, vocab_size=257, answer=letters, fail_at=0, held=False):
        self.rows, self.max_length, self.vocab_size = rows, max_length, vocab_size
        self.answer, self.fail_at = answer, fail_at
        self.live: set[int] = set()
        self.expert_load = np.zeros((2, 4), np.int64)
        self.steps, self.admitted = 0, []  # prompts of each call of admit
        self._tokens: dict[int, list[int]] = {}
        self._drawn: dict[int, int] = {}
        self._room: dict[int, int] = {}  # tokens that a row can still take
        self._thread = None
        self._held, self._turns = held, threading.Semaphore(0)

    def go(self, steps: int = 1) -> None:
        """Lets held steps run."""
        self._turns.release(steps)

    def admit(self, prompts: Mapping[int, np.ndarray], samplings: Mapping[int, Sampling]) -> dict[int, tuple[int, float]]:
        self._check_thread()
        assert prompts.keys() == samplings.keys()
        assert prompts
        self.admitted.append({row: prompt.tolist() for row, prompt in prompts.items()})
        for row, prompt in prompts.items():
            assert 0 <= row < self.rows
            assert row not in self.live, f"row {row} is taken"
            assert prompt.dtype == np.int32
            self.live.add(row)
            self.check(prompt, 1)
            self._tokens[row] = self.answer(prompt, samplings[row], self.max_length, self.vocab_size)
            self._drawn[row], self._room[row] = 0, self.max_length - len(prompt)
        return {row: self._next(row) for row in prompts}

    def step(self) -> dict[int, tuple[int, float]]:
        self._check_thread()
        assert self.live, "a step without a text"
        if self._held:
            self._turns.acquire()
        self.steps += 1
        if self.steps == self.fail_at:
            raise FloatingPointError("made to fail")
        return {row: self._next(row) for row in sorted(self.live)}

    def release(self, row: int) -> None:
        self._check_thread()
        self.live.remove(row)

    def check(self, prompt: np.ndarray, num_tokens: int) -> None:
        if not 1 <= len(prompt) <= self.max_length - num_tokens:
            raise RefusalError(
                f"a prompt of {len(prompt)} tokens and {num_tokens} more do not fit {self.max_length}; shorten it."
            )

    def expected(self, prompt: Sequence[int], num_tokens: int, sampling: Sampling) -> list[int]:
        """What a request for `num_tokens` is answered."""
        return self.answer(prompt, sampling, self.max_length, self.vocab_size)[:num_tokens]

    def _next(self, row):
        token = self._tokens[row][self._drawn[row]]
        self._drawn[row] += 1
        self._room[row] -= 1
        assert self._room[row] >= 0, f"row {row} is full"
        self.expert_load[:, token % 4] += 1
        return token, log_prob(token)

    def _check_thread(self):
        self._thread = self._thread or threading.get_ident()
        assert threading.get_ident() == self._thread, "called from two threads"


def log_prob(token: int) -> float:
    """That the fake gives a token."""
    return -token / 64
