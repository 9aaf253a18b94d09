"""The web application: one page, a queue for one generating thread, and the latest images in memory.

It only answers requests of its own origin under its own names (against DNS rebinding and cross-site requests), and limits
their number and size. No part of a request becomes a path on this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import socket
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.errors import LdmError, UsageError
from ldm.serve import Limits
from ldm.serve.queue import Job, Queue, QueueFull
from ldm.serve.request import GenerationRequest, parse_request
from ldm.serve.worker import StoredImage, Worker

POLL_SECONDS = 0.05  # between looks at the progress of an image
KEEP_ALIVE_SECONDS = 10.0  # between lines sent to a waiting request
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


def create_app(worker: Worker, queue: Queue, limits: Limits, host: str = "127.0.0.1") -> RequestFilter:
    """The web application.

    ``host`` is the name that the server is bound to; requests can also use localhost, the machine's name and IP addresses.
    """
    # without FastAPI's page of documentation, which loads a script from another site
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    images: dict[str, StoredImage] = {}  # oldest first
    checking = asyncio.Lock()

    def generate(request: GenerationRequest, job: Job) -> StoredImage:
        image = worker.generate(request, job.report)
        images[image.id] = image
        for oldest in list(images)[: -limits.images]:
            del images[oldest]
        return image

    def find(image_id: str) -> StoredImage:
        image = images.get(image_id)
        if image is None:
            raise HTTPException(404, f"this image is not among the last {limits.images}; generate it again")
        return image

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: StarletteHTTPException) -> Response:
        return answer(error.status_code, error.detail, error.headers)

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """Defaults and limits for the page's form."""
        width, height = worker.size
        return {
            "name": worker.name,
            "schedulers": worker.schedulers,
            "width": width,
            "height": height,
            "unit": worker.unit,
            "limits": {name: getattr(limits, name) for name in ("prompt", "steps", "pixels")},
        }

    @app.get("/images")
    async def gallery() -> list[dict[str, Any]]:
        """All stored images, oldest first."""
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

    @app.post("/generate")
    async def submit(request: Request) -> Response:
        """Generate an image. The response is a line of JSON for each change of state; closing it cancels the generation."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
        body = await read_body(request, limits)
        try:
            # in a thread, so that other requests are answered; one at a time, since a decoded upload takes a lot of memory
            async with checking:
                parsed = await asyncio.to_thread(parse_request, body, limits, worker.size)
                await asyncio.to_thread(worker.check, parsed.settings)
            job = queue.submit(partial(generate, parsed))
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_after)}) from None
        except LdmError as error:
            raise HTTPException(503, str(error), {"Retry-After": "10"}) from None
        lines = follow(request, queue, job)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})

    for path, (name, media_type) in PAGE.items():
        response = Response(files("ldm.serve").joinpath(name).read_bytes(), media_type=media_type)
        app.add_route(path, lambda _, response=response: response)
    return RequestFilter(app, limits, {"localhost", host.lower(), socket.gethostname().lower()})


async def follow(request: Request, queue: Queue, job: Job) -> AsyncGenerator[str]:
    """Lines of JSON, one for each change of a job: waiting, working with its progress, and its end."""
    loop = asyncio.get_running_loop()
    last, sent = None, loop.time()
    try:
        while True:
            # after the queue is closed, do not wait for the current step
            now = {"state": "cancelled"} if queue.closed and not job.ended else report(queue, job)
            if now != last or loop.time() - sent > KEEP_ALIVE_SECONDS:
                # send each preview once
                same = last is not None and last.get("preview") == now.get("preview")
                yield json.dumps({key: value for key, value in now.items() if not (same and key == "preview")}) + "\n"
                last, sent = now, loop.time()
            if now["state"] not in ("waiting", "working") or await request.is_disconnected():
                return
            await asyncio.sleep(POLL_SECONDS)
    finally:
        job.cancel()  # the client has left, or the job has ended


def report(queue: Queue, job: Job) -> dict[str, Any]:
    """The state of a job, as JSON for the page."""
    state, progress = job.state, job.progress
    if state == "done":
        return {"state": state, "image": image_record(job.result)}
    if state == "working" and progress is not None:
        return {"state": state, "step": progress.step, "steps": progress.steps, "preview": progress.preview}
    return {"state": state} | ({"ahead": queue.ahead(job)} if state == "waiting" else {"error": job.error[:MAX_MESSAGE]})


def image_record(image: StoredImage) -> dict[str, Any]:
    """An image, as JSON for the page."""
    settings = image.settings.to_json()
    return {"id": image.id, "settings": settings, "started": image.start is not None, "seconds": round(image.seconds, 2)}


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body up to the limit, whatever its header announces.

    Raises:
        HTTPException: 413 if it is too long, 408 if it does not arrive in time, 400 if the client disconnects.
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
        raise HTTPException(400, "the request was cut off; send it again") from None
    return bytes(body)


def answer(status: int, error: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error response: one line of at most :data:`MAX_MESSAGE` characters."""
    line = " ".join(str(error).split()).encode("utf-8", "replace").decode()
    return JSONResponse({"error": line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + "…"}, status, headers)


class RequestFilter:
    """Middleware: checks host, origin and number of requests, and adds security headers to every response."""

    def __init__(self, app: ASGIApp, limits: Limits, names: set[str]):
        self.app, self.limits, self.names = app, limits, names
        self.active = 0

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
        self.active += 1
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self.active -= 1

    def refusal(self, method: str, headers: Headers) -> Response | None:
        """The response to a request that is refused, or None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_ours(host):
            return answer(421, "unknown host name; use the address of this server, or localhost")
        foreign = origin is not None and origin.lower().partition("://")[2] != host.lower()
        if method not in ("GET", "HEAD") and (foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site")):
            return answer(403, "this request comes from another site; use the page of this server")
        if self.active >= self.limits.requests:
            wait = {"Retry-After": str(math.ceil(KEEP_ALIVE_SECONDS))}
            return answer(503, f"{self.active} requests are being answered already; try again in a few seconds", wait)
        return None

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this server. IP addresses are accepted: DNS rebinding needs a host name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False
