"""Build a captioned set of drawings and photographs of many shapes out of Debian packages.

    python tools/clipart.py OUT [--download DIR] [--size 256] [--validation 0.02]

``openclipart-png`` has drawings, ``openclipart-svg`` their captions (public domain), and ``tuxpaint-stamps-default`` drawings
and photographs (GPL-2). They are installed, or apt-get downloads them into ``DIR``.

Writes ``OUT/train`` and ``OUT/validation``, ready for ``ldm shards pack``: ``openclipart/animals/frog.png`` and so on. Beside a
drawing ``frog.json`` has two captions, its title, and the title with description and keywords; beside a stamp ``frog.txt`` has
one. Images are cut to what is not transparent, with a margin of 4%, put on white, and scaled down to a shorter side of
``--size`` pixels; none is enlarged. A share of the *titles* is for validation, so that no held-out prompt has been trained on.
What is not taken (links, copies, drawings that are empty, tiny or huge, SVGs without a PNG, a thousand spirographs) is listed
in ``OUT/left_out.jsonl`` with its reason. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from debian import package_root, parser_of, run
from PIL import Image, ImageChops

from ldm.data.decode import decode_image
from ldm.data.writer import encode_png
from ldm.errors import UsageError
from ldm.files import atomic_folder
from ldm.images import MAX_IMAGE_BYTES, DecodeError

DRAWINGS, TEXTS, STAMPS = "usr/share/openclipart/png", "usr/share/openclipart/svg", "usr/share/tuxpaint/stamps"
SMALLEST = 32  # pixels of the shorter side of what is visible
MARGIN = 0.04  # of the longer side, around what was cut out of transparency
MAX_KEYWORDS = 6
# a title of more drawings than this is the name of a collection
MANY = 3
# hundreds of spirographs of thin lines; a browser's sign in the place of an image that the SVG links to
SPIROGRAPH, LINKED_IMAGE = re.compile(r"star_\d+pt\d+step"), re.compile(rb"<image\b[^>]*href=\"(?!data:)")
_DC = "{http://purl.org/dc/elements/1.1/}"
# traces of the scripts that made the library, addresses
_JUNK = re.compile(r"hash(\(0x\w+\))?|0x\w+|.*theme_icon|\W*|.*(@|://).*")
_CREDIT = re.compile(r"^(clipart|drawing|image) by .*? - ", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """An image of a package.

    Attributes:
        key: its path in the set, without an ending.
        file: of the package.
        captions: the shortest first.
        reason: why it is left out.
    """

    key: str
    file: Path
    captions: tuple[str, ...] = ()
    reason: str | None = None

    def held_out(self, share: float) -> bool:
        """Whether it is for validation: by its first caption less capitals and a number at its end."""
        title = re.sub(r"[\W\d_]+$", "", self.captions[0].casefold()) or self.captions[0]
        return int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") < share * 2**64


# -- captions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """What an SVG says of itself (RDF with Dublin Core)."""

    title: str
    description: str
    keywords: tuple[str, ...]
    creator: str


def described(svg: bytes) -> Described:
    """Raises ElementTree.ParseError for what is no XML."""
    work = next(
        (each for each in ElementTree.fromstring(svg).iter() if each.tag.endswith("}Work")), ElementTree.Element("Work")
    )

    def text(path: str) -> str:
        found = work.find(path)
        words = " ".join("".join(found.itertext()).split()) if found is not None else ""
        return "" if _JUNK.fullmatch(words.casefold()) else words

    subject = work.find(f"{_DC}subject")
    items = [] if subject is None else [each for each in subject.iter() if each.tag.endswith("}li")]
    keywords = [_words("".join(each.itertext())).casefold() for each in items]
    kept = dict.fromkeys(word for word in keywords if not _JUNK.fullmatch(word.replace(" ", "_")))
    title = _words(_CREDIT.sub("", text(f"{_DC}title")))
    return Described(title, text(f"{_DC}description"), tuple(kept), text(f"{_DC}creator"))


def captions_of(described: Described, stem: str, is_collection: bool) -> tuple[str, ...]:
    """The title, and the title with description and keywords.

    The file's name less its author's is the title of a drawing whose own is that of a collection.
    """
    title = described.title
    if is_collection or not title:
        authors = re.findall(r"\w{3,}", described.creator.casefold())
        name = [
            word for word in _words(stem).split() if not any(author.startswith(word) for author in authors if len(word) > 2)
        ]
        title = re.sub(r" 0\d\w?$", "", " ".join(name)) or title or _words(stem)
    parts = [title]
    if described.description and described.description.casefold() not in title.casefold():
        parts.append(described.description.rstrip("."))
    said = set(re.findall(r"\w+", " ".join(parts).casefold()))
    parts += [word for word in described.keywords if not {*word.split()} <= said][:MAX_KEYWORDS]
    return tuple(dict.fromkeys((title, ", ".join(parts))))


def _words(name: str) -> str:
    return " ".join(re.sub(r"[_\-]+", " ", name).split())


# -- the packages --------------------------------------------------------------------------------------------------------


def drawings(pngs: Path, svgs: Path) -> Iterator[Candidate]:
    """Those of Open Clip Art, in the order of their names."""
    found: list[tuple[Path, str, Described | None, str | None]] = []
    for file in sorted(pngs.rglob("*.png")):
        place = str(file.relative_to(pngs).with_suffix(""))
        svg = svgs / f"{place}.svg"  # a name may hold dots
        about, reason = None, None
        if file.is_symlink():
            reason = "a link to another drawing"
        elif SPIROGRAPH.fullmatch(file.stem):
            reason = "one of hundreds of spirographs"
        elif not svg.is_file():
            reason = "no SVG with a caption"
        else:
            data = svg.read_bytes()
            try:
                about = described(data)
            except ElementTree.ParseError as error:
                reason = f"its SVG is no XML ({error})"
            if LINKED_IMAGE.search(data):
                reason = "links to an image that the package does not hold"
        found.append((file, f"openclipart/{place}", about, reason))
    titles = collections.Counter(about.title for *_, about, reason in found if about and not reason)
    for file, key, about, reason in found:
        captions = captions_of(about, file.stem, titles[about.title] > MANY) if about else ()
        yield Candidate(key, file, captions, reason)


def stamps(folder: Path) -> Iterator[Candidate]:
    """Those of Tux Paint, in the order of their names; the first line of the text beside each is English."""
    pngs, svgs = ({file.with_suffix("") for file in folder.rglob(f"*.{ending}")} for ending in ("png", "svg"))
    for stem in sorted(pngs | svgs):
        file, text = Path(f"{stem}.png"), Path(f"{stem}.txt")
        key = f"tuxpaint/{stem.relative_to(folder)}"
        if stem not in pngs:
            yield Candidate(key, Path(f"{stem}.svg"), reason="an SVG without a PNG")
        elif not text.is_file():
            yield Candidate(key, file, reason="no text beside it")
        else:
            first = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
            yield Candidate(key, file, (first,) if first else (), None if first else "an empty text beside it")


# -- images --------------------------------------------------------------------------------------------------------------


def prepared(data: bytes, size: int) -> Image.Image:
    """What is visible of an image, on white, with a shorter side of at most ``size``. Raises :class:`DecodeError` for an image
    that is empty, tiny or white."""
    image = decode_image(data, background=None)
    if image.mode == "RGBA":
        box = image.getchannel("A").point([255 * (alpha > 8) for alpha in range(256)]).getbbox()
        if box is None:
            raise DecodeError("empty: all of it is transparent")
        image = image.crop(box)
    if min(image.size) < SMALLEST:
        raise DecodeError(f"tiny: {image.width} x {image.height} pixels are visible")
    if image.mode == "RGBA":
        margin = round(MARGIN * max(image.size))
        page = Image.new("RGBA", (image.width + 2 * margin, image.height + 2 * margin), "white")
        page.alpha_composite(image, (margin, margin))
        image = page.convert("RGB")
    if ImageChops.invert(image).getextrema() == ((0, 0),) * 3:
        raise DecodeError("white on white")
    if (scale := size / min(image.size)) < 1:
        sides = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((*sides,), Image.Resampling.LANCZOS)  # pyright: ignore[reportArgumentType]
    return image


def write_set(out: Path, candidates: list[Candidate], size: int, validation: float) -> collections.Counter[str]:
    """Write the set into the new folder ``out``; returns how many images each of its parts has."""

    def image_of(candidate: Candidate) -> tuple[bytes | None, str | None]:
        if candidate.reason:
            return None, candidate.reason
        try:
            if candidate.file.stat().st_size > MAX_IMAGE_BYTES:
                raise DecodeError("a file of more bytes than the limit")
            return encode_png(prepared(candidate.file.read_bytes(), size)), None
        except DecodeError as error:
            return None, str(error)

    counts: collections.Counter[str] = collections.Counter()
    first_of: dict[bytes, str] = {}  # sha256 => key
    with atomic_folder(out) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        left_out = []
        for candidate, (png, reason) in zip(candidates, pool.map(image_of, candidates), strict=True):
            if png is not None:
                first = first_of.setdefault(hashlib.sha256(png).digest(), candidate.key)
                reason = None if first == candidate.key else f"the same pixels as {first}"
            if png is None or reason:
                left_out.append({"file": candidate.key, "reason": reason})
                counts["left out"] += 1
                continue
            part = "validation" if candidate.held_out(validation) else "train"
            file = temporary / part / f"{candidate.key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png)
            if len(candidate.captions) == 1:
                file.with_suffix(".txt").write_text(candidate.captions[0] + "\n", encoding="utf-8")
            else:
                file.with_suffix(".json").write_text(json.dumps({"captions": candidate.captions}, ensure_ascii=False))
            counts[part] += 1
        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in left_out)
        (temporary / "left_out.jsonl").write_text("".join(lines), encoding="utf-8")
    return counts


def build(options: argparse.Namespace) -> str:
    """Write the set; returns a line that says what it is."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are left out
    if not 0 <= options.validation <= 0.5:
        raise UsageError(f"--validation is a share of 0 to 0.5, not {options.validation:g}")
    contents = {"openclipart-png": DRAWINGS, "openclipart-svg": TEXTS, "tuxpaint-stamps-default": STAMPS}
    pngs, svgs, folder = (package_root(name, content, options.download) / content for name, content in contents.items())
    candidates = [*drawings(pngs, svgs), *stamps(folder)]
    counts, out = write_set(options.out, candidates, options.size, options.validation), options.out
    return (
        f"{counts['train']} images in {out / 'train'}, {counts['validation']} in {out / 'validation'}; "
        f"{counts['left out']} files are left out, {out / 'left_out.jsonl'} says why"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = parser_of(__doc__, 256, "shorter sides are at most so many pixels", megabytes=320)
    parser.add_argument("--validation", type=float, default=0.02, metavar="SHARE", help="of the titles (default 0.02)")
    return run(build, parser.parse_args(arguments), sizes=(SMALLEST, 4096))


if __name__ == "__main__":
    sys.exit(main())
