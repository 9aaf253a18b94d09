"""All checks in order. They install, download and change nothing, apart from temporary files that they remove."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ldm.doctor import Finding
from ldm.doctor.installed import (
    check_extras,
    check_imports,
    check_network,
    check_versions,
    check_weights,
    installed_versions,
    requirements,
)
from ldm.doctor.machine import check_devices, check_disk, check_limits, check_machine
from ldm.doctor.measured import check_bf16, check_compile, check_gpus_exchange, check_jpeg, check_two_processes
from ldm.errors import first_line


def examine(out: Path, quick: bool = False, on_check: Callable[[str], None] | None = None) -> Iterator[Finding]:
    """Run every check, with ``quick`` only those that take no seconds.

    ``out``, the output folder of future runs, need not exist. ``on_check`` receives the name of each check before it begins.
    """
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": lambda: check_versions(installed_versions(), requirements()),
        "imports": check_imports,
        "devices": check_devices,
        "memory and cores": check_machine,
        "limits": check_limits,
        "disk": lambda: check_disk(out, measure=not quick),
        "weights": check_weights,
        "extras": check_extras,
        "network": check_network,
    }
    if not quick:
        checks |= {
            "bf16": check_bf16,
            "JPEG": check_jpeg,
            "two processes": check_two_processes,
            "NCCL": check_gpus_exchange,
            "torch.compile": check_compile,
        }
    for name, check in checks.items():
        if on_check is not None:
            on_check(name)
        try:
            yield from check()
        except Exception as error:  # the other checks should still run
            yield Finding(name, f"the check broke off: {first_line(error)}", "fix that, and run ldm doctor again", failed=True)
