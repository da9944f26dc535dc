"""One side of a comparison in a process of its own, so that neither disturbs the other's memory, threads or devices."""

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any, Self

import jax


class Contender:
    """Calling it runs the function once, over there, and waits; with `with`, its process ends at the end.

        with Contender(make_step, config) as step:
            step()

    Raises:
      RuntimeError: what was raised over there, with its traceback, or that the process died.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any):
        """`make(*arguments)`, run over there, gives the function; it must be importable by name, and its arguments picklable."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def __call__(self) -> None:
        self.connection.send(True)
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()

    def _answer(self):
        try:
            problem = self.connection.recv()
        except EOFError:
            self.process.join()
            problem = f"exit status {self.process.exitcode}"
        if problem:
            raise RuntimeError(f"a contender's process failed: {problem}")


def _serve(connection, make, arguments):
    try:
        function = make(*arguments)
        connection.send(None)
        while connection.recv():
            jax.block_until_ready(function())
            connection.send(None)
    except EOFError:  # no more calls
        pass
    except Exception:
        connection.send(traceback.format_exc())
