"""The server process of ``ldm serve``: its socket, its connections, and its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import HANDLED_SIGNALS

from ldm.errors import UsageError, first_line
from ldm.serve.queue import Queue
from ldm.terminal import say

CLOSE_SECONDS = 3  # for responses in progress, and again for the current denoising step
STALLED_SECONDS = 10  # for the headers of a request to arrive, and for a client to read STALLED_BYTES of an answer
STALLED_BYTES = 16 * 1024
BACKLOG = 64  # connections that the kernel holds, and that asyncio accepts at a time
OTHER_FILES = 64  # descriptors for all but connections
LOG_SECONDS = 10.0  # between lines about connections that cannot be accepted


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: when the host does not exist or the port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UsageError(f"cannot listen at {host} port {port} ({reason}); choose another --port or --host") from None


def address(listening: socket.socket) -> str:
    """The URL for a browser on this machine."""
    host, port = listening.getsockname()[:2]
    host = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else str(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def connection_limit(wanted: int) -> int:
    """How many connections the limit on open files allows, up to ``wanted``; it is raised where the system lets it be.

    Raises:
        UsageError: when it allows less than a browser opens.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + BACKLOG + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wanted = soft - BACKLOG - OTHER_FILES
    if wanted < 8:
        raise UsageError(f"this process may open {soft} files, ldm serve needs {needed}; run ulimit -n {needed} first")
    return wanted


class Connection(H11Protocol):
    """A connection that is closed when its client stops: uvicorn waits without a limit for the headers of a request, for the
    rest of one that is already answered, and for a client to read.

    Attributes:
        limit: of simultaneous connections; further ones are closed at once.
    """

    limit = 0
    _timer: asyncio.TimerHandle | None = None
    _paused = False
    _unread = 0  # bytes, when the timer started

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused = True
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused = False
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _watch(self) -> None:
        """Start the time limit when it is the client's turn, and end it when the server's begins. What arrives bit by bit does
        not extend it."""
        if not (self._paused or self.cycle is None or self.cycle.response_complete):
            self._stop_timer()
        elif self._timer is None:
            self._unread = self.transport.get_write_buffer_size()
            self._timer = self.loop.call_later(STALLED_SECONDS, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._unread - self.transport.get_write_buffer_size() < STALLED_BYTES:
            self.transport.abort()
        else:
            self._watch()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """Cancels all jobs before it waits for its requests to end. A second signal ends the process at once."""

    def __init__(self, config: uvicorn.Config, queue: Queue):
        super().__init__(config)
        self.queue = queue
        self._logged = -LOG_SECONDS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._report)
        await super().startup(sockets)

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio reports every connection that it cannot accept, dozens at a time."""
        if "socket.accept()" not in context["message"]:
            loop.default_exception_handler(context)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            say(f"ldm: warning: connections cannot be accepted ({context.get('exception')})", sys.stderr)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn, keep the handler until the process ends, and do not raise the signal again: the exit code is 0."""
        for each in HANDLED_SIGNALS:
            signal.signal(each, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            # torch's threads can crash while the interpreter shuts down
            os.write(2, b"ldm: interrupted\n")
            os._exit(128 + sig)
        self.should_exit = True


def serve(app: ASGIApp, queue: Queue, listening: socket.socket, connections: int) -> None:
    """Answer requests until SIGINT or SIGTERM, then stop within seconds; another signal ends the process at once.

    Args:
        connections: limit on simultaneous connections, see :func:`connection_limit`.
    """
    config = uvicorn.Config(
        app,
        http=type("LimitedConnection", (Connection,), {"limit": connections}),
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        backlog=BACKLOG,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    Server(config, queue).run(sockets=[listening])
    ended = queue.join(CLOSE_SECONDS)
    say("stopped")
    if not ended:
        # a long step still runs in torch's threads, which can crash while the interpreter shuts down
        os._exit(0)
