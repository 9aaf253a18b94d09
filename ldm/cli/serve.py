"""``ldm serve``: a page to play in."""

from __future__ import annotations

import argparse
import sys

from ldm.cli.parser import Commands, add_command
from ldm.errors import UsageError

LIMITS = {
    "waiting": ("images that may wait for their turn", 16),
    "requests": ("requests held open at one time", 64),
    "images": ("images kept in memory for the gallery", 64),
    "prompt": ("characters of a prompt", 1000),
    "steps": ("steps of an image", 150),
    "pixels": ("pixels of an image, width times height", 1024 * 1024),
}


def add(commands: Commands) -> None:
    """The command."""
    serve = add_command(
        commands,
        "serve",
        run_serve,
        "a page to play in, on this machine",
        "ldm serve runs/denoiser/pipeline --open",
    )
    serve.add_argument("model", help="pipeline directory")
    serve.add_argument("--port", type=int, default=7860, help="0 takes one that is free (default: 7860)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--open", action="store_true", help="open it in the browser")
    for name, (what, default) in LIMITS.items():
        serve.add_argument(f"--max-{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")


def run_serve(options: argparse.Namespace) -> None:
    import ipaddress
    import webbrowser
    from pathlib import Path

    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"ldm serve needs more than is installed ({error}); run: pip install 'ldm[serve]'") from None

    from ldm.pipeline import load_pipeline
    from ldm.serve.app import create_app
    from ldm.serve.queue import Queue
    from ldm.serve.request import Limits
    from ldm.serve.server import address, bind, serve
    from ldm.serve.worker import Worker

    chosen = {name: getattr(options, f"max_{name}") for name in LIMITS}
    # so that an image of the greatest size can be sent to start from: PNG in base64 has less than 6 bytes a pixel
    limits = Limits(**chosen, body=max(Limits.body, 6 * options.max_pixels))
    # the port first: that it is in use should be known before a large model is read
    with bind(options.host, options.port) as listening:
        url = address(listening)
        if not ipaddress.ip_address(listening.getsockname()[0].split("%")[0]).is_loopback:
            print(
                f"ldm: warning: anyone who can reach {options.host} can draw here, unencrypted and without a password",
                file=sys.stderr,
            )
        worker = Worker(load_pipeline(options.model), Path(options.model))
        queue = Queue(limits.waiting)
        app = create_app(worker, queue, limits, options.host)
        print(f"{url} draws with {worker.name}; stop it with Ctrl-C", flush=True)
        if options.open:
            webbrowser.open(url)
        serve(app, queue, listening)
