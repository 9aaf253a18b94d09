"""Connections: clients that stop, more of them than there are descriptors, and signals."""

import asyncio
import resource
import signal
import socket
import time

import pytest
import uvicorn

from ldm.errors import UsageError
from ldm.serve import server
from ldm.serve.queue import Queue
from ldm.serve.server import BACKLOG, OTHER_FILES, Connection, Server, bind, connection_limit

HALF = b"GET / HTTP/1.1\r\nHost: localho"
WHOLE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = 8 * 2**20  # bytes, more than the kernel buffers


async def app(scope, receive, send):
    """Answers at once, with many bytes where they are asked for, without reading the request."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * (LARGE if scope["path"] == "/large" else 2)})


@pytest.fixture
def talk(monkeypatch):
    """Runs a coroutine function of a port beside a server that waits 0.3 s for its clients, and allows 20 connections."""
    monkeypatch.setattr(server, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr(Connection, "limit", 20)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def run(client):
        """``client`` gets the port, and a function of the connections that are open."""

        async def both():
            queue = Queue(1)
            config = uvicorn.Config(app, http=Connection, log_level="error", lifespan="off", ws="none", timeout_keep_alive=60)
            made = Server(config, queue)
            with bind("127.0.0.1", 0) as listening:
                serving = asyncio.create_task(made.serve(sockets=[listening]))
                try:
                    await asyncio.wait_for(client(listening.getsockname()[1], lambda: made.server_state.connections), 20)
                finally:
                    made.should_exit = True
                    await serving

        asyncio.run(both())

    yield run
    for each, handler in handlers.items():
        signal.signal(each, handler)


async def until_closed(reader):
    """What arrives before the connection is closed, and after how many seconds."""
    start, data = time.monotonic(), b""
    try:
        while block := await reader.read(1 << 20):
            data += block
    except ConnectionError:
        pass
    return data, time.monotonic() - start


@pytest.mark.parametrize("sent", [b"", HALF, WHOLE + HALF, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n"])
def test_a_request_that_stops_halfway_is_dropped_though_bytes_trickle_in(talk, sent):
    async def client(port, connections):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)

        async def trickle():
            while True:
                await asyncio.sleep(0.05)
                writer.write(b"a" if sent else b"")

        trickling = asyncio.create_task(trickle())
        data, seconds = await until_closed(reader)
        trickling.cancel()
        assert data.count(b"200 OK") == (0 if sent in (b"", HALF) else 1) and seconds < 10

    talk(client)


def test_a_connection_serves_many_requests(talk):
    async def client(port, connections):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(4):
            await asyncio.sleep(0.15)  # together more than the limit
            writer.write(WHOLE)
            assert b"200 OK" in await reader.readuntil(b"0\r\n\r\n")
        writer.close()

    talk(client)


def test_a_client_that_does_not_read_is_dropped_and_a_slow_one_is_not(talk):
    async def client(port, connections):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(WHOLE.replace(b"/ ", b"/large "))
            while not connections():
                await asyncio.sleep(0.01)
            start = time.monotonic()
            while connections():
                await asyncio.sleep(0.01)
            assert time.monotonic() - start > 0.2
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(WHOLE.replace(b"/ ", b"/large "))
        count = 0
        while count < LARGE:
            count += len(await reader.read(LARGE))
            await asyncio.sleep(0.01)
        writer.close()

    talk(client)


def test_further_connections_are_closed_until_others_end(talk):
    async def client(port, connections):
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        await asyncio.sleep(0.1)
        data, seconds = await until_closed((await asyncio.open_connection("127.0.0.1", port))[0])
        assert data == b"" and seconds < 0.3
        for reader, _ in held:
            await until_closed(reader)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(WHOLE)
        assert b"200 OK" in await reader.readuntil(b"\r\n")
        writer.close()

    talk(client)


def test_the_limit_follows_that_of_open_files(monkeypatch):
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.update(value=pair))

    def found(*pair):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: pair)
        return connection_limit(256)

    needed = 256 + BACKLOG + OTHER_FILES
    assert found(needed, needed) == found(resource.RLIM_INFINITY, resource.RLIM_INFINITY) == 256 and not limits
    assert found(200, resource.RLIM_INFINITY) == 256 and limits.pop("value") == (needed, resource.RLIM_INFINITY)
    assert found(200, 300) == 300 - BACKLOG - OTHER_FILES and limits.pop("value") == (300, 300)
    with pytest.raises(UsageError, match=f"may open 100 files, ldm serve needs {needed}; run ulimit -n {needed} first"):
        found(50, 100)


def test_connections_that_cannot_be_accepted_are_one_warning(capsys):
    made, loop = Server(uvicorn.Config(app), Queue(1)), asyncio.new_event_loop()
    made.queue.close()
    for _ in range(1000):
        made._report(
            loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
        )
    loop.close()
    assert capsys.readouterr().err == "ldm: warning: connections cannot be accepted ([Errno 24] Too many open files)\n"
