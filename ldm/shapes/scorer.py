"""Read a scene of :mod:`ldm.shapes.scenes` back from pixels, and score images against their captions.

It is written for generated images: slightly blurred, slightly noisy, or wrong. The background is the median of the border.
Projecting each pixel onto the line from background to object colour gives a soft mask, which is normalised in position and
scale by its moments and correlated with rendered templates of every shape. An image that does not look like a scene is read as
None rather than guessed.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ldm.errors import UsageError
from ldm.shapes.scenes import BACKGROUNDS, COLOURS, PLACES, RADII, SHAPES, Object, Scene, check_preset, coverage, parse_caption

_COLOUR_NAMES, _COLOUR_VALUES = list(COLOURS), np.array(list(COLOURS.values()), np.float32)  # (8, 3)
_BACKGROUND_NAMES, _BACKGROUND_VALUES = list(BACKGROUNDS), np.array(list(BACKGROUNDS.values()), np.float32)  # (4, 3)
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_FRAME = 20  # points a side of the normalised frame
_FRAME_REACH = 1.7  # half its side in units of the mask's spread; includes a heart's lobes and a star's tips
_READING_SIZE = 64  # pixels a side; larger images are reduced to between this and twice as many
# Limits beyond which an image is unreadable; rendered images with blur and noise stay well within (tests/shapes).
_MAX_COLOUR_ERROR = 75.0  # RGB distance to the nearest palette colour
_MIN_MATCH = 0.9  # correlation with the best-matching shape; rendered ones reach 0.95 at 64 px in heavy noise
_MAX_STRAY = 0.12  # pixels too far off to belong to one object, or of another colour, as a share of the object
_REACH = 1.5 * RADII["large"]  # the furthest that a part of an object is from its centroid, in fractions of the shorter side
_MAX_PLACE_ERROR = 0.16  # from the nearest place, in fractions of the side; rendered objects stay within 0.08
_MIN_AREA = 0.006  # of the image; the smallest rendered object covers 0.02
_MASK_FLOOR = 0.15  # coverage below counts as 0, above 1 - it as 1


def read_scene(image: np.ndarray, preset: str) -> Scene | None:
    """The scene that an image shows, from its pixels alone.

    Two objects come back in reading order: ``left of`` or ``above``, never the opposite words for the same image.

    Args:
        image: (H, W, 3) uint8.
        preset: ``one`` or ``two``: how many objects to look for.

    Returns:
        The scene, or None where the background, a colour, a shape, a size, the place or the relation is not in the data set,
        or the number of objects differs.
    """
    check_preset(preset)
    if (factor := min(image.shape[:2]) // _READING_SIZE) > 1:  # more detail takes longer and helps nothing
        image = np.asarray(Image.fromarray(image).reduce(factor))
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])  # (2H+2W-4, 3)
    ground = np.median(border, axis=0)  # (3,)
    background = _nearest(ground, _BACKGROUND_VALUES)
    if background is None:
        return None
    pixels = pixels - ground
    if preset == "one":
        found = _read_object(pixels, ground)
        if found is None:
            return None
        thing, center = found
        distance = {name: float(np.linalg.norm(center - named)) for name, named in PLACES.items()}
        place = min(distance, key=distance.__getitem__)
        if distance[place] > _MAX_PLACE_ERROR:
            return None
        return Scene(_BACKGROUND_NAMES[background], (thing,), place)
    axis, cut = _divide(pixels)
    halves = [pixels.copy(), pixels.copy()]
    first, second = (half.swapaxes(0, 1) if axis == 0 else half for half in halves)  # the cut runs across rows
    first[cut:], second[:cut] = 0, 0
    near, far = (_read_object(half, ground) for half in halves)
    if near is None or far is None:
        return None
    apart = np.abs(far[1] - near[1])  # (2,)
    if apart[axis] < 1.5 * apart[1 - axis]:  # on a diagonal: no known relation
        return None
    return Scene(_BACKGROUND_NAMES[background], (near[0], far[0]), ("left of", "above")[axis])


def score(images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Attribute accuracy and prompt accuracy of images, each from 0 to 1.

    ``background``, ``colour``, ``shape``, ``size`` (over all objects), ``place`` (one object) or ``relation`` (two);
    ``prompt_accuracy``: images with all of these right; ``readable``: images that show a scene at all. In an unreadable image
    every attribute is wrong. With two objects, those read are matched to the caption's in the order that agrees best, and the
    relation is evaluated in that order, so that exchanged objects count as a wrong relation and not as two wrong objects.

    Args:
        images: N images, (H, W, 3) uint8 each.
        captions: N captions, of either preset.

    Raises:
        UsageError: a caption outside the grammar, numbers that differ, or nothing to score.
    """
    if len(images) != len(captions) or len(captions) == 0:
        raise UsageError(f"score needs one caption for each image, got {len(images)} images, {len(captions)} captions")
    right: dict[str, list[float]] = defaultdict(list)
    for image, caption in zip(images, captions, strict=True):
        asked = parse_caption(caption)
        read = read_scene(image, asked.preset)
        verdict = _compare(asked, read)
        for attribute, share in verdict.items():
            right[attribute].append(share)
        right["prompt_accuracy"].append(float(all(share == 1 for share in verdict.values())))
        right["readable"].append(float(read is not None))
    return {attribute: float(np.mean(shares)) for attribute, shares in right.items()}


def _compare(asked: Scene, read: Scene | None) -> dict[str, float]:
    """The accuracy of each attribute of ``asked`` in ``read``."""
    where = "place" if asked.preset == "one" else "relation"
    if read is None:
        return dict.fromkeys(("background", "colour", "shape", "size", where), 0.0)
    orders = [read]
    if asked.preset == "two":
        orders.append(Scene(read.background, read.objects[::-1], _OPPOSITE[read.where]))
    verdicts = []
    for order in orders:
        pairs = list(zip(asked.objects, order.objects, strict=True))
        verdict = {"background": float(asked.background == order.background)}
        for attribute in ("colour", "shape", "size"):
            verdict[attribute] = float(np.mean([getattr(a, attribute) == getattr(b, attribute) for a, b in pairs]))
        verdicts.append(verdict | {where: float(asked.where == order.where)})
    # objects decide the order before the relation does
    return max(verdicts, key=lambda v: (v["colour"] + v["shape"] + v["size"], v[where]))


def _nearest(value: np.ndarray, palette: np.ndarray) -> int | None:
    """The index of the palette's nearest colour, or None where none is near."""
    distance = np.linalg.norm(palette - value, axis=1)
    index = int(distance.argmin())
    return index if distance[index] <= _MAX_COLOUR_ERROR else None


def _divide(pixels: np.ndarray) -> tuple[int, int]:
    """How to split an image of two objects: the axis (0: x, 1: y) they are along, and the row or column between them."""
    mask = np.clip((np.linalg.norm(pixels, axis=2) - 40) / 50, 0, 1)  # (H, W), whatever the objects' colours
    profiles = mask.sum(axis=0), mask.sum(axis=1)
    spread = []
    for profile in profiles:
        position = np.arange(len(profile))
        total = max(float(profile.sum()), 1e-6)
        mean = (profile @ position) / total
        spread.append((profile @ (position - mean) ** 2) / total)
    axis = int(spread[1] > spread[0])
    size = len(profiles[axis])
    # the emptiest line of the middle fifth; among equals, the one nearest to the middle
    middle = np.arange(round(0.4 * size), round(0.6 * size) + 1)
    emptiness = profiles[axis][middle] + 0.01 * np.abs(middle - size / 2)
    return axis, int(middle[emptiness.argmin()])


def _read_object(pixels: np.ndarray, ground: np.ndarray) -> tuple[Object, np.ndarray] | None:
    """The one object in ``pixels`` (H, W, 3), differences from the background colour ``ground``.

    Also its centre (x, y) in fractions of width and height.
    """
    height, width = pixels.shape[:2]
    size = min(height, width)
    strength = np.linalg.norm(pixels, axis=2)  # (H, W)
    # The strongest pixels (fewer than the smallest object has) give a first estimate of the colour, which selects all fully
    # covered ones for the second.
    count = max(4, round(_MIN_AREA * size * size))
    strongest = np.argpartition(strength, -count, axis=None)[-count:]
    colour = np.median(pixels.reshape(-1, 3)[strongest], axis=0)  # (3,)
    if np.linalg.norm(colour) < 60:
        return None
    raw = pixels @ (colour / (colour @ colour))  # (H, W)
    if (raw > 0.8).sum() > count:
        colour = pixels[raw > 0.8].mean(axis=0)
        raw = pixels @ (colour / (colour @ colour))
    colour_index = _nearest(colour + ground, _COLOUR_VALUES)
    if colour_index is None:
        return None
    # Every pixel of an image of one object mixes two colours; another colour means another object.
    mixed = np.clip(raw, 0, 1.2)[..., None] * colour
    alien = int((np.linalg.norm(pixels - mixed, axis=2) > _MAX_COLOUR_ERROR).sum())
    mask = np.clip((raw - _MASK_FLOOR) / (1 - 2 * _MASK_FLOOR), 0, 1)
    if alien > _MAX_STRAY * mask.sum() or (mask := _drop_stray(mask)) is None:
        return None
    if (area := float(mask.sum()) / size**2) < _MIN_AREA:
        return None
    framed, center = _standard_frame(mask)
    vectors, shapes = _templates()
    match = vectors @ framed  # (T,)
    best = int(match.argmax())
    if match[best] < _MIN_MATCH:
        return None
    shape = SHAPES[shapes[best]]
    # Shape and area give the radius; the threshold between sizes is their geometric mean.
    radius = np.sqrt(area / _unit_area(shape)[0])
    if not 0.75 * RADII["small"] < radius < 1.3 * RADII["large"]:
        return None
    size_word = "small" if radius < np.sqrt(RADII["small"] * RADII["large"]) else "large"
    center = (center - radius * _unit_area(shape)[1]) * (size / np.array([width, height]))
    return Object(size_word, _COLOUR_NAMES[colour_index], shape), center


def _moments(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """A mask's centroid (x, y) and its spread (root mean square distance from there), in pixels."""
    columns, rows = mask.sum(axis=0), mask.sum(axis=1)
    across, down = (np.arange(len(profile), dtype=np.float32) for profile in (columns, rows))
    total = columns.sum()
    x, y = (columns @ across) / total, (rows @ down) / total
    variance = (columns @ (across - x) ** 2 + rows @ (down - y) ** 2) / total
    return np.array([x, y]), float(np.sqrt(variance))


def _drop_stray(mask: np.ndarray) -> np.ndarray | None:
    """The mask without pixels too far from its centroid to belong to one object; None where these are many."""
    centroid, _ = _moments(mask)
    height, width = mask.shape
    distance = np.hypot(np.arange(width) - centroid[0], np.arange(height)[:, None] - centroid[1])  # (H, W)
    near = np.where(distance < _REACH * min(height, width), mask, 0)
    return near if near.sum() >= (1 - _MAX_STRAY) * mask.sum() else None


def _standard_frame(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalise a mask to centroid 0 and spread 1, as a vector of mean 0 and length 1.

    Also returns the centroid in fractions of the shorter side.
    """
    centroid, spread = _moments(mask)
    steps = np.linspace(-_FRAME_REACH, _FRAME_REACH, _FRAME) * max(spread, 0.5)
    across, down = (_interpolation(middle + steps, size) for middle, size in zip(centroid, mask.shape[::-1], strict=True))
    framed = (down @ mask @ across.T).ravel()
    framed -= framed.mean()
    return framed / max(float(np.linalg.norm(framed)), 1e-6), (centroid + 0.5) / min(mask.shape)


def _interpolation(points: np.ndarray, size: int) -> np.ndarray:
    """The matrix of linear interpolation of ``size`` pixels at ``points``, zero outside; (points, size)."""
    return np.maximum(0, 1 - np.abs(points[:, None] - np.arange(size))).astype(np.float32)


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Every shape at several pixel sizes, offsets and blurs, in the normalised frame.

    (T, F*F) float32 of mean 0 and length 1, and (T,) indices into SHAPES.
    """
    vectors, shapes = [], []
    # Radii in pixels, from the smallest at 32 px; beyond the last, edges are sharp in the frame anyway.
    for (index, shape), radius in itertools.product(enumerate(SHAPES), (3.8, 4.6, 6.0, 8.5, 13.0, 20.0)):
        size = 2 * int(2 * radius) + 8
        for x, y in itertools.product((0.0, 0.5), repeat=2):
            mask = coverage(shape, size, 0.5 + x / size, 0.5 + y / size, radius / size)
            for blur in (0.0, 0.7):
                smooth = np.exp(-((np.arange(size)[:, None] - np.arange(size)) ** 2) / (2 * max(blur, 1e-3) ** 2))
                smooth /= smooth.sum(axis=1, keepdims=True)
                vectors.append(_standard_frame(smooth @ mask @ smooth.T)[0])
                shapes.append(index)
    return np.stack(vectors).astype(np.float32), np.array(shapes)


@functools.cache
def _unit_area(shape: str) -> tuple[float, np.ndarray]:
    """A shape of radius 1: its area, and its centroid (x, y) relative to its centre."""
    size, radius = 128, 0.4
    mask = coverage(shape, size, 0.5, 0.5, radius)
    centroid, _ = _moments(mask)
    return float(mask.mean()) / radius**2, ((centroid + 0.5) / size - 0.5) / radius
