"""Continuous batching: requests wait in a bounded queue, enter the generator's rows as others leave them, and get their tokens as drawn.

One thread owns the generator. Everything else may be called from any thread: `submit`, `Ticket.cancel`, `drain`.
"""

import collections
import concurrent.futures
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from moe_jax.models.sampling import Sampling
from moe_jax.serve.metrics import Metrics

STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"  # how a request ends
READY, DRAINING, BROKEN, STOPPED = "ready", "draining", "failed", "stopped"  # what the engine is
SHUTTING_DOWN = "the server is shutting down; ask again when it is back, or ask another one."
GRACE_SECONDS = 5.0  # that the thread has to end its step in after a drain
LOAD_SECONDS = 1.0  # that a reading of the expert load waits for the step under way


class EngineError(RuntimeError):
    """The engine takes no request, or could not finish one; the message is one sentence."""


class QueueFullError(EngineError):
    """As many requests are under way as the engine takes; the same one may be taken later."""


@dataclass(frozen=True, eq=False)
class Request:
    """One text to continue.

    Attributes:
      prompt_T: int32, at least one token.
      max_tokens: most tokens to draw, at least 1.
      sampling: how they are drawn.
      stop_tokens: drawing one of these ends the answer; it is counted, and not delivered.
    """

    prompt_T: np.ndarray
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()


class Token(NamedTuple):
    """A token of an answer, and its log-probability under the model's own distribution."""

    token: int
    log_prob: float


class End(NamedTuple):
    """The last event of a request: how it ended, tokens drawn, and where it was not the client who ended it early, a sentence why."""

    reason: str
    num_tokens: int
    message: str = ""


Deliver = Callable[[int, Token | End], None]


class Rows(Protocol):
    """What the engine needs of a `moe_jax.models.generator.Generator`; `check` must be safe to call from any thread."""

    rows: int
    max_length: int
    vocab_size: int

    @property
    def expert_load(self) -> np.ndarray:
        """int64 [L, E]: choices of each expert since the start."""

    def admit(self, prompts: Mapping[int, np.ndarray], samplings: Mapping[int, Sampling]) -> Mapping[int, tuple[int, float]]:
        """Takes prompts into free rows; the first token of each, and its log-probability."""

    def step(self) -> Mapping[int, tuple[int, float]]:
        """The next token of every live row."""

    def release(self, row: int) -> None:
        """Frees a row."""

    def check(self, prompt: np.ndarray, num_tokens: int) -> None:
        """Raises RefusalError for what no row can hold."""


class Ticket:
    """A request that the engine has taken."""

    def __init__(self, engine: "Engine", index: int, request: Request, deliver: Deliver):
        self.request = request
        self.cancelled = ""
        self.num_tokens = 0
        self.last_time = time.monotonic()
        self._engine, self._index, self._deliver, self._ended = engine, index, deliver, False

    def cancel(self, reason: str = CANCELLED) -> None:
        """Ends the request as `reason`: at once if it waits, before the next step if it has a row. Nothing if it has ended."""
        self._engine.cancel(self, reason)

    def send(self, token: int, log_prob: float) -> None:
        """Delivers a token, unless the request has ended."""
        if not self._ended:
            self._deliver(self._index, Token(token, log_prob))

    def end(self, reason: str, message: str = "") -> bool:
        """Delivers the last event; False when it has been before. The caller holds the engine's lock."""
        first, self._ended = not self._ended, True
        if first:
            self._deliver(self._index, End(reason, self.num_tokens, message))
        return first


class Engine:
    """A generator and the requests it works on.

    Args:
      generator: a `Generator`; from here on it is the engine's alone.
      queue_size: requests that may wait beyond those that have a row.

    Attributes:
      status: "ready", "draining" (finishes what it has), "failed" (the generator raised) or "stopped".
      message: a sentence about a status other than "ready".
      metrics: for Prometheus.
    """

    def __init__(self, generator: Rows, queue_size: int):
        self.generator, self.capacity = generator, generator.rows + queue_size
        self.status, self.message = READY, ""
        self._changed = threading.Condition()  # guards what is below
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: dict[int, Ticket] = {}
        self._load_readers: list[concurrent.futures.Future] = []
        self._stopping = False
        self._load = np.array(generator.expert_load)
        self.metrics = Metrics(lambda: len(self._waiting), lambda: len(self._running), self.expert_load)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self._waiting or self._running)

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> list[Ticket]:
        """Takes all of `requests` or none; `deliver(index, event)` gets the events of each, the last one an `End`.

        `deliver` is called in the engine's thread or, for what is ended from outside, in another one: it must return at once and not
        raise.

        Raises:
          RefusalError: a request that no row can hold.
          QueueFullError: more requests than may be under way together with those that are.
          EngineError: the engine is not ready.
        """
        for request in requests:
            self.generator.check(request.prompt_T, request.max_tokens)
        with self._changed:
            if self.status != READY:
                raise EngineError(self.message)
            under_way = len(self._waiting) + len(self._running)
            if under_way + len(requests) > self.capacity:
                self.metrics.requests.labels("refused").inc(len(requests))
                raise QueueFullError(
                    f"the queue is full: {under_way} answers are under way, {len(requests)} more are asked for, and this server takes"
                    f" {self.capacity} at once; ask again in a second."
                )
            tickets = [Ticket(self, index, request, deliver) for index, request in enumerate(requests)]
            self._waiting.extend(tickets)
            self._changed.notify_all()
        return tickets

    def cancel(self, ticket: Ticket, reason: str = CANCELLED) -> None:
        """As `Ticket.cancel`."""
        with self._changed:
            ticket.cancelled = ticket.cancelled or reason  # the first is why it ends
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._end(ticket, reason)
                self._changed.notify_all()

    def expert_load(self) -> np.ndarray:
        """int64 [L, E], read between two steps; as last read if the step under way takes long."""
        future = concurrent.futures.Future()
        with self._changed:
            if self._stopping or self.status == BROKEN:
                return self._load
            self._load_readers.append(future)
            self._changed.notify_all()
        concurrent.futures.wait([future], timeout=LOAD_SECONDS)
        return self._load

    def drain(self, seconds: float) -> None:
        """Takes no more requests, finishes those it has within `seconds`, ends the rest with an error, and stops. May be called again."""
        with self._changed:
            if self.status == READY:
                self.status, self.message = DRAINING, SHUTTING_DOWN
            self._changed.wait_for(lambda: self.status == BROKEN or not self.busy, timeout=seconds)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(GRACE_SECONDS)
        self._end_all(CANCELLED, SHUTTING_DOWN)  # where a step hangs: no client waits for it

    def _run(self) -> None:
        try:
            while self._wait():
                self._release_cancelled()
                self._admit()
                if self._running:
                    self._deliver(self.generator.step())
        finally:
            self._stop(sys.exception())

    def _wait(self) -> bool:
        """Waits until there is something to do; False when it is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self.busy or self._load_readers or self._stopping)
            readers, self._load_readers = self._load_readers, []
        if readers:
            self._load = np.array(self.generator.expert_load)
            for future in readers:
                future.set_result(None)
        return not self._stopping

    def _release_cancelled(self) -> None:
        for row, ticket in list(self._running.items()):
            if ticket.cancelled:
                self._leave(row, ticket.cancelled)

    def _admit(self) -> None:
        """As many of those that wait as there are free rows, the first come first, in one call."""
        with self._changed:
            free = [row for row in range(self.generator.rows) if row not in self._running]
            entering = {row: self._waiting.popleft() for row in free[: len(self._waiting)]}
            self._running.update(entering)
        if entering:
            prompts = {row: ticket.request.prompt_T for row, ticket in entering.items()}
            self.metrics.prompt_tokens.inc(sum(map(len, prompts.values())))
            self._deliver(self.generator.admit(prompts, {row: ticket.request.sampling for row, ticket in entering.items()}))

    def _deliver(self, drawn: Mapping[int, tuple[int, float]]) -> None:
        now = time.monotonic()
        self.metrics.generated_tokens.inc(len(drawn))
        for row, (token, log_prob) in drawn.items():
            if (ticket := self._running.get(row)) is None:  # a drain has given this step up
                continue
            seconds = self.metrics.token_seconds if ticket.num_tokens else self.metrics.first_token_seconds
            seconds.observe(now - ticket.last_time)
            ticket.num_tokens, ticket.last_time = ticket.num_tokens + 1, now
            if math.isnan(log_prob):
                self._leave(row, FAILED, "the model's logits are not finite for this text; check its weights.")
            elif token in ticket.request.stop_tokens:
                self._leave(row, STOP)
            else:
                ticket.send(int(token), float(log_prob))
                if ticket.num_tokens == ticket.request.max_tokens:
                    self._leave(row, LENGTH)

    def _leave(self, row: int, reason: str, message: str = "") -> None:
        self.generator.release(row)
        with self._changed:
            self._end(self._running.pop(row), reason, message)
            self._changed.notify_all()

    def _stop(self, error: BaseException | None) -> None:
        """The last thing that the thread does."""
        reason, status, message = CANCELLED, STOPPED, SHUTTING_DOWN
        if error is not None:
            reason, status = FAILED, BROKEN
            message = f"the model has failed ({type(error).__name__}) and every answer with it; restart the server."
        with self._changed:
            self.status, self.message = status, message
            for future in self._load_readers:
                future.set_result(None)
            self._end_all(reason, message)

    def _end_all(self, reason: str, message: str) -> None:
        with self._changed:
            for ticket in self._under_way():
                self._end(ticket, reason, message)
            self._changed.notify_all()

    def _under_way(self) -> Iterator[Ticket]:
        while self._waiting:
            yield self._waiting.popleft()
        while self._running:
            yield self._running.popitem()[1]

    def _end(self, ticket: Ticket, reason: str, message: str = "") -> None:
        if ticket.end(reason, message):
            self.metrics.requests.labels(reason).inc()
