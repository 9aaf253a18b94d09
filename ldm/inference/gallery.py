"""A page of a folder's images with their settings: ``index.html`` beside them, opened from disk."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ldm.errors import LdmError, UsageError
from ldm.files import atomic_file, require_folder
from ldm.images import open_image
from ldm.inference.inputs import has_copy
from ldm.inference.metadata import Provenance, read_png
from ldm.inference.settings import INPUTS, LISTS, GenerationSettings
from ldm.reporting.pages import render

GRIDS = ("grid.png", "preview.png")  # of several images
PIXELATED = 128  # side up to which an image is shown with its pixels visible
SHOWN_ALWAYS = ("seed", "steps", "guidance")  # the other settings where they are not the default


def write_gallery(folder: str | os.PathLike) -> Path:
    """Write ``index.html`` of all images (PNG) in a folder, with the settings inside them, in the order of their names.

    The page shows the files beside it, by name: what is moved or archived is the folder. It requests nothing from anywhere
    else. Images load as they come into view; a click opens one with its settings and the command that generates it again.

    Raises:
        UsageError: when ``folder`` is none.
        OSError: when the page cannot be written.
    """
    folder = require_folder(folder, "images")
    models: dict[str, None] = {}
    cards = []
    for path in sorted(path for path in folder.glob("*.png") if path.is_file() and path.name not in GRIDS):
        try:
            settings, provenance = read_png(path)
        except UsageError as error:  # the page shows what is wrong with it
            cards.append(_card(path, path.name, summary=_without(path, error), rows={}, command="", inputs=[]))
            continue
        needed = [name for name in INPUTS if (value := getattr(settings, name)) and not has_copy(folder, value)]
        models[f"{provenance.model} ({provenance.model_hash[:10]})"] = None
        cards.append(
            _card(
                path,
                settings.prompt,
                summary=f"seed {settings.seed} · {settings.steps} steps · guidance {settings.guidance:g}",
                rows=_rows(settings, provenance),
                command=" ".join(
                    [
                        f"ldm sample {shlex.quote(provenance.model)} --from-image {shlex.quote(path.name)}",
                        *(f"--{name} {name.upper()}" for name in needed),
                        *(f"--{name} FILE" for name in LISTS for _ in getattr(settings, name) or ()),
                        "--out again",
                    ]
                ),
                inputs=needed,
            )
        )
    count = f"{len(cards):,} image{'' if len(cards) == 1 else 's'}"
    page = render(
        "gallery.html",
        title="Generated images",  # not the folder's name: the page of a copy is the same
        subtitle=f"{count} of {', '.join(models)}" if models else count,
        cards=cards,
        script_sha256=base64.b64encode(hashlib.sha256(render("gallery.js").encode()).digest()).decode(),
    )
    with atomic_file(folder / "index.html") as file:
        file.write(page.encode("utf-8", "replace"))  # names of files may hold half surrogate pairs
    return folder / "index.html"


def _without(path: Path, error: UsageError) -> str:
    """What is wrong with an image, without its path: the page may be shown to others."""
    return str(error).replace(f"{path}: ", "").replace(f"{path} ", "").replace(str(path), path.name)


def _rows(settings: GenerationSettings, provenance: Provenance) -> dict[str, str]:
    """Names and values to show of an image, without its prompt."""
    rows = {"size": f"{provenance.width} × {provenance.height}"}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in SHOWN_ALWAYS or (field.name not in ("prompt", "width", "height") and value != field.default):
            parts = value if isinstance(value, tuple) else (value,)
            texts = (f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
            rows[field.name.replace("_", " ")] = " to ".join(texts)
    return rows | {
        "scheduler": f"{provenance.scheduler} ({provenance.sampler})",
        "model": provenance.model,
        "model hash": provenance.model_hash,
        "generated in": f"{provenance.dtype} on {provenance.device}{', in tiles' if provenance.tiled else ''}",
        "versions": ", ".join(f"{package} {getattr(provenance, package)}" for package in ("ldm", "torch", "diffusers")),
    }


def _card(path: Path, title: str, **shown: Any) -> dict[str, Any]:
    """An image with its prompt, and what a click on it shows."""
    try:
        with open_image(path, formats=("PNG",)) as image:
            width, height = image.size
    except LdmError:
        width = height = 0
    pixelated = max(width, height) <= PIXELATED
    source = quote(os.fsencode(path.name))
    return {"title": title, "source": source, "width": width, "height": height, "pixelated": pixelated} | shown
