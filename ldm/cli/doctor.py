"""``ldm doctor``: checks whether this machine can train."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.parser import Commands, add_command
from ldm.errors import LdmError
from ldm.terminal import printable


def add(commands: Commands) -> None:
    doctor = add_command(
        commands,
        "doctor",
        run_doctor,
        "check this machine: versions, devices, disk, speed; with fixes for what is wrong",
        "ldm doctor --out runs",
    )
    doctor.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="output folder of future runs (default: here)")
    doctor.add_argument("--quick", action="store_true", help="skip the measurements, which take half a minute, more on GPUs")
    doctor.add_argument("--json", metavar="FILE", help="write the findings there, too")


def run_doctor(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from ldm.doctor.examine import examine
    from ldm.files import require_output_file, write_json

    if options.json is not None:
        require_output_file(options.json)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    with Console(stderr=True).status("checking") as status:
        findings = list(examine(options.out, options.quick, lambda name: status.update(f"checking {name}")))
    table = Table("", *(Column(name, overflow="fold") for name in ("check", "found", "fix")))
    for finding in findings:
        # Text, because rich would interpret [serve] as markup
        cells = [Text(printable(cell)) for cell in (finding.name, finding.found, finding.fix)]
        table.add_row(Text(finding.state, colours[finding.state]), *cells)
    Console().print(table)
    if options.json is not None:
        write_json(options.json, {"findings": [{"state": finding.state} | vars(finding) for finding in findings]})
    failed = [finding.name for finding in findings if finding.failed]
    if failed:
        raise LdmError(f"training cannot work before this is fixed: {', '.join(failed)}")
