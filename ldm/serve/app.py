"""The web application: one page, a queue for one generating thread, and the latest images in memory.

It only answers requests of its own origin under its own names (against DNS rebinding and cross-site requests), and limits
their number and size. No part of a request becomes a path on this machine. A job belongs to no connection: it continues when
the page is reloaded, which then finds it among the jobs.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import re
import secrets
import socket
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldm.errors import LdmError, UsageError
from ldm.inference.settings import GenerationSettings
from ldm.serve import Limits
from ldm.serve.queue import Job, Queue, QueueFull
from ldm.serve.request import GenerationRequest, parse_request
from ldm.serve.worker import StoredImage, Worker

POLL_SECONDS = 0.05  # between looks at the progress of an image
KEEP_ALIVE_SECONDS = 10.0  # between lines sent to a waiting request
MAX_MESSAGE = 300
ENDED_JOBS = 16  # that are listed, besides those waiting and working
# RFC 9110, section 7.2; urlsplit would take a name out of evil.example@127.0.0.1 or 127.0.0.1#@evil.example
HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", re.IGNORECASE | re.ASCII)
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


@dataclass(frozen=True)
class Generation:
    """A job and the settings of its image."""

    settings: GenerationSettings
    job: Job


def create_app(worker: Worker, queue: Queue, limits: Limits, access: Access | None = None) -> RequestFilter:
    """The web application."""
    # without FastAPI's page of documentation, which loads a script from another site
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    images: dict[str, StoredImage] = {}  # oldest first
    jobs: dict[str, Generation] = {}
    checking = asyncio.Lock()

    def generate(request: GenerationRequest, job: Job) -> StoredImage:
        image = worker.generate(request, job.report)
        images[image.id] = image
        for oldest in list(images)[: -limits.images]:
            del images[oldest]
        return image

    def add(request: GenerationRequest) -> tuple[str, Job]:
        """A new job and its id."""
        job = queue.submit(partial(generate, request))
        name = secrets.token_hex(8)
        jobs[name] = Generation(request.settings, job)
        for oldest in [name for name, each in jobs.items() if each.job.ended][:-ENDED_JOBS]:
            del jobs[oldest]
        return name, job

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
            "classes": worker.classes,
            "schedulers": worker.schedulers,
            "recommended": worker.recommended,
            "adapters": [asdict(adapter) for adapter in worker.adapters],
            "width": width,
            "height": height,
            "sizes": worker.sizes,
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

    @app.get("/jobs")
    async def listed() -> list[dict[str, Any]]:
        """The jobs that wait and work, and the latest that are done or failed, oldest first."""
        return [
            {"id": name, "settings": each.settings.to_json()} | report(queue, each.job)
            for name, each in list(jobs.items())
            if each.job.state != "cancelled" and not (each.job.state == "done" and each.job.result.id not in images)
        ]

    @app.delete("/jobs/{job_id}")
    async def cancel(job_id: str) -> None:
        """Cancel a job, and forget one that has ended."""
        if (each := jobs.pop(job_id, None)) is not None:
            each.job.cancel()

    @app.post("/generate")
    async def submit(request: Request) -> Response:
        """Generate an image. The response is a line of JSON for each change of state, until the image is finished or the
        connection is closed; the job continues, and the header Location names it."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
        body = await read_body(request, limits)
        try:
            # in a thread, so that other requests are answered; one at a time, since a decoded upload takes a lot of memory
            async with checking:
                adapters = [adapter.reference for adapter in worker.adapters]
                parsed = await asyncio.to_thread(parse_request, body, limits, worker.size, worker.complete, adapters)
                await asyncio.to_thread(worker.check, parsed.settings)
            name, job = add(parsed)
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        except QueueFull as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_after)}) from None
        except LdmError as error:
            raise HTTPException(503, str(error), {"Retry-After": "10"}) from None
        headers = {"X-Accel-Buffering": "no", "Location": f"/jobs/{name}"}
        return StreamingResponse(follow(request, queue, job), media_type="application/x-ndjson", headers=headers)

    for path, (name, media_type) in PAGE.items():
        response = Response(files("ldm.serve").joinpath(name).read_bytes(), media_type=media_type)
        app.add_route(path, lambda _, response=response: response)
    return RequestFilter(app, limits, access or Access())


async def follow(request: Request, queue: Queue, job: Job) -> AsyncGenerator[str]:
    """Lines of JSON, one for each change of a job: waiting, working with its progress, and its end."""
    loop = asyncio.get_running_loop()
    last, sent = None, loop.time()
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


def host_name(host: str) -> str | None:
    """The name in a Host header, lower-case, or None for one that is not ``name`` or ``name:port``."""
    match = HOST.fullmatch(host)
    return match and match[1].lower()


def parse_origin(origin: str) -> tuple[str, str]:
    """An origin such as ``https://images.example.org``, lower-case, and the name in it. Raises UsageError for any other."""
    scheme, _, host = origin.lower().partition("://")
    name = host_name(host)
    if scheme not in ("http", "https") or name is None:
        raise UsageError(f"{origin!r} is not an origin; give one such as https://images.example.org, without a path")
    return f"{scheme}://{host}", name


class Access:
    """Which requests are of this server's own page.

    Args:
        hosts: names under which the server is reached, besides localhost, the machine's name and IP addresses.
        origins: of the page, where a proxy passes requests on under another host name; their own host names are accepted, too.

    Raises:
        UsageError: for what is no host name or no origin.
    """

    def __init__(self, hosts: Iterable[str] = (), origins: Iterable[str] = ()):
        parsed = dict(map(parse_origin, origins))
        self.origins, self.names = set(parsed), {"localhost", socket.gethostname().lower(), *parsed.values()}
        for host in map(str.lower, hosts):
            if not self.is_ours(host) and host_name(host) != host:
                raise UsageError(f"{host!r} is not a host name; give one such as images.example.org, without a port")
            self.names.add(host)

    def is_ours(self, name: str) -> bool:
        """Whether a name is this server's. IP addresses are accepted: DNS rebinding needs a host name."""
        try:
            (ipaddress.IPv6Address if name.startswith("[") else ipaddress.ip_address)(name.strip("[]"))
        except ValueError:
            return name in self.names
        return True

    def is_foreign(self, host: str, headers: Headers) -> bool:
        """Whether a page of another site has sent a request."""
        origin = headers.get("origin", "").lower()
        if origin in self.origins:
            return False
        other = "origin" in headers and origin not in (f"http://{host}", f"https://{host}")
        return other or headers.get("sec-fetch-site") in ("cross-site", "same-site")


class RequestFilter:
    """Middleware: checks access and number of requests, and adds security headers to every response."""

    def __init__(self, app: ASGIApp, limits: Limits, access: Access):
        self.app, self.limits, self.access = app, limits, access
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
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self.access.is_ours(host_name(host) or ""):
            return answer(421, "unknown host name; use this server's address or localhost, or start it with --allow-host NAME")
        if method not in ("GET", "HEAD") and self.access.is_foreign(host.lower(), headers):
            return answer(403, "this request comes from another site; use the page of this server")
        if self.active >= self.limits.requests:
            wait = {"Retry-After": str(math.ceil(KEEP_ALIVE_SECONDS))}
            return answer(503, f"{self.active} requests are being answered already; try again in a few seconds", wait)
        return None
