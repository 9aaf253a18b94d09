import re

import pytest
from PIL import Image

from ldm.cli import main
from ldm.data.buckets import Buckets
from ldm.data.check import index_here
from ldm.data.manifest import Manifest
from ldm.errors import LdmError
from ldm.latents.show_images import show_images
from tests.samples import encoded, write_photographs, write_tar


def text(path):
    return " ".join(re.sub(r"<[^>]*>", " ", path.read_text()).split())


def test_the_page_counts_what_buckets_hold_and_crop(tmp_path):
    """2:1 into 3:2 loses a quarter; 16 px is too small; the grid has the images that lose something."""
    write_photographs(tmp_path / "x", [(96, 64), (64, 96), (64, 64), (120, 60), (16, 16)])
    command = ["shards", "show", str(tmp_path / "x"), "--out", str(tmp_path / "page.html")]
    main([*command, "--buckets", "48", "--bucket-step", "16", "--max-aspect", "1.5"])
    page = text(tmp_path / "page.html")
    table = Buckets((48,), 16, 1.5).table
    assert all(f"{width} × {height}" in page for height, width in table)
    assert "4 images in buckets" in page and "1 too small for every bucket" in page and "16 × 16" in page
    assert (tmp_path / "page.html").read_text().count("data:image/png") == 1 and "Largest crops" in page
    main(command)
    assert "5 images" in text(tmp_path / "page.html") and "Buckets" not in text(tmp_path / "page.html")


def test_what_cannot_be_shown_is_one_line(tmp_path, image_shards):
    write_tar(tmp_path / "x.tar", [("a.png", b"no image"), ("b.png", encoded(Image.new("RGB", (4, 4))))])
    index_here(tmp_path)
    show_images(tmp_path, tmp_path / "page.html", Buckets((32,)))
    assert "1 images cannot be read" in text(tmp_path / "page.html") and "0 images in buckets" in text(tmp_path / "page.html")
    manifest, old = Manifest.load(tmp_path), tmp_path / "old"
    write_photographs(old, [(4, 4)])
    Manifest(manifest.format, Manifest.load(old).shards).save(old)  # of before there were sizes
    for refused, message in (
        (lambda: show_images(tmp_path, tmp_path), "is a folder; give a file"),
        (
            lambda: show_images(old, tmp_path / "p.html"),
            "index",
        ),
    ):
        with pytest.raises(LdmError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)
