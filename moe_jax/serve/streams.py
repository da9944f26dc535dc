"""The events of requests, in the order they come, for a thread that waits for them or for asyncio."""

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Iterator, Sequence

from moe_jax.serve.engine import CANCELLED, Deliver, End, Engine, Request, Token


class _Tickets:
    """What both kinds of streams do with their requests."""

    def __init__(self, engine: Engine, requests: Sequence[Request], deliver: Deliver):
        self._tickets = engine.submit(requests, deliver)

    def cancel(self, index: int | None = None, reason: str = CANCELLED) -> None:
        """Ends request `index`, or all, as `reason`; those that have ended are left alone."""
        for ticket in self._tickets if index is None else [self._tickets[index]]:
            ticket.cancel(reason)


class Stream(_Tickets):
    """`for index, event in Stream(engine, requests)`; ends after the last request's `End`. Raises as `Engine.submit`."""

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        self._events: queue.SimpleQueue[tuple[int, Token | End]] = queue.SimpleQueue()
        super().__init__(engine, requests, lambda index, event: self._events.put((index, event)))

    def __iter__(self) -> Iterator[tuple[int, Token | End]]:
        left = len(self._tickets)
        while left:
            index, event = self._events.get()
            left -= isinstance(event, End)
            yield index, event


class AsyncStream(_Tickets):
    """`async for index, event in AsyncStream(engine, requests)`, in the event loop that made it."""

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        self._events: asyncio.Queue[tuple[int, Token | End]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index, event):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        super().__init__(engine, requests, deliver)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Token | End]]:
        left = len(self._tickets)
        while left:
            index, event = await self._events.get()
            left -= isinstance(event, End)
            yield index, event
