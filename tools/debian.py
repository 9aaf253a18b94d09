"""Sets of images out of Debian packages: the packages' files, of installed ones or of ones that apt-get downloads and dpkg-deb
unpacks, without root; and the command line that such scripts share."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ldm.errors import LdmError, UsageError
from ldm.files import atomic_folder, require_new_folder


def parser_of(description: str | None, size: int, what: str, megabytes: int) -> argparse.ArgumentParser:
    """A parser of ``OUT``, ``--size`` (``what`` it is, and its default) and ``--download`` (so many megabytes)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--download", type=Path, metavar="DIR", help=f"download and unpack the packages there ({megabytes} MB)")
    parser.add_argument("--size", type=int, default=size, help=f"{what} (default {size})")
    return parser


def run(build: Callable[[argparse.Namespace], str], options: argparse.Namespace, sizes: tuple[int, int]) -> int:
    """Print what ``build`` returns, or its :class:`LdmError` in one line; returns the exit code. ``sizes``: the least and the
    most of ``--size``."""
    try:
        if not sizes[0] <= options.size <= sizes[1]:
            raise UsageError(f"--size must be {sizes[0]} to {sizes[1]} pixels, not {options.size}")
        options.out = require_new_folder(options.out, "the images")
        print(build(options))
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


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
