"""Parsing of requests, with every limit checked before any work begins."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ldm.data.decode import decode_image
from ldm.errors import UsageError
from ldm.images import DecodeError, open_image
from ldm.inference.inputs import reference
from ldm.inference.prompts import Complete
from ldm.inference.settings import INPUTS, GenerationSettings
from ldm.models.image_processor import fit_mask
from ldm.serve import Limits

MAX_SEED = 2**53 - 1  # the largest integer that JavaScript represents exactly


@dataclass(frozen=True)
class GenerationRequest:
    """An image to generate. ``start``, the image to start from, has the size of the result: RGB, or RGBA where it has
    transparency, which is then the part to generate."""

    settings: GenerationSettings
    start: Image.Image | None = None


def parse_request(
    body: bytes, limits: Limits, size: tuple[int, int], complete: Complete = dict, adapters: Collection[str] = ()
) -> GenerationRequest:
    """Parse JSON of the form ``{"settings": {"prompt": …}, "start": base64 of an image}``.

    ``settings`` holds fields of :class:`GenerationSettings` without its paths; ``lora`` names adapters of the server by their
    references. ``start`` is optional; it is cropped and
    resized to the size of the result, and ``settings.image`` names it by its hash.

    Args:
        size: default width and height of an image.
        complete: gives defaults to settings that are not given.
        adapters: references of those that can be chosen.

    Raises:
        UsageError: for any other content, and for values beyond the limits.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not valid JSON ({error}); correct it") from None
    if not isinstance(content, dict) or content.keys() - {"settings", "start"} or "settings" not in content:
        raise UsageError('a request is {"settings": {"prompt": "a red ring"}} with an optional start, an image in base64')
    fields, start = content["settings"], content.get("start")
    if isinstance(fields, dict):
        given = [key for key in INPUTS if fields.get(key) is not None]
        if given:
            raise UsageError(f"{given[0]} would name a file of the server; send an image as start, in base64")
        if start is not None:
            fields = fields | {"image": "start"}  # replaced below by the name with the hash
        fields = complete(fields)
    settings = GenerationSettings.from_json(fields, "settings")
    chosen = [file for file, _ in settings.adapters()]
    if wrong := [file for file in chosen if file not in adapters or chosen.count(file) > 1]:
        known = "each once" if wrong[0] in adapters else ", ".join(adapters) or "none: it was started without adapters"
        raise UsageError(f"lora is {wrong[0]:.80}; give adapters of this server ({known})")
    for name in ("prompt", "negative"):
        text = getattr(settings, name)
        if len(text) > limits.prompt:
            raise UsageError(f"{name} has {len(text)} characters; the limit of this server is {limits.prompt}")
    if settings.steps > limits.steps:
        raise UsageError(f"steps is {settings.steps}; the limit of this server is {limits.steps}")
    if settings.seed > MAX_SEED:
        raise UsageError(f"seed is {settings.seed}; the limit of this server is {MAX_SEED}")
    width, height = settings.width or size[0], settings.height or size[1]
    if width * height > limits.pixels:
        raise UsageError(f"an image of {width}x{height} has more pixels than the limit of this server, {limits.pixels}")
    if start is None:
        return GenerationRequest(settings)
    image = fitted(read_image(start, limits), width, height)
    png = io.BytesIO()
    image.save(png, "PNG")  # as the gallery gives it, for ldm sample --from-image
    name = reference(png.getvalue())
    return GenerationRequest(dataclasses.replace(settings, image=name, width=width, height=height), image)


def read_image(encoded: Any, limits: Limits) -> Image.Image:
    """Decode an image from base64, with its transparency, as :func:`ldm.data.decode.decode_image` does.

    Raises:
        UsageError: for anything but a PNG, JPEG or WebP within the limit.
    """
    if not isinstance(encoded, str):
        raise UsageError("start is not a string; send an image in base64")
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise UsageError("start is not base64; encode the bytes of the image file") from None
    try:
        with open_image(data) as opened:
            # only the header has been read
            if opened.width * opened.height > limits.upload_pixels:
                raise UsageError(f"start has more pixels than the limit of this server, {limits.upload_pixels}")
        return decode_image(data, background=None)
    except DecodeError as error:
        raise UsageError(f"start cannot be read as an image: {error}; send a PNG, JPEG or WebP") from None


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """An image that is scaled and cropped to a size; a pixel is transparent where any part of it was, so that thin lines stay.

    Raises:
        UsageError: when all that is transparent is cropped off.
    """
    found = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if image.mode == "RGBA":
        hole = torch.from_numpy(np.asarray(image.getchannel("A")) < 128)[None, None].float()
        kept = fit_mask(hole, height, width)
        if hole.any() and not kept.any():
            raise UsageError(f"the transparent part of start is cropped off at {width}x{height}; choose another size")
        found.putalpha(Image.fromarray(np.where(kept[0, 0] > 0, 0, np.asarray(found.getchannel("A"))).astype(np.uint8)))
    return found
