"""All checks, one after another.

Everything is looked at here and now: nothing is installed, downloaded or changed, but for files that are written and removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ldm.doctor.finding import Finding
from ldm.doctor.installed import (
    IMPORTED,
    extra_findings,
    import_findings,
    installed_versions,
    network_findings,
    requirements,
    version_findings,
    weights_findings,
)
from ldm.doctor.machine import device_findings, disk_findings, limit_findings, machine_findings
from ldm.doctor.measured import bf16_findings, compile_findings, jpeg_findings, rendezvous_findings
from ldm.errors import first_line


def examine(out: Path, quick: bool = False, on_check: Callable[[str], None] | None = None) -> Iterator[Finding]:
    """Look at everything.

    Args:
        out: a folder, there or not, where runs are to go.
        quick: leave out what takes seconds: everything that is measured.
        on_check: told of each check's name before it begins.
    """
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": lambda: version_findings(installed_versions(), requirements()),
        "imports": lambda: import_findings(IMPORTED),
        "devices": device_findings,
        "memory and cores": machine_findings,
        "limits": limit_findings,
        "disk": lambda: disk_findings(out, measure=not quick),
        "weights": weights_findings,
        "extras": extra_findings,
        "network": network_findings,
    }
    if not quick:
        checks |= {
            "bf16": bf16_findings,
            "JPEG": jpeg_findings,
            "two processes": rendezvous_findings,
            "torch.compile": compile_findings,
        }
    for name, check in checks.items():
        if on_check is not None:
            on_check(name)
        try:
            yield from check()
        except Exception as error:  # what keeps one check from its end must not keep the others from theirs
            yield Finding(name, "fail", f"could not be looked at: {first_line(error)}", "see to that, and run ldm doctor again")
