"""``ldm report``: an HTML page about a run, also while it trains."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ldm.cli.parser import Commands, add_command
from ldm.errors import UsageError
from ldm.files import require_output_file
from ldm.terminal import printable, say

MAX_SECONDS = 24 * 60 * 60


def add(commands: Commands) -> None:
    report = add_command(
        commands, "report", run_report, "an HTML page about a run, also while it trains", "ldm report runs/denoiser --every 60"
    )
    report.add_argument("folder", metavar="RUN", type=Path, help="folder of the run (--out of fit)")
    report.add_argument("--out", type=Path, metavar="FILE", help="output file (default: report.html in RUN)")
    again = "rewrite it at this interval until the run ends; an open page reloads itself"
    report.add_argument("--every", type=int, metavar="SECONDS", help=again)


def run_report(options: argparse.Namespace) -> None:
    from ldm.runs.report import write_run_report

    out = options.out or options.folder / "report.html"
    if options.every is not None and not 1 <= options.every <= MAX_SECONDS:
        raise UsageError(f"--every is {options.every}; give 1 to {MAX_SECONDS:,} seconds")
    require_output_file(out, [options.folder])
    state = write_run_report(options.folder, out, options.every)
    say(f"{printable(state)}; look at {printable(out)}")
    while options.every is not None and state == "training":
        time.sleep(options.every)
        state = write_run_report(options.folder, out, options.every)
    if options.every is not None:
        say(printable(state))
