"""The application on a socket until a signal comes: then no new requests, those under way finished, and the end."""

import signal
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from moe_jax.config import ConfigError
from moe_jax.serve.engine import GRACE_SECONDS, Engine

KEEP_ALIVE_SECONDS = 30  # clients drop an idle connection sooner, httpx after 5


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, on which nothing listens yet; port 0 takes a free one.

    Raises:
      ConfigError: the address cannot be had.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"--host={host} --port={port} cannot be listened on ({error.strerror}); choose others.") from error
    return listener


def url(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which at the first signal has the engine finish within `drain_seconds`; at a second SIGINT it waits no longer.

    `ready` is called when connections are taken and signals obeyed.
    """

    def __init__(self, app: Starlette, engine: Engine, drain_seconds: float, ready: Callable[[], None]):
        # the engine ends what it could not finish with an error; uvicorn waits for these to be sent
        patience = int(drain_seconds + 2 * GRACE_SECONDS)
        limits = {"timeout_graceful_shutdown": patience, "timeout_keep_alive": KEEP_ALIVE_SECONDS}
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, ws="none", **limits))
        self._drain = threading.Thread(target=engine.drain, args=(drain_seconds,), name="drain", daemon=True)
        self._ready = ready

    async def startup(self, sockets=None):
        """Of uvicorn: begins to listen."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets=None):
        """Of uvicorn: stops listening, waits for the connections to end."""
        self._drain.start()
        await super().shutdown(sockets)


def serve(
    app: Starlette, engine: Engine, listener: socket.socket, drain_seconds: float, ready: Callable[[], None] = lambda: None
) -> None:
    """Serves in the main thread until SIGINT or SIGTERM, then drains and returns. `ready` as in `Server`."""
    server = Server(app, engine, drain_seconds, ready)

    def end(number, frame):
        """While uvicorn's own handlers are not there: before it starts, and when it has ended and raises again what it got."""
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    server.run(sockets=[listener])
    engine.drain(0)
