"""Finds what a record names: at the path that it gives, seen from several folders, or below some folders by fingerprint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from ldm.data.image_folder import packed_folders
from ldm.data.manifest import MANIFEST_NAME, Manifest
from ldm.data.sources import ShardSource, open_source
from ldm.errors import LdmError, UsageError
from ldm.files import read_json
from ldm.models.adapter_file import ADAPTER_NAME
from ldm.models.autoencoder_kinds import KINDS
from ldm.models.matcher import is_matcher
from ldm.runs.layout import LOGS

Kind = Literal["run", "pipeline", "matcher", "adapter", "shards", "autoencoder"]
# what is looked through: folders below those given, and in all
MAX_DEPTH, MAX_FOLDERS = 6, 20_000
# folders of a run that hold nothing to find
_PASSED_OVER = {"checkpoints", "previews", "snapshots", "node_modules", "__pycache__"}


def kind_of(folder: Path) -> Kind | None:
    """What a folder holds, as far as its files tell; None for anything else."""
    # os.path.isfile: unlike Path.is_file it never raises
    if os.path.isfile(folder / LOGS / "config.yaml"):
        return "run"
    if os.path.isfile(folder / "model_index.json"):
        return "pipeline"
    if is_matcher(folder):
        return "matcher"
    if os.path.isfile(folder / ADAPTER_NAME):
        return "adapter"
    if os.path.isfile(folder / MANIFEST_NAME):
        return "shards"
    try:
        config = read_json(folder / "config.json", dict) if os.path.isfile(folder / "config.json") else {}
    except LdmError:
        return None
    return "autoencoder" if str(config.get("_class_name")) in KINDS else None


class OtherError(UsageError):
    """What is at a recorded path has another fingerprint than was recorded."""


class Finder:
    """Looks in the current folder, and below those given."""

    def __init__(self, roots: Sequence[Path]):
        self.roots = [*dict.fromkeys(root.resolve() for root in roots)]
        self.shown = ", ".join(map(str, roots))

    @cached_property
    def folders(self) -> dict[Kind, list[Path]]:
        """All that is below the folders, by kind."""
        found: dict[Kind, list[Path]] = {kind: [] for kind in get_args(Kind)}
        seen: set[str] = set()
        for root in self.roots:
            for place, below, _ in os.walk(root):
                if place in seen or len(seen) >= MAX_FOLDERS:
                    below.clear()
                    continue
                seen.add(place)
                depth = len(Path(place).relative_to(root).parts)
                kind = kind_of(Path(place))
                if kind is not None:
                    found[kind].append(Path(place))
                kept = [name for name in below if not name.startswith(".") and name not in _PASSED_OVER]
                below[:] = sorted(kept) if depth < MAX_DEPTH and kind in (None, "run") else []
        return found

    def places(self, name: str, near: Path) -> Iterator[str]:
        """Where a path may be that was relative to where a command ran: to the current folder, or to one above ``near``."""
        if "://" in name or os.path.isabs(name):
            yield name
        if not name or "://" in name or os.path.isabs(name):
            return
        for base in dict.fromkeys((Path.cwd(), *near.resolve().parents)):
            place = base / name
            if os.path.lexists(place) or (place.suffix == ".tar" and place.parent.is_dir()):
                yield str(place)

    def shards(self, name: str, expected: str | None, near: Path) -> ShardSource:
        """The shards that a record of ``near`` calls ``name``, or others with the same hash of the manifest.

        Raises :class:`OtherError` where others are in their place, and :class:`LdmError` where there are none.
        """
        error: LdmError = UsageError(
            f"{name or f'what has the fingerprint {expected}'} is not here; give --search the folder that has it"
        )
        for place in self.places(name, near):
            try:
                source = open_source(place)
            except LdmError as broken:
                error = broken
                continue
            if expected in (None, source.manifest.hash):
                return source
            error = OtherError(f"{place} holds other shards now ({source.manifest.hash[:12]})")
        for folder in [*self.folders["shards"], *packed_folders()] if expected is not None else ():
            try:
                if Manifest.load(folder).hash == expected:
                    return open_source(folder)
            except LdmError:
                continue
        raise error
