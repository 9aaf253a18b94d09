"""Image grids, captioned or in labelled rows, saved with the boxes of their images so that they can be split again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldm.errors import LdmError
from ldm.files import atomic_file, parse_json
from ldm.images import open_image

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont  # the latter where Pillow was built without FreeType

MAX_CAPTION_LINES = 4
# PNG chunk with the label of each row and the boxes of its images
_ROWS_CHUNK = "ldm rows"
_INK, _FRAME, _GREEN, _RED = (32, 36, 44), (214, 217, 222), (22, 138, 70), (204, 44, 44)


def captioned_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    columns: int | None = None,
    cell: int = 160,
    marks: Sequence[bool | None] | None = None,
) -> Image.Image:
    """Lay out images on a white page, each above its wrapped caption.

    Args:
        columns: default: a nearly square grid.
        cell: side in pixels of the square for an image. Smaller images are enlarged by an integer factor (NEAREST), larger
            ones are reduced (LANCZOS).
        marks: draws a green tick (True), a red cross (False) or nothing (None) beside each caption.

    Raises:
        ValueError: without images, or if captions or marks do not match them in number.
    """
    if not images or len(captions) != len(images) or (marks is not None and len(marks) != len(images)):
        raise ValueError(
            f"captioned_grid needs at least one image, and one caption and one mark for each: got {len(images)} "
            f"images, {len(captions)} captions, {'no' if marks is None else len(marks)} marks"
        )
    columns = min(columns or _default_columns(len(images)), len(images))
    if columns < 1 or cell < 1:
        raise ValueError(f"columns and cell must be at least 1, not {columns} and {cell}")
    font, line_height, gap = _font_for(cell)
    marks = marks if marks is not None else [None] * len(images)
    mark_width = 0 if all(mark is None for mark in marks) else line_height
    texts = [wrap(caption, font, cell - mark_width) for caption in captions]
    fitted = [_fit(image, cell) for image in images]
    tall = max(image.height for image in fitted)
    starts = range(0, len(images), columns)
    # each row is as tall as its longest caption, with gap // 2 between image and caption
    least = 1 if mark_width else 0  # a mark needs a line even without a caption
    text_heights = [max(least, *map(len, texts[at : at + columns])) * line_height for at in starts]
    height = gap + sum(tall + gap // 2 + text_height + gap for text_height in text_heights)
    page = Image.new("RGB", (gap + columns * (cell + gap), height), "white")
    draw = ImageDraw.Draw(page)
    top = gap
    for at, text_height in zip(starts, text_heights, strict=True):
        for index in range(at, min(at + columns, len(images))):
            left = gap + (index - at) * (cell + gap)
            _place(page, draw, fitted[index], left, top + tall - fitted[index].height)
            text_top = top + tall + gap // 2
            if marks[index] is not None:
                mark = _mark(bool(marks[index]), round(line_height * 0.8))
                page.paste(mark, (left, text_top + (line_height - mark.height) // 2))
            for number, line in enumerate(texts[index]):
                draw.text((left + mark_width, text_top + number * line_height), line, fill=_INK, font=font)
        top += tall + gap // 2 + text_height + gap
    return page


def paired_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], cell: int = 160) -> Image.Image:
    """Lay out rows of images, each with its label at the left.

    Rows may differ in length; ``cell`` as in :func:`captioned_grid`. Raises ValueError if there is no image.
    """
    columns = max((len(images) for _, images in rows), default=0)
    if columns < 1 or cell < 1:
        raise ValueError("paired_grid needs at least one row with an image, and a cell of at least 1 pixel")
    font, line_height, gap = _font_for(cell)
    fitted = [[_fit(image, cell) for image in images] for _, images in rows]
    wide, tall = (max(image.size[axis] for images in fitted for image in images) for axis in (0, 1))
    labels = [wrap(label, font, max(cell, 100)) for label, _ in rows]
    label_width = math.ceil(max((font.getlength(line) for lines in labels for line in lines), default=0))
    first = gap + (label_width + gap if label_width else 0)
    heights = [max(tall, len(lines) * line_height) for lines in labels]
    page = Image.new("RGB", (first + columns * (wide + gap), gap + sum(h + gap for h in heights)), "white")
    draw = ImageDraw.Draw(page)
    top = gap
    for images, lines, height in zip(fitted, labels, heights, strict=True):
        for number, line in enumerate(lines):
            text_top = top + (height - len(lines) * line_height) // 2 + number * line_height
            draw.text((first - gap, text_top), line, fill=_INK, font=font, anchor="ra")
        for column, image in enumerate(images):
            _place(page, draw, image, first + column * (wide + gap), top + (height - image.height) // 2)
        top += height + gap
    return page


def _default_columns(count: int) -> int:
    """Up to five images form one row; else the number of columns near the square root with the fewest empty cells."""
    if count <= 5:
        return count
    root = math.ceil(math.sqrt(count))
    return min(range(root, root + 3), key=lambda columns: (-count % columns, columns))


def _font_for(cell: int) -> tuple[Font, int, int]:
    """Font, line height and gap in pixels."""
    size = min(22, max(11, round(cell * 0.085)))
    return ImageFont.load_default(size=size), round(size * 1.35), max(6, cell // 12)


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Break text into lines of at most ``width`` pixels, between words unless one is too long for a line."""
    lines: list[str] = []
    for word in text.split():
        while word and len(lines) <= MAX_CAPTION_LINES:
            if lines and font.getlength(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
                break
            fits = next((n - 1 for n in range(2, len(word) + 1) if font.getlength(word[:n]) > width), len(word))
            lines.append(word[:fits])
            word = word[fits:]
    if len(lines) <= MAX_CAPTION_LINES:
        return lines
    last = lines[MAX_CAPTION_LINES - 1]
    while len(last) > 1 and font.getlength(last + "…") > width:
        last = last.rpartition(" ")[0] or last[:-1]
    return [*lines[: MAX_CAPTION_LINES - 1], last + "…"]


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """The image in RGB over white, resized to a longer side of at most ``cell`` pixels."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > cell:
        width, height = (max(1, round(side * cell / longest)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = cell // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _place(page: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int) -> None:
    """Paste an image with a thin frame, and add its box to ``page.info``."""
    draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=_FRAME)
    page.paste(image, (x, y))
    page.info.setdefault("boxes", []).append((x, y, x + image.width, y + image.height))


def save_grid(grid: Image.Image, rows: Sequence[tuple[str, Sequence[Image.Image]]], path: str | os.PathLike) -> None:
    """Write a grid of these rows as PNG, atomically; :func:`read_grid` reads its images."""
    boxes = iter(grid.info["boxes"])
    kept = [[label, [next(boxes) for _ in images]] for label, images in rows]
    chunks = PngInfo()
    chunks.add_itxt(_ROWS_CHUNK, json.dumps(kept))
    with atomic_file(path) as file:
        grid.save(file, "PNG", pnginfo=chunks)


def read_grid(path: str | os.PathLike) -> tuple[Image.Image, list[tuple[str, list[Image.Image]]]]:
    """A grid and its rows, which are empty if :func:`save_grid` did not write it.

    Raises :class:`LdmError` if the file is no PNG, or its rows do not lie in it.
    """
    with open_image(path, ("PNG",)) as grid:
        grid.load()
        text = grid.info.get(_ROWS_CHUNK, "[]")
        page = grid.copy()
    rows = parse_json(str(text).encode("utf-8", "replace"), f"{path}, chunk {_ROWS_CHUNK!r}", list[tuple[str, list[Box]]])
    boxes = [box for _, boxes in rows for box in boxes]
    inside = all(0 <= left < right <= page.width and 0 <= top < bottom <= page.height for left, top, right, bottom in boxes)
    # apart, as in any grid: many boxes of the whole page would fill the memory
    if not inside or sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) > page.width * page.height:
        raise LdmError(f"{path}, chunk {_ROWS_CHUNK!r}: the boxes do not lie side by side in the image; move the file away")
    return page, [(label, [page.crop(box) for box in boxes]) for label, boxes in rows]


@lru_cache
def _mark(good: bool, size: int) -> Image.Image:
    """A tick or a cross, drawn at eight times its size for smooth edges."""
    big = Image.new("RGB", (8 * size, 8 * size), "white")
    draw = ImageDraw.Draw(big)
    strokes = [[(0.1, 0.55), (0.4, 0.83), (0.9, 0.2)]] if good else [[(0.2, 0.2), (0.8, 0.8)], [(0.8, 0.2), (0.2, 0.8)]]
    for stroke in strokes:
        points = [(x * 8 * size, y * 8 * size) for x, y in stroke]
        draw.line(points, fill=_GREEN if good else _RED, width=max(8, int(1.2 * size)), joint="curve")
    return big.resize((size, size), Image.Resampling.LANCZOS)
