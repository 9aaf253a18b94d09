"""``ldm serve``: a local web page that generates images with one pipeline, one at a time, and keeps them in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ldm.errors import UsageError


def _option(default: int, help_text: str) -> Any:
    """A limit that is an option of the command, too."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Limits:
    """Limits of a server; those with a help text are options of ``ldm serve``.

    Attributes:
        body: bytes of a request.
        upload_pixels: pixels of an uploaded image, before it is resized.
        body_seconds: time for a request to arrive.
    """

    waiting: int = _option(16, "images waiting in the queue")
    requests: int = _option(64, "simultaneous requests")
    connections: int = _option(256, "open connections")
    images: int = _option(64, "images kept in memory, the latest ones")
    prompt: int = _option(1000, "characters of a prompt")
    steps: int = _option(150, "denoising steps of an image")
    pixels: int = _option(1024 * 1024, "pixels of an image, width times height")
    body: int = 8 * 2**20
    upload_pixels: int = 16_000_000
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) <= 0:
                raise UsageError(f"the limit on {each.name} is {getattr(self, each.name)}; give 1 or more")
