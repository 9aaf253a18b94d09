"""What somebody asks for over the network, checked against limits before anything is done about it."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any, NoReturn

from PIL import Image, ImageOps

from ldm.errors import UsageError
from ldm.inference.settings import GenerationSettings

FORMATS = ("PNG", "JPEG", "WEBP")
# fields of GenerationSettings that are paths: no request may name a file of this machine
PATHS = ("image", "mask", "weak")
MAX_SEED = 2**53 - 1  # the greatest whole number that a page's JavaScript holds exactly


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        requests: answered at one time, those that wait for their image among them.
        waiting: images waiting for their turn.
        images: kept in memory, the latest.
        prompt: characters of a prompt, and of a negative prompt.
        steps: of an image.
        pixels: of an image.
        body: bytes of a request.
        upload_pixels: of an image sent to start from, before it is fitted.
        body_seconds: for a request to arrive.
    """

    requests: int = 64
    waiting: int = 16
    images: int = 64
    prompt: int = 1000
    steps: int = 150
    pixels: int = 1024 * 1024
    body: int = 8 * 2**20
    upload_pixels: int = 16_000_000
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value <= 0:
                raise UsageError(f"the limit on {name} is {value}; give 1 or more")


@dataclass(frozen=True)
class Order:
    """An image to draw. ``start``, where there is one, is RGB and has the image's size."""

    settings: GenerationSettings
    start: Image.Image | None = None


def read_order(body: bytes, limits: Limits, size: tuple[int, int]) -> Order:
    """The order of a request's JSON: ``{"settings": {"prompt": …}, "start": base64 of an image}``.

    ``settings`` are those of :class:`GenerationSettings` but for its paths; an image to start from comes along as ``start``, is
    cut and scaled to the size of the drawing, and is named in ``settings.image`` by its hash.

    Args:
        size: width and height of an image whose settings say none.

    Raises:
        UsageError: for anything else, and for what is beyond the limits.
    """
    try:
        content = json.loads(body, parse_constant=_refuse_constant, parse_int=_short_int)
        return _order(content, limits, size)
    except RecursionError:
        raise UsageError("the request is nested too deeply; send settings and start") from None
    except UnicodeError:
        raise UsageError("the request holds text that is not Unicode; send UTF-8") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"the request is not JSON ({error}); mend it") from None


def _order(content: Any, limits: Limits, size: tuple[int, int]) -> Order:
    if not isinstance(content, dict) or content.keys() - {"settings", "start"} or "settings" not in content:
        raise UsageError('a request is {"settings": {"prompt": "a red ring"}}, with start (an image in base64) or without')
    named, start = content["settings"], content.get("start")
    if isinstance(named, dict):
        given = [key for key in PATHS if named.get(key) is not None]
        if given:
            raise UsageError(f"{given[0]} would name a file of the server; send an image as start, in base64")
        if start is not None:
            named = named | {"image": "start"}  # until it is read and has its own name
    settings = GenerationSettings.from_json(named, "settings")
    for name in ("prompt", "negative"):
        text = getattr(settings, name)
        text.encode()  # half a character of UTF-16 is none: UnicodeEncodeError
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
        return Order(settings)
    image = ImageOps.fit(read_image(start, limits), (width, height), Image.Resampling.LANCZOS)
    name = f"start-{hashlib.sha256(image.tobytes()).hexdigest()[:12]}.png"
    return Order(dataclasses.replace(settings, image=name, width=width, height=height), image)


def read_image(encoded: Any, limits: Limits) -> Image.Image:
    """An image sent in base64, upright, RGB over white.

    Raises:
        UsageError: when it is none, of another format than PNG, JPEG or WebP, or larger than the limit.
    """
    if not isinstance(encoded, str):
        raise UsageError("start is an image in base64; send it as text")
    try:
        data = base64.b64decode(encoded, validate=True)
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        # the header alone has been read: a bomb is refused before it is unpacked
        if opened.width * opened.height > limits.upload_pixels:
            raise Image.DecompressionBombError
        image = ImageOps.exif_transpose(opened).convert("RGBA")
    except binascii.Error:
        raise UsageError("start is not base64; encode the bytes of the image file") from None
    except Image.DecompressionBombError:  # Pillow's own limit, or ours
        raise UsageError(f"start has more pixels than the limit of this server, {limits.upload_pixels}") from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them trip over
        raise UsageError("start cannot be read as an image; send a PNG, JPEG or WebP") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _refuse_constant(name: str) -> NoReturn:
    raise UsageError(f"{name} is no number of JSON; give a finite one")


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise UsageError(f"a number of {len(digits)} digits is too long; give a shorter one")
    return int(digits)
