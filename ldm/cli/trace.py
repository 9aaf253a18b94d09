"""``ldm trace``: where an image or a model comes from."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.parser import Commands, add_command
from ldm.errors import LdmError
from ldm.files import require_folder
from ldm.terminal import say

FORMAT_VERSION = 1  # of the JSON
MAX_LINE = 10_000  # characters, of a line that no terminal wraps


def add(commands: Commands) -> None:
    trace = add_command(
        commands,
        "trace",
        run_trace,
        "where an image or a model comes from: model, runs, latents, networks and images, each compared with its fingerprint",
        "ldm trace images/0000-red-heart.png --sample 000123",
    )
    trace.add_argument(
        "file",
        help="a PNG of ldm sample, or the folder of a pipeline, adapter, matcher, autoencoder, run, latents or image shards",
    )
    trace.add_argument("--sample", metavar="KEY", help="also say how often and at which steps each run trained on this sample")
    trace.add_argument(
        "--search",
        metavar="DIR",
        nargs="+",
        default=["."],
        help="folders below which to look for what is not where it was (default: the current one)",
    )
    trace.add_argument(
        "--check",
        choices=["recorded", "weights", "all"],
        default="weights",
        help="compare what is recorded; also the networks' weights (default); also the bytes of all shards",
    )
    trace.add_argument("--json", metavar="FILE", help="write the tree there, too; -: to stdout, instead of the tree")


def run_trace(options: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from ldm.files import require_output_file, write_json
    from ldm.lineage.finder import Finder
    from ldm.lineage.trace import Tracer

    if options.json not in (None, "-"):
        require_output_file(options.json, [options.file])
    roots = [Path(require_folder(folder, "a folder to look in")) for folder in options.search]
    root = Tracer(Finder(roots), options.check, options.sample).trace(options.file)
    content = {"format_version": FORMAT_VERSION} | root.as_json()
    if options.json == "-":
        say(json.dumps(content, indent=2))
    else:
        console = Console()
        console.width = console.width if console.is_terminal else MAX_LINE
        console.print(root.tree())
        if options.json is not None:
            write_json(options.json, content)
    if differing := [node for node in root.walk() if node.state == "differs"]:
        names = ", ".join(dict.fromkeys(f"{node.kind} {node.name}" for node in differing))
        raise LdmError(f"not what was recorded: {names}; the tree says why")
