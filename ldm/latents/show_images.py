"""An HTML page about image shards: the images' sizes, and what buckets would make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.buckets import TOO_SMALL, Buckets, crop_box, cropped_share, enlargement
from ldm.data.image_dataset import ImageDataset
from ldm.data.image_sizes import image_sizes
from ldm.data.manifest import IMAGE_SHARDS
from ldm.data.quarantine import BadSample
from ldm.data.sources import open_source
from ldm.errors import LdmError, UsageError
from ldm.files import require_output_file
from ldm.reporting.grids import captioned_grid
from ldm.reporting.pages import Report
from ldm.reporting.sizes import add_buckets, add_sizes, marked_crop, worst
from ldm.terminal import printable

# images in a row; their side in pixels; images in all
COLUMNS, CELL = 6, 112
SHOWN = 3 * COLUMNS
# images that fit no bucket
NAMED = 20


def show_images(folder: str | Path, out: str | Path, buckets: Buckets | None = None) -> None:
    """Write a self-contained page about a set of image shards.

    Sizes are those that the manifest's writer counted; only images that are shown are read.

    Args:
        folder: of image shards.
        out: the page to write, an ``.html`` file.
        buckets: also show how many images each holds, what is cropped off, the images that lose most and those that fit none.

    Raises:
        UsageError: for shards of before there were sizes.
    """
    if Path(out).is_dir():
        raise UsageError(f"{out} is a folder; give a file, for example {Path(out) / 'report.html'}")
    require_output_file(out, [folder])
    source = open_source(folder, IMAGE_SHARDS)
    sizes = image_sizes(source)
    known = sizes.min(1) > 0
    if not known.any():
        raise LdmError(f"{source.spec} holds no image that can be read; `ldm shards check --deep` names what is wrong")
    report, manifest = Report("Images", source.spec), source.manifest
    captioned = manifest.extra.get("captioned")
    counts = {"images": manifest.samples, "shards": len(manifest.shards), "MB in total": manifest.bytes / 1e6}
    counts["sizes"] = len(np.unique(sizes[known], axis=0))
    report.metrics(counts if captioned is None else counts | {"with a caption": captioned})
    if not known.all():
        report.text("", f"{(~known).sum():,} images cannot be read and are not counted below.")
    add_sizes(report, sizes[known])
    if buckets is not None:
        _buckets(report, ImageDataset(source, require_captions=False, read_captions=False), sizes, buckets)
    report.save(out)


def _buckets(report: Report, dataset: ImageDataset, sizes: np.ndarray, buckets: Buckets) -> None:
    """What the buckets make of images of these ``sizes`` (N, 2), of which some may be unknown."""
    which = buckets.assign(sizes)
    fits, known = which >= 0, sizes.min(1) > 0
    unfit = TOO_SMALL if buckets.max_crop is None else f"{TOO_SMALL}, or cropped too much"
    pairs = zip(sizes[fits].tolist(), which[fits].tolist(), strict=True)
    assigned = [(height, width, buckets.table[number]) for (height, width), number in pairs]
    cropped = np.zeros(len(sizes))
    cropped[fits] = [cropped_share(*each) for each in assigned]
    enlarged = sum(enlargement(*each) > 1 for each in assigned)
    report.metrics(
        {
            "images in buckets": int(fits.sum()),
            "of these enlarged": enlarged,
            unfit: int((known & ~fits).sum()),
            "% cropped off on average": round(100 * float(cropped[fits].mean()), 2) if fits.any() else float("nan"),
        }
    )
    names = [f"{width} × {height}" for height, width in buckets.table]
    add_buckets(report, "Buckets", names, which[known], cropped[known])
    marked, captions = [], []
    for row in worst(cropped, SHOWN):
        sample, size = dataset.attempt(row), buckets.table[which[row]]
        if not isinstance(sample, BadSample):
            image = Image.fromarray(sample["image"].transpose(1, 2, 0))
            marked.append(marked_crop(image, crop_box(image.height, image.width, size)))
            captions.append(f"{sample['key']}: {cropped[row]:.0%}, {image.width} x {image.height} to {size[1]} x {size[0]}")
    if marked:
        note = "The images of which most is cropped off; the frame is what is kept."
        report.image("Largest crops", captioned_grid(marked, captions, columns=COLUMNS, cell=CELL), note)
    small = np.flatnonzero(known & ~fits)
    if len(small):
        order = small[np.argsort(sizes[small].prod(1), kind="stable")][:NAMED]
        rows = [(printable(dataset.name_of(row)[1]), f"{sizes[row][1]} × {sizes[row][0]}") for row in order.tolist()]
        report.table(unfit.capitalize() + ", the smallest" * (len(small) > NAMED), ("image", "size"), rows)
