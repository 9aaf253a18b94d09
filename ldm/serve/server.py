"""The server process of ``ldm serve``: its socket, and its shutdown."""

from __future__ import annotations

import os
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ldm.errors import UsageError, first_line
from ldm.serve.queue import Queue

CLOSE_SECONDS = 3  # for responses in progress, and again for the current denoising step


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: when the host does not exist or the port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"cannot listen at {host} port {port} ({reason}); choose another --port or --host") from None


def address(listening: socket.socket) -> str:
    """The URL for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    host = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else str(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Cancels all jobs before it waits for its requests to end."""

    def __init__(self, config: uvicorn.Config, queue: Queue):
        super().__init__(config)
        self.queue = queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn, do not raise the signal again after the shutdown: the process should exit with 0."""
        self.force_exit, self.should_exit = self.should_exit, True


def serve(app: ASGIApp, queue: Queue, listening: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM, then stop within seconds."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    Server(config, queue).run(sockets=[listening])
    ended = queue.join(CLOSE_SECONDS)
    print("stopped", flush=True)
    if not ended:
        # a long step still runs in torch's threads, which can crash while the interpreter shuts down
        os._exit(0)
