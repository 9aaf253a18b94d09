"""The built-in captioned data set: rendered coloured shapes on plain backgrounds.

With it the whole pipeline runs anywhere without a download, and prompt accuracy can be measured: every caption names
attributes that :mod:`ldm.shapes.scorer` reads back from pixels alone.

Two presets, by the number of objects in a scene::

    one   a small red ring at the left on a black background
    two   a large blue star above a small pink heart on a white background

One (colour, shape) pair in eight is held out of training sets (see :func:`is_held_out`; ``held_out=True`` renders just those),
so that a model can be tested on combinations of words that it never saw together.

Coordinates: x to the right, y downwards, in fractions of the image's side from the top left corner. An object's radius is
half the side of the box that it roughly fills, in the same unit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ldm.errors import UsageError

# Any two colours, and any colour and background, are at least 90 apart in RGB: a pale blue is not mistaken for purple.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "green": (30, 160, 50),
    "blue": (20, 80, 230),
    "yellow": (250, 220, 30),
    "purple": (130, 30, 185),
    "orange": (250, 125, 15),
    "cyan": (30, 200, 220),
    "pink": (245, 90, 170),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "beige": (232, 214, 178),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
RADII: dict[str, float] = {"small": 0.165, "large": 0.225}
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "center": (0.5, 0.5),
}
# Position of the first object; that of the second is mirrored through the centre.
RELATIONS: dict[str, tuple[float, float]] = {
    "left of": (0.25, 0.5),
    "right of": (0.75, 0.5),
    "above": (0.5, 0.25),
    "below": (0.5, 0.75),
}
#: of an image in pixels: the side of a square, or (height, width)
Size = int | tuple[int, int]
PRESETS = ("one", "two")
SIZE_RANGE = (32, 256)

# Jitter as fractions of the radius and of the side. Small objects may move further; there is less room along the axis of a
# relation than across it. No object leaves the image or touches the other, and sizes and places remain distinct.
_RADIUS_JITTER = 0.04
_PLACE_JITTER = {"small": 0.05, "large": 0.02}
_ALONG_JITTER = {"small": 0.05, "large": 0.005}
_ACROSS_JITTER = 0.08
# PIL rounds outlines to whole pixels, so they are rendered at about this many pixels a side, then reduced.
_RENDER_SIZE = 512


@dataclass(frozen=True)
class Object:
    """An object in a scene: keys of :data:`RADII`, :data:`COLOURS` and a member of :data:`SHAPES`."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The content of a caption: one object and its place, or two and the relation of the first to the second.

    ``where`` is a key of :data:`PLACES` (one object) or of :data:`RELATIONS` (two objects).
    """

    background: str
    objects: tuple[Object, ...]
    where: str

    @property
    def preset(self) -> str:
        """``one`` or ``two``."""
        return PRESETS[len(self.objects) - 1]

    @property
    def caption(self) -> str:
        """The caption; :func:`parse_caption` is the inverse."""
        first = self.objects[0]
        if self.preset == "one":
            return f"a {first} at the {self.where} on a {self.background} background"
        return f"a {first} {self.where} a {self.objects[1]} on a {self.background} background"


class ShapeSample(NamedTuple):
    """A rendered image with its key in a shard and its caption."""

    key: str
    image: np.ndarray  # (S, S, 3) uint8
    caption: str


def _one_of(words: tuple[str, ...] | dict) -> str:
    return f"({'|'.join(words)})"


_OBJECT = f"a {_one_of(RADII)} {_one_of(COLOURS)} {_one_of(SHAPES)}"
_BACKGROUND = f"on a {_one_of(BACKGROUNDS)} background"
_GRAMMAR = {
    "one": re.compile(f"{_OBJECT} at the {_one_of(PLACES)} {_BACKGROUND}"),
    "two": re.compile(f"{_OBJECT} {_one_of(RELATIONS)} {_OBJECT} {_BACKGROUND}"),
}


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes; case and spacing do not matter.

    Raises:
        UsageError: the caption is not of either preset's form, or names the same object twice.
    """
    words = " ".join(text.lower().split())
    if match := _GRAMMAR["one"].fullmatch(words):
        size, colour, shape, place, background = match.groups()
        return Scene(background, (Object(size, colour, shape),), place)
    if match := _GRAMMAR["two"].fullmatch(words):
        *first, relation, size, colour, shape, background = match.groups()
        scene = Scene(background, (Object(*first), Object(size, colour, shape)), relation)
        if _may_occur_together(*scene.objects):
            return scene
        raise UsageError(f"caption {words!r}: the two objects must differ in colour or shape")
    raise UsageError(
        f"caption {words!r} is not one of the shapes data set; "
        "write it like 'a small red ring at the left on a black background' "
        "or 'a large blue star above a small pink heart on a white background'"
    )


def is_held_out(colour: str, shape: str) -> bool:
    """Whether training images never show this pair: one shape per colour.

    3 is odd, so colour => 3·colour + 1 (mod 8) is a permutation: every colour and every shape is held out with exactly one
    partner and seen with the other seven.
    """
    return SHAPES.index(shape) == (3 * list(COLOURS).index(colour) + 1) % len(SHAPES)


def _pairs(held_out: bool) -> list[tuple[str, str]]:
    """The (colour, shape) pairs: 56 for training, or the 8 that are held out."""
    return [pair for pair in itertools.product(COLOURS, SHAPES) if is_held_out(*pair) == held_out]


def _may_occur_together(first: Object, second: Object) -> bool:
    """Two objects of the same colour and shape would be ambiguous where sizes are hard to distinguish."""
    return (first.colour, first.shape) != (second.colour, second.shape)


def all_scenes(preset: str, held_out: bool = False) -> Iterator[Scene]:
    """Every scene of a preset, in a fixed order.

    Preset ``one``: 2,240 for training, 320 held out. Preset ``two``: 197,120 for training, and 3,584 held out,
    in which *both* objects are held-out pairs. No training scene shows a held-out pair anywhere.
    """
    check_preset(preset)
    objects = [Object(size, *pair) for pair in _pairs(held_out) for size in RADII]
    if preset == "one":
        for thing, place, background in itertools.product(objects, PLACES, BACKGROUNDS):
            yield Scene(background, (thing,), place)
    else:
        for first, second in itertools.product(objects, objects):
            if _may_occur_together(first, second):
                for relation, background in itertools.product(RELATIONS, BACKGROUNDS):
                    yield Scene(background, (first, second), relation)


def random_scene(rng: np.random.Generator, preset: str, held_out: bool = False) -> Scene:
    """One scene of :func:`all_scenes`, all of them equally likely."""
    check_preset(preset)
    pairs = _pairs(held_out)
    chosen = rng.choice(len(pairs), size=PRESETS.index(preset) + 1, replace=False)
    objects = tuple(Object(_pick(rng, RADII), *pairs[index]) for index in chosen)
    return Scene(_pick(rng, BACKGROUNDS), objects, _pick(rng, PLACES if preset == "one" else RELATIONS))


def _pick(rng: np.random.Generator, words: dict) -> str:
    return list(words)[rng.integers(len(words))]


def _unit_outlines() -> dict[str, np.ndarray]:
    """Closed outlines of the shapes as polygons, radius 1 around (0, 0), y down; (corners, 2)."""
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    circle = np.stack([np.sin(angle), -np.cos(angle)], axis=1)
    # https://mathworld.wolfram.com/HeartCurve.html, the sixth
    heart_y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)) / 16
    heart = np.stack([np.sin(angle) ** 3, heart_y - (heart_y.max() + heart_y.min()) / 2], axis=1)
    tips = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.05, 0.46)  # arms thick enough for 32 px
    star = np.stack([np.sin(tips) * reach, -np.cos(tips) * reach + 0.1], axis=1)
    arm = 0.36
    quarter = np.array([(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)])  # and its mirror image
    # sides chosen for similar visual weight, not similar boxes
    return {
        "circle": circle,
        "square": 0.87 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
        "triangle": np.array([(0, -0.9), (1, 0.82), (-1, 0.82)]),
        "star": star,
        "ring": circle,
        "cross": np.concatenate([quarter, -quarter]),
        "diamond": np.array([(0, -1), (1, 0), (0, 1), (-1, 0)]),
        "heart": heart,
    }


_OUTLINES = _unit_outlines()
_RING_HOLE = 0.48  # of the radius: at 32 px the smallest ring still has a band and a hole of two pixels or more


def coverage(shape: str, size: Size, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1; (H, W) float32. ``x, y`` are fractions of width and height, ``radius`` of
    the shorter side."""
    height, width = sides(size)
    finer = max(4, _RENDER_SIZE // min(height, width))
    mask = Image.new("L", (width * finer, height * finer))
    draw, side = ImageDraw.Draw(mask), min(mask.size)
    center = np.array([x, y]) * (np.array(mask.size) / side)

    def fill(outline: np.ndarray, value: int) -> None:
        corners = (center + radius * outline) * side - 0.5  # PIL counts from pixel centres
        draw.polygon(corners.ravel().tolist(), fill=value)

    fill(_OUTLINES[shape], 255)
    if shape == "ring":
        fill(_RING_HOLE * _OUTLINES["circle"], 0)
    return np.asarray(mask.reduce(finer), dtype=np.float32) / 255


def render(scene: Scene, size: Size, rng: np.random.Generator) -> np.ndarray:
    """Render a scene, antialiased, with places and radii jittered by ``rng``; (H, W, 3) uint8.

    Raises:
        UsageError: a side (pixels) is outside :data:`SIZE_RANGE`.
    """
    _check_size(size)
    image = np.tile(np.array(BACKGROUNDS[scene.background], np.float32), (*sides(size), 1))  # (H, W, 3)
    for index, thing in enumerate(scene.objects):
        if scene.preset == "one":
            center, jitter = np.array(PLACES[scene.where]), np.full(2, _PLACE_JITTER[thing.size])
        else:
            center = np.array(RELATIONS[scene.where])
            jitter = np.where(center == 0.5, _ACROSS_JITTER, _ALONG_JITTER[thing.size])
            center = center if index == 0 else 1 - center
        x, y = center + jitter * rng.uniform(-1, 1, size=2)
        radius = RADII[thing.size] * (1 + _RADIUS_JITTER * rng.uniform(-1, 1))
        image += coverage(thing.shape, size, x, y, radius)[..., None] * (np.array(COLOURS[thing.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)


def generate(
    count: int, size: Size | list[Size], seed: int, preset: str = "one", held_out: bool = False
) -> Iterator[ShapeSample]:
    """Render ``count`` captioned images of ``size`` pixels; of several sizes each in turn.

    Sample ``i`` depends only on ``seed``, ``i``, ``preset``, ``size`` and ``held_out``, so a larger set begins with the smaller
    one. Preset ``one`` shows all its scenes in shuffled order before it repeats any; preset ``two`` has too many for that and
    samples them at random.

    Raises:
        UsageError: an argument is out of range (raised by the call, before the first image is asked for).
    """
    check_preset(preset)
    sizes = size if isinstance(size, list) else [size]
    for each in sizes:
        _check_size(each)
    if count < 0 or seed < 0:
        raise UsageError(f"count and seed must not be negative, got count={count}, seed={seed}")
    return _generate(count, sizes, seed, preset, held_out)


def _generate(count: int, sizes: Sequence[Size], seed: int, preset: str, held_out: bool) -> Iterator[ShapeSample]:
    scenes = list(all_scenes(preset, held_out)) if preset == "one" else []
    # one square is one number, as in sets of before
    numbers = [sizes[0]] if isinstance(sizes[0], int) and len(sizes) == 1 else [side for size in sizes for side in sides(size)]
    variant = [PRESETS.index(preset), *numbers, int(held_out)]
    order = np.empty(0, dtype=np.int64)
    for index in range(count):
        rng = np.random.default_rng([seed, index, *variant])
        if scenes:
            epoch, position = divmod(index, len(scenes))
            if position == 0:
                # more seed words than a sample has: a stream of its own
                order = np.random.default_rng([seed, epoch, *variant, 1]).permutation(len(scenes))
            scene = scenes[order[position]]
        else:
            scene = random_scene(rng, preset, held_out)
        yield ShapeSample(f"{index:08d}", render(scene, sizes[index % len(sizes)], rng), scene.caption)


def seen_prompts(preset: str, count: int, seed: int = 0) -> list[str]:
    """``count`` captions of training scenes."""
    check_preset(preset)
    rng = np.random.default_rng([seed, 1])
    return [random_scene(rng, preset).caption for _ in range(count)]


def held_out_prompts(preset: str, count: int, seed: int = 0) -> list[str]:
    """``count`` captions of held-out scenes, without repetition while there are enough of them.

    Every eight in a row have each held-out pair once (as the first object), and so each colour and each shape.
    """
    if count < 0 or seed < 0:
        raise UsageError(f"count and seed must not be negative, got count={count}, seed={seed}")
    rng = np.random.default_rng([seed, 0])
    by_pair: dict[tuple[str, str], list[Scene]] = {pair: [] for pair in _pairs(held_out=True)}
    for scene in all_scenes(preset, held_out=True):
        by_pair[scene.objects[0].colour, scene.objects[0].shape].append(scene)
    columns = [[scenes[i] for i in rng.permutation(len(scenes))] for scenes in by_pair.values()]
    captions = [scene.caption for row in zip(*columns, strict=True) for scene in row]
    return list(itertools.islice(itertools.cycle(captions), count))


def check_preset(preset: str) -> None:
    """Raise :class:`UsageError` unless ``preset`` is one of :data:`PRESETS`."""
    if preset not in PRESETS:
        raise UsageError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def _check_size(size: Size) -> None:
    for side in sides(size):
        if not SIZE_RANGE[0] <= side <= SIZE_RANGE[1]:
            raise UsageError(f"size must be {SIZE_RANGE[0]} to {SIZE_RANGE[1]} pixels, got {side}")
