"""Render a captioned data set from the font Noto Color Emoji (SIL Open Font License): over 1,400 images on white.

    python tools/emoji.py OUT [--size 128] [--font PATH]

Writes ``OUT/u1f355.png`` and ``OUT/u1f355.txt`` ("slice of pizza") and so on, ready for ``ldm shards pack OUT``. The
caption is the character's Unicode name in lower case, as this Python's ``unicodedata`` has it, except for a few whose name
does not describe the image. Flags and skin tones are not included.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from ldm.errors import LdmError, UsageError
from ldm.files import atomic_folder, require_new_folder

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
INSTALL = "install it with `apt-get install fonts-noto-color-emoji`, or give its path with --font"
# The font's only bitmap size. A glyph's cell is 136 x 128; one scale for all keeps "small" and "large" apart.
FONT_SIZE = 109
CANVAS = 144

# In Unicode names "black" means filled and "white" outlined, whatever colour the image has. A model that learns
# colours from captions would learn them wrong.
RENAMED = {
    0x2600: "sun with rays",
    0x260E: "red telephone",
    0x261D: "index pointing up",
    0x2639: "frowning face",
    0x263A: "smiling face",
    0x2663: "club suit",
    0x2660: "spade suit",
    0x2665: "red heart suit",
    0x2666: "red diamond suit",
    0x267B: "universal recycling symbol",
    0x2702: "scissors",
    0x2705: "check mark button",
    0x2712: "pen nib",
    0x2734: "eight pointed star",
    0x2753: "red question mark",
    0x2757: "red exclamation mark",
    0x2763: "heart exclamation mark",
    0x2764: "red heart",
    0x27A1: "rightwards arrow",
    0x2B05: "leftwards arrow",
    0x2B06: "upwards arrow",
    0x2B07: "downwards arrow",
    0x2B50: "yellow star",
    0x2B55: "red circle outline",
    0x1F324: "sun with small cloud",
    0x1F325: "sun hidden by cloud",
    0x1F326: "sun behind cloud with rain",
    0x1F446: "backhand index pointing up",
    0x1F447: "backhand index pointing down",
    0x1F448: "backhand index pointing left",
    0x1F449: "backhand index pointing right",
}
_DROPPED_WORDS = {0x23E9, 0x23EA, 0x23EB, 0x23EC, 0x23ED, 0x23EE, 0x23EF, 0x23F9, 0x23FA, 0x25B6, 0x25C0}

_PEOPLE = {0x1F468: "man ", 0x1F469: "woman ", 0x1F9D1: ""}
_TRADES = {
    0x2695: "health worker",
    0x2696: "judge",
    0x2708: "pilot",
    0x1F33E: "farmer",
    0x1F373: "cook",
    0x1F37C: "feeding baby",
    0x1F393: "student",
    0x1F3A4: "singer",
    0x1F3A8: "artist",
    0x1F3EB: "teacher",
    0x1F3ED: "factory worker",
    0x1F4BB: "technologist",
    0x1F4BC: "office worker",
    0x1F527: "mechanic",
    0x1F52C: "scientist",
    0x1F680: "astronaut",
    0x1F692: "firefighter",
}
_SIGNS = {0x2640: "woman ", 0x2642: "man "}
_JOINER, _COLOURED, _KEYCAP = "\u200d", "\ufe0f", "\u20e3"


def single_characters() -> Iterator[tuple[str, str]]:
    """(character, caption) of every named symbol in the blocks that hold emoji; the font may lack it."""
    for code in (0xA9, 0xAE, *range(0x203C, 0x3300), *range(0x1F000, 0x1FB00)):
        name = unicodedata.name(chr(code), "").lower()
        # Letters of flags, skin tones, hair and the keycap's frame are parts of emoji, not emoji.
        parts = ("regional indicator", "emoji modifier", "emoji component", "combining")
        if not name or name.startswith(parts) or unicodedata.category(chr(code)) in ("Zl", "Zp", "Zs", "Cf"):
            continue
        if code in _DROPPED_WORDS:
            name = name.removeprefix("black ")
        yield chr(code), RENAMED.get(code, name)


def sequences() -> Iterator[tuple[str, str]]:
    """(sequence, caption) of people at work, women and men doing what a single character shows, and keycaps."""
    for person, word in _PEOPLE.items():
        for thing, trade in _TRADES.items():
            yield (
                chr(person) + _JOINER + chr(thing) + (_COLOURED if thing < 0x10000 else ""),
                (word or "person " * (trade == "feeding baby")) + trade,
            )
    for character, name in single_characters():
        if ord(character) < 0x1F300 or {"man", "woman", "men", "women", "boy", "girl"} & set(name.split()):
            continue
        doing = " ".join(word for word in name.split() if word != "person")
        for sign, word in _SIGNS.items():
            # Bases that are not coloured by themselves (detective, golfer, ...) need the selector as well.
            selector = _COLOURED if ord(character) in (0x1F3CB, 0x1F3CC, 0x1F575) else ""
            yield character + selector + _JOINER + chr(sign) + _COLOURED, word + doing
    for key in "0123456789#*":
        yield key + _COLOURED + _KEYCAP, f"keycap {unicodedata.name(key).lower().removeprefix('digit ')}"


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """One emoji, centred in a white square; None where the font has no single glyph for it."""
    if font.getlength(text) > 1.5 * font.getlength("\U0001f600"):
        return None  # a sequence that the font does not join
    canvas = Image.new("RGBA", (2 * CANVAS, 2 * CANVAS))
    ImageDraw.Draw(canvas).text((CANVAS // 2, CANVAS // 2), text, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    left, top = (box[0] + box[2] - CANVAS) // 2, (box[1] + box[3] - CANVAS) // 2
    square = canvas.crop((left, top, left + CANVAS, top + CANVAS))
    white = Image.new("RGBA", square.size, "white")
    return Image.alpha_composite(white, square).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def write_emoji(out: Path, size: int = 128, font_path: str = FONT) -> int:
    """Render all emoji into the new folder ``out``, PNG and ``.txt``; returns how many."""
    if not 8 <= size <= 1024:
        raise UsageError(f"--size must be 8 to 1024 pixels, not {size}")
    out = require_new_folder(out, "the emoji")
    if not Path(font_path).is_file():
        raise LdmError(f"font {font_path} does not exist; {INSTALL}")
    try:
        font = ImageFont.truetype(font_path, FONT_SIZE)
    except OSError as error:
        raise LdmError(f"font {font_path} cannot be used ({error}); {INSTALL}") from None
    candidates = list(single_characters())
    if features.check("raqm"):  # without it Pillow draws a sequence as its parts, side by side
        candidates += sequences()
    count = 0
    with atomic_folder(out) as temporary:
        for text, caption in candidates:
            image = draw(text, font, size)
            if image is None:
                continue
            name = "u" + "-".join(f"{ord(character):04x}" for character in text if character != _COLOURED)
            image.save(temporary / f"{name}.png")
            (temporary / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
            count += 1
        if not count:
            raise LdmError(f"font {font_path} draws no emoji; {INSTALL}")
    return count


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels (default 128)")
    parser.add_argument("--font", default=FONT, help=f"the font file (default {FONT})")
    options = parser.parse_args(arguments)
    try:
        count = write_emoji(options.out, options.size, options.font)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not features.check("raqm"):
        print("note: Pillow has no raqm text layout here, so people at work and keycaps are left out", file=sys.stderr)
    print(f"{count} emoji of {options.size} x {options.size} pixels in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
