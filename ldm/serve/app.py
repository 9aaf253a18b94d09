"""The server: one page, a queue before one drawing thread, and the latest images, in memory alone.

What may reach it: pages of its own origin, by its own names (against DNS rebinding and forged requests), so many at a time, of
so many bytes. No part of a request ever becomes a path of this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.errors import LdmError, UsageError
from ldm.serve.queue import Job, Queue, QueueFull
from ldm.serve.request import Limits, Order, read_order
from ldm.serve.worker import GeneratedImage, Worker

POLL_SECONDS = 0.05  # how often the progress of an image is looked at
ALIVE_SECONDS = 10.0  # a waiting request hears something at least so often
MAX_MESSAGE = 300
PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def create_app(worker: Worker, queue: Queue, limits: Limits, host: str = "127.0.0.1") -> ASGIApp:
    """The web application.

    Args:
        worker: draws.
        queue: in which orders wait for it.
        host: the name that the server is bound to; it answers to that, to localhost, to the machine's own and to addresses.
    """
    # no page of documentation: FastAPI's loads its script from elsewhere
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    images: dict[str, GeneratedImage] = {}  # in the order they were finished
    checking = asyncio.Lock()

    def draw(order: Order, job: Job) -> GeneratedImage:
        image = worker.draw(order, job.report)
        images[image.id] = image
        for oldest in list(images)[: -limits.images]:
            del images[oldest]
        return image

    def find(image_id: str) -> GeneratedImage:
        image = images.get(image_id)
        if image is None:
            raise HTTPException(404, f"this image is not among the last {limits.images}; draw it again")
        return image

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Response:
        return answer(error.status_code, error.detail, error.headers)

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """What the page's form needs to know."""
        width, height = worker.size
        known = {"prompt": limits.prompt, "steps": limits.steps, "pixels": limits.pixels}
        about = {"name": worker.name, "schedulers": worker.schedulers, "width": width, "height": height, "unit": worker.unit}
        return about | {"limits": known}

    @app.get("/images")
    async def gallery() -> list[dict[str, Any]]:
        """Of all images, the oldest first."""
        return [image_record(image) for image in list(images.values())]

    @app.get("/images/{image_id}/image.png")
    async def png(image_id: str) -> Response:
        return Response(find(image_id).png, media_type="image/png")

    @app.get("/images/{image_id}/start.png")
    async def start_png(image_id: str) -> Response:
        start = find(image_id).start
        if start is None:
            raise HTTPException(404, "this image did not start from another one")
        return Response(start, media_type="image/png")

    @app.post("/draw")
    async def order(request: Request) -> Response:
        """Draw an image; the answer is a line of JSON for each change, and its end cancels the drawing."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
        body = await read_body(request, limits)
        try:
            # beside the loop that answers everyone else, and one at a time: an upload takes a lot of memory when unpacked
            async with checking:
                ordered = await asyncio.to_thread(read_order, body, limits, worker.size)
                await asyncio.to_thread(worker.check, ordered.settings)
            job = queue.submit(partial(draw, ordered))
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_after)}) from None
        except LdmError as error:
            raise HTTPException(503, str(error), {"Retry-After": "10"}) from None
        lines = follow(request, queue, job)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})

    for path, (name, media_type) in PAGE.items():
        app.get(path)(static(files("ldm.serve").joinpath(name).read_bytes(), media_type))
    return RequestFilter(app, limits, {"localhost", host.lower(), socket.gethostname().lower()})


def static(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    """An endpoint that always gives the same."""

    async def give() -> Response:
        return Response(content, media_type=media_type)

    return give


async def follow(request: Request, queue: Queue, job: Job) -> AsyncIterator[str]:
    """Lines of JSON, one for each change of a job: waiting, working with its progress, and how it ended."""
    loop = asyncio.get_running_loop()
    said, spoke = None, loop.time()
    try:
        while True:
            # a closed queue waits for no step to end
            now = {"state": "cancelled"} if queue.closed and not job.ended else report(queue, job)
            if now != said or loop.time() - spoke > ALIVE_SECONDS:
                # the same preview need not be sent again
                same = said is not None and said.get("preview") == now.get("preview")
                yield json.dumps({key: value for key, value in now.items() if not (same and key == "preview")}) + "\n"
                said, spoke = now, loop.time()
            if now["state"] not in ("waiting", "working") or await request.is_disconnected():
                return
            await asyncio.sleep(POLL_SECONDS)
    finally:
        job.cancel()  # nobody is there any more, or it has ended


def report(queue: Queue, job: Job) -> dict[str, Any]:
    """What is to be said of a job now."""
    state, progress = job.state, job.progress
    if state == "done":
        return {"state": state, "image": image_record(job.result)}
    if state == "working" and progress is not None:
        return {"state": state, "step": progress.step, "steps": progress.steps, "preview": progress.preview}
    return {"state": state} | ({"ahead": queue.ahead(job)} if state == "waiting" else {"error": job.error[:MAX_MESSAGE]})


def image_record(image: GeneratedImage) -> dict[str, Any]:
    """An image as the page knows it."""
    settings = image.settings.to_json()
    return {"id": image.id, "settings": settings, "started": image.start is not None, "seconds": round(image.seconds, 2)}


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, no longer than the limit, whatever its header says of it.

    Raises:
        HTTPException: 413 for a longer one, 408 for one that does not arrive.
    """
    too_long = HTTPException(413, f"the request has more than {limits.body} bytes; send a smaller image")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 18 or int(announced) > limits.body:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body:
                    raise too_long
    except TimeoutError:
        raise HTTPException(408, f"the request did not arrive within {limits.body_seconds:g} s; send it again") from None
    except ClientDisconnect:
        raise HTTPException(400, "the request broke off; send it again") from None
    return bytes(body)


def answer(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """One line that says what is wrong."""
    line = " ".join(str(error).split()).encode("utf-8", "replace").decode()
    return JSONResponse({"error": line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + "…"}, status, headers)


class RequestFilter:
    """Before every request: by what name the server was called, from which page, and how many are here; after it, headers."""

    def __init__(self, app: ASGIApp, limits: Limits, names: set[str]):
        self.app, self.limits, self.names = app, limits, names
        self.here = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        refusal = self.refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        self.here += 1
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self.here -= 1

    def refusal(self, method: str, headers: Headers) -> Response | None:
        """What to answer to a request that is not let in."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_ours(host):
            return answer(421, "this server does not go by that name; call it by its address, or as localhost")
        foreign = origin is not None and urlsplit_or_none(origin) != host.lower()
        if method not in ("GET", "HEAD") and (foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site")):
            return answer(403, "this request comes from another page; use the page of this server")
        if self.here >= self.limits.requests:
            wait = {"Retry-After": str(math.ceil(ALIVE_SECONDS))}
            return answer(503, f"{self.here} requests are being answered already; come again in a few seconds", wait)
        return None

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. An address does: rebinding needs a name of the attacker's own."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def urlsplit_or_none(origin: str) -> str | None:
    """Host and port of an origin, None where it has none (``null``)."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
