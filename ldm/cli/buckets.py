"""Options that describe aspect-ratio buckets."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.cli.parser import Parser
from ldm.errors import UsageError

if TYPE_CHECKING:
    from ldm.data.buckets import Buckets


def add_buckets(parser: Parser) -> None:
    what = "crop and resize each image to the nearest of several shapes with about the area of this square, in pixels; of the "
    what += "largest of several sides (256,512) that the image fills"
    parser.add_argument("--buckets", type=sides, metavar="N[,N]", help=what)
    parser.add_argument("--bucket-step", type=int, metavar="N", help="their sides are multiples of this (default: 32)")
    parser.add_argument("--max-aspect", type=float, metavar="X", help="longer over shorter side, at most (default: 2)")
    what = "enlarge an image by this factor at most, and leave out those that are too small (default: 1)"
    parser.add_argument("--max-upscale", type=float, metavar="X", help=what)
    what = "leave out an image of which more than this share would be cropped off, such as 0.3 (default: crop any)"
    parser.add_argument("--max-crop", type=float, metavar="SHARE", help=what)


def sides(text: str) -> tuple[int, ...]:
    """``256,512`` => the numbers."""
    try:
        return tuple(int(side) for side in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sides in pixels; give 256, or 256,512") from None


def buckets_of(options: argparse.Namespace) -> Buckets | None:
    """The buckets that the options name; None where they name none."""
    from ldm.data.buckets import Buckets

    given = {"step": options.bucket_step, "max_aspect": options.max_aspect, "max_upscale": options.max_upscale}
    given["max_crop"] = options.max_crop
    given = {name: value for name, value in given.items() if value is not None}
    if options.buckets is not None:
        return Buckets(options.buckets, **given)
    if given:
        raise UsageError(
            "--bucket-step, --max-aspect, --max-upscale and --max-crop describe buckets; give --buckets too, for example 256"
        )
    return None
