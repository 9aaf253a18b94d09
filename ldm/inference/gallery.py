"""A page of a run's images with their settings: ``index.html`` beside them, opened from disk."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from ldm.errors import UsageError
from ldm.files import atomic_file, require_folder
from ldm.inference.metadata import Provenance, read_png
from ldm.inference.settings import GenerationSettings
from ldm.reporting.pages import render

NOT_DRAWN = ("grid.png", "preview.png")  # sheets of several images
PIXELATED = 128  # side up to which an image is shown with its pixels visible
SAID_ALWAYS = ("seed", "steps", "guidance")  # the other settings where they are not the default


def write_gallery(folder: str | os.PathLike) -> Path:
    """Write ``index.html`` of all images (PNG) in a folder, with the settings inside them, in the order of their names.

    The page shows the files beside it, by name: what is moved or archived is the folder. It asks nothing of any other
    place. Images load as they come into view; a click opens one with its settings and the command that draws it again.

    Raises:
        UsageError: when ``folder`` is none.
        OSError: when the page cannot be written.
    """
    folder = require_folder(folder, "images")
    names = sorted(path.name for path in folder.glob("*.png") if path.is_file() and path.name not in NOT_DRAWN)
    models: dict[str, None] = {}
    cards = []
    for name in names:
        try:
            settings, provenance = read_png(folder / name)
        except UsageError as error:  # it stands on the page with what is wrong with it
            cards.append(_card(folder / name, name, str(error).removeprefix(f"{folder / name} "), {}, ""))
            continue
        models[f"{provenance.model} ({provenance.model_hash[:10]})"] = None
        command = f"ldm sample {shlex.quote(provenance.model)} --from-image {shlex.quote(name)} --out again"
        cards.append(_card(folder / name, settings.prompt, _summary(settings), _rows(settings, provenance), command))
    count = f"{len(cards):,} image{'' if len(cards) == 1 else 's'}"
    subtitle = f"{count} of {', '.join(models)}" if models else count
    with atomic_file(folder / "index.html") as file:
        file.write(_page(folder.resolve().name, subtitle, cards).encode("utf-8", "replace"))  # half surrogates in names
    return folder / "index.html"


def _summary(settings: GenerationSettings) -> str:
    return f"seed {settings.seed} · {settings.steps} steps · guidance {settings.guidance:g}"


def _rows(settings: GenerationSettings, provenance: Provenance) -> dict[str, str]:
    """Names and values to show of an image, without its prompt."""
    rows = {"size": f"{provenance.width} × {provenance.height}"}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in SAID_ALWAYS or (field.name not in ("prompt", "width", "height") and value != field.default):
            parts = value if isinstance(value, tuple) else (value,)
            words = (f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
            rows[field.name.replace("_", " ")] = " to ".join(words)
    versions = ", ".join(f"{package} {getattr(provenance, package)}" for package in ("ldm", "torch", "diffusers"))
    return rows | {
        "scheduler": f"{provenance.scheduler} ({provenance.sampler})",
        "model": provenance.model,
        "model hash": provenance.model_hash,
        "drawn in": f"{provenance.dtype} on {provenance.device}{', in tiles' if provenance.tiled else ''}",
        "versions": versions,
    }


def _card(path: Path, title: str, summary: str, rows: Mapping[str, str], command: str) -> str:
    """An image with its prompt, and what a click on it shows."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
    except OSError:
        width = height = 0
    # the place is held before the image is there
    size = f' width="{width}" height="{height}"' if width else ""
    kind = ' class="pixels"' if max(width, height) <= PIXELATED else ""
    source, text = quote(os.fsencode(path.name)), html.escape(title)
    table = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in rows.items())
    again = f'<p class="note">In this folder, with the path of the model, draws it again:</p><pre>{html.escape(command)}</pre>'
    return (
        f'<figure class="card"><a href="{source}"><img{kind}{size} loading="lazy" decoding="async" src="{source}" alt="{text}">'
        f'</a><figcaption><p class="prompt">{text}</p><p class="note">{html.escape(summary)}</p></figcaption>'
        f"<template><dl>{table}</dl>{again if command else ''}</template></figure>"
    )


def _page(title: str, subtitle: str, cards: list[str]) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # the browser itself then runs no other script and loads nothing but the images beside the page
    policy = (
        f"default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{render('style.css')}{STYLE}</style></head>\n<body><main>\n"
        f'<header><h1>{html.escape(title)}</h1><p class="subtitle">{html.escape(subtitle)}</p></header>\n'
        f'<div class="cards">\n{chr(10).join(cards)}\n</div></main>\n{DIALOG}\n<script>{SCRIPT}</script></body></html>\n'
    )


STYLE = """
main { max-width: 1500px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 44%), 1fr)); gap: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 310px; }
.card a { display: block; aspect-ratio: 1; background: var(--code); outline-offset: -3px; }
.card img { width: 100%; height: 100%; margin: 0; border-radius: 0; background: none; object-fit: contain; }
.pixels { image-rendering: pixelated; }
.card figcaption { padding: 10px 14px 12px; }
.card p { margin: 0; }
.prompt { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; color: var(--ink);
  line-height: 1.4; min-height: 2.8em; }
.card .note { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; font-variant-numeric: tabular-nums; }
dialog { width: min(1200px, 94vw); max-height: 94vh; padding: 0; border: 1px solid var(--line); border-radius: 14px;
  background: var(--card); color: var(--ink); }
dialog::backdrop { background: rgb(0 0 0 / .6); }
.open { display: grid; grid-template-columns: minmax(0, 3fr) minmax(min(320px, 100%), 2fr); }
.open > a { display: flex; background: var(--code); }
.open img { width: 100%; height: min(80vh, 800px); margin: auto; border-radius: 0; background: none; object-fit: contain; }
.about { padding: 18px 22px; overflow-y: auto; max-height: 90vh; }
.about > p:first-child { white-space: pre-wrap; font-size: 1.05rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 16px; margin: 14px 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
nav { display: flex; gap: 8px; margin-top: 16px; }
button { padding: 7px 14px; border: 1px solid var(--line); border-radius: 8px; background: var(--code); color: inherit;
  font: inherit; font-size: .9rem; cursor: pointer; }
nav button:last-child { margin-left: auto; }
@media (max-width: 760px) { .open { grid-template-columns: minmax(0, 1fr); } .open img { height: auto; max-height: 60vh; } }
"""

DIALOG = """<dialog><div class="open"><a><img alt=""></a><div class="about"><p></p><div></div>
<nav><button>Back</button><button>Next</button><button>Copy command</button><button>Close</button></nav></div></div></dialog>"""

SCRIPT = """
const cards = [...document.querySelectorAll(".card")], dialog = document.querySelector("dialog");
const link = dialog.querySelector("a"), image = dialog.querySelector("img");
const [prompt, about] = dialog.querySelectorAll(".about > p, .about > div");
const [back, next, copy, close] = dialog.querySelectorAll("button");
let shown = 0;
function show(number) {
  shown = (number + cards.length) % cards.length;
  const card = cards[shown], from = card.querySelector("img");
  link.href = image.src = from.src;
  image.alt = prompt.textContent = from.alt;
  image.className = from.className;
  about.replaceChildren(card.querySelector("template").content.cloneNode(true));
  copy.hidden = !about.querySelector("pre");
  copy.textContent = "Copy command";
  if (!dialog.open) dialog.showModal();
}
cards.forEach((card, number) => card.querySelector("a").addEventListener("click", event => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(number);
}));
back.onclick = () => show(shown - 1);
next.onclick = () => show(shown + 1);
close.onclick = () => dialog.close();
copy.onclick = async () => {
  const command = about.querySelector("pre");
  getSelection().selectAllChildren(command);
  try {
    await navigator.clipboard.writeText(command.textContent);
    copy.textContent = "Copied";
  } catch {
    copy.textContent = "Press Ctrl+C";
  }
};
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => cards[shown].querySelector("a").focus());
dialog.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft") show(shown - 1);
  if (event.key === "ArrowRight") show(shown + 1);
});
"""
