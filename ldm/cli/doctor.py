"""``ldm doctor``: versions, devices, what would run, what is missing."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.parser import Commands, add_command
from ldm.errors import LdmError


def add(commands: Commands) -> None:
    """Its command."""
    doctor = add_command(
        commands,
        "doctor",
        run_doctor,
        "whether this machine can train: versions, devices, disk, speed; what is wrong, and the mend",
        "ldm doctor --out runs",
    )
    doctor.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="where runs are to go (default: here)")
    doctor.add_argument("--quick", action="store_true", help="measure nothing: about half a minute less")
    doctor.add_argument("--json", metavar="FILE", help="write the findings there, too")


def run_doctor(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from ldm.doctor.examine import examine
    from ldm.doctor.finding import FAIL
    from ldm.files import write_json

    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    with Console(stderr=True).status("looking") as status:
        findings = list(examine(options.out, options.quick, lambda name: status.update(f"looking at {name}")))
    table = Table("", *(Column(name, overflow="fold") for name in ("what", "found", "mend")))
    for finding in findings:
        # as they are: rich would take [serve] for markup
        table.add_row(Text(finding.state, colours[finding.state]), *map(Text, (finding.name, finding.said, finding.mend)))
    Console().print(table)
    if options.json:
        write_json(options.json, {"findings": [vars(finding) for finding in findings]})
    failed = [finding.name for finding in findings if finding.state == FAIL]
    if failed:
        raise LdmError(f"training will not go well before this is mended: {', '.join(failed)}")
