"""Cut windows with texture out of the photographs among Debian's wallpapers, to see what a discriminator gains on texture.

    python tools/wallpapers.py OUT [--download DIR] [--size 64]

The photographs are chosen by hand from ``mate-backgrounds`` and ``plasma-workspace-wallpapers`` (GPL-2+), and
``lomiri-wallpapers-16.04`` and ``-20.04`` (CC BY, CC BY-SA, CC0). The packages are installed, or apt-get downloads them into
``DIR``. Each photograph is scaled to a shorter side of 1,080 pixels, if it is larger, and cut into squares of ``--size``
pixels; those without texture, such as skies and blurred backgrounds, are not kept. Writes ``OUT/train`` and, of other
photographs, ``OUT/validation``, ready for ``ldm shards pack --no-captions`` and for ``tools/bench/gan_gain.py``. The same
packages give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from debian import package_root, parser_of, run
from PIL import Image

from ldm.data.decode import decode_image
from ldm.errors import LdmError
from ldm.files import atomic_folder, read_bytes
from ldm.images import MAX_IMAGE_BYTES

BACKGROUNDS = "usr/share/backgrounds"
# package: folder, photographs
PHOTOGRAPHS = {
    "lomiri-wallpapers-16.04": (
        BACKGROUNDS,
        "Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi "
        "friends_by_Aitzol_Berasategi life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
        "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi",
    ),
    "lomiri-wallpapers-20.04": (BACKGROUNDS, "Kleiber_by_Lukas_Baubkus"),
    "mate-backgrounds": (
        f"{BACKGROUNDS}/mate/nature",
        "Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops TwoWings Wood YellowFlower",
    ),
    "plasma-workspace-wallpapers": (
        "usr/share/wallpapers",
        "Autumn BytheWater ColorfulCups EveningGlow FallenLeaf OneStandsOut Path",
    ),
}
HELD_OUT = {"Wine_by_Jakkub_Mede", "life_by_Aitzol_Berasategi", "Dune", "LadyBird", "FallenLeaf"}
SIDE = 1080  # the shorter one of a photograph
# mean difference of neighbouring pixels, of 255 levels of grey: below it a window counts as flat
LEAST_TEXTURE = 4.0


def windows(photograph: Image.Image, size: int) -> Iterator[tuple[str, Image.Image]]:
    """(place, window) of each window with texture, row by row."""
    if (scale := SIDE / min(photograph.size)) < 1:
        width, height = (round(side * scale) for side in photograph.size)
        photograph = photograph.resize((width, height), Image.Resampling.LANCZOS)
    for top in range(0, photograph.height - size + 1, size):
        for left in range(0, photograph.width - size + 1, size):
            window = photograph.crop((left, top, left + size, top + size))
            if texture(window) >= LEAST_TEXTURE:
                yield f"{top:04d}-{left:04d}", window


def texture(window: Image.Image) -> float:
    """The mean difference of neighbouring pixels, in levels of grey."""
    grey = np.asarray(window.convert("L")).astype(float)
    return (np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


def write_windows(out: Path, files: dict[str, Path], size: int) -> Counter[str]:
    """Write the windows of the photographs, by name, into the new folder ``out``; returns how many each part has."""
    counts: Counter[str] = Counter()
    with atomic_folder(out) as temporary:
        for name, file in files.items():
            part = "validation" if name in HELD_OUT else "train"
            (temporary / part).mkdir(exist_ok=True)
            for place, window in windows(decode_image(read_bytes(file, MAX_IMAGE_BYTES)), size):
                window.save(temporary / part / f"{name}-{place}.png")
                counts[part] += 1
    return counts


def build(options: argparse.Namespace) -> str:
    """Write the set; returns a line that says what it is."""
    files = {}
    for package, (folder, names) in PHOTOGRAPHS.items():
        root = package_root(package, folder, options.download) / folder
        for name in names.split():
            found = sorted(file for pattern in (f"{name}.jpg", f"{name}/contents/images/*") for file in root.glob(pattern))
            if not found:
                raise LdmError(f"{root} holds no {name}; another version of {package} may: give --download an empty folder")
            files[name] = found[-1]
    counts = write_windows(options.out, files, options.size)
    parts = ", ".join(f"{counts[part]} in {options.out / part}" for part in ("train", "validation"))
    return f"windows of {options.size} x {options.size} pixels: {parts}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = parser_of(__doc__, 64, "width and height in pixels", megabytes=170)
    return run(build, parser.parse_args(arguments), sizes=(16, 512))


if __name__ == "__main__":
    sys.exit(main())
