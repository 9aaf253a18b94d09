"""``ldm serve``: generate images on a local web page."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from ldm.cli.parser import Commands, add_command, add_force
from ldm.errors import UsageError
from ldm.serve import Limits
from ldm.terminal import printable, say

OPTIONS = [each for each in fields(Limits) if "help" in each.metadata]


def add(commands: Commands) -> None:
    serve = add_command(
        commands, "serve", run_serve, "generate images on a local web page", "ldm serve runs/denoiser/pipeline --open"
    )
    serve.add_argument("model", help="pipeline directory")
    adapters = "adapter that the page offers, with its weight at first (default: 1): runs/lora/adapter=0.8; repeatable"
    serve.add_argument("--lora", metavar="FILE[=W]", action="append", default=[], help=adapters)
    add_force(serve)
    serve.add_argument("--port", type=int, default=7860, help="port; 0 takes a free one (default: 7860)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    serve.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="another host name of this server; repeatable"
    )
    serve.add_argument(
        "--allow-origin",
        metavar="URL",
        action="append",
        default=[],
        help="origin of the page, such as https://images.example.org, behind a proxy that changes the host name; repeatable",
    )
    serve.add_argument("--open", action="store_true", help="open the page in the browser")
    for each in OPTIONS:
        help_text = f"maximum number of {each.metadata['help']} (default: {each.default})"
        serve.add_argument(f"--max-{each.name}", type=int, default=each.default, metavar="N", help=help_text)


def run_serve(options: argparse.Namespace) -> None:
    import ipaddress
    import webbrowser
    from pathlib import Path

    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"ldm serve needs packages that are not installed ({error}); run: pip install 'ldm[serve]'") from None

    from ldm.pipeline import load_pipeline
    from ldm.serve.app import Access, create_app
    from ldm.serve.queue import Queue
    from ldm.serve.server import address, bind, connection_limit, serve
    from ldm.serve.worker import Worker

    chosen = {each.name: getattr(options, f"max_{each.name}") for each in OPTIONS}
    # room for a start image of the largest size: PNG in base64 takes less than 6 bytes a pixel
    limits = Limits(**chosen, body=max(Limits.body, 6 * options.max_pixels))
    access = Access([options.host, *options.allow_host], options.allow_origin)
    # bind first: a port in use should be reported before a large model is loaded
    with bind(options.host, options.port) as listening:
        url = address(listening)
        if not ipaddress.ip_address(listening.getsockname()[0].split("%")[0]).is_loopback:
            warning = f"anyone who can reach {options.host} can generate images, unencrypted and without a password"
            say(f"ldm: warning: {warning}", sys.stderr)
        connections = connection_limit(limits.connections)
        worker = Worker(load_pipeline(options.model), Path(options.model), options.lora, options.force)
        queue = Queue(limits.waiting)
        app = create_app(worker, queue, limits, access)
        say(f"{url} serves {printable(worker.name)}; stop with Ctrl-C")
        if options.open:
            webbrowser.open(url)
        serve(app, queue, listening, connections)
