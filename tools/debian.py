"""The files of Debian packages: of installed ones, or of ones that apt-get downloads and dpkg-deb unpacks, without root."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import LdmError, UsageError
from ldm.files import atomic_folder


def package_root(package: str, content: str, download: Path | None) -> Path:
    """The folder in which a package's files lie as in ``/``.

    Args:
        content: a path of the package below it, by which an installed or unpacked package is known.
        download: where the package is downloaded and unpacked, unless that was done before; None: it is installed.

    Raises:
        UsageError: where the package is not installed.
        LdmError: where it cannot be downloaded or unpacked.
    """
    root = Path("/") if download is None else download / package
    if (root / content).exists():
        return root
    if download is None:
        raise UsageError(
            f"the Debian package {package} is not installed; run `apt-get install {package}`, or give --download a folder"
        )
    download.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(download.glob(f"{package}_*.deb"))):
        _run(["apt-get", "download", package], download, f"{package} cannot be downloaded")
        found = sorted(download.glob(f"{package}_*.deb"))
    with atomic_folder(root) as temporary:
        _run(["dpkg-deb", "-x", str(found[-1].resolve()), str(temporary)], download, f"{found[-1]} cannot be unpacked")
    if not (root / content).exists():
        raise LdmError(f"{found[-1]} holds no {content}; remove {root} and the package, and download another version")
    return root


def _run(command: Sequence[str], folder: Path, problem: str) -> None:
    try:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise LdmError(f"{problem} ({error.strerror}: {command[0]}); this needs a Debian or Ubuntu system") from None
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LdmError(f"{problem} ({reason}); run `apt-get update`, or put the .deb into {folder}")
