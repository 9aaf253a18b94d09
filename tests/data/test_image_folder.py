"""A folder of a few images as training data: its shards, how often each image is drawn, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.data.datamodule import Regularisation, ShardDataModule, WeightedSource
from ldm.data.image_dataset import ImageDataset
from ldm.data.image_folder import open_data, packed_folders
from ldm.data.pack.packer import pack
from ldm.data.sources import ShardCache
from ldm.errors import LdmError


def images(folder: Path, count: int, size: int = 16) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (size, size), (40 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def generated(folder: Path, count: int, size: int = 16) -> Path:
    """What ``ldm sample`` leaves, of two prompts."""
    images(folder, count, size)
    Image.new("RGB", (50, 50)).save(folder / "grid.png")
    listed = {f"{number}.png": {"prompt": ("a dog", "a dog on a beach")[number % 2], "seed": 0} for number in range(count)}
    (folder / "run.json").write_text(json.dumps({"format_version": 1, "model_hash": "0" * 64, "images": listed}))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images, one of which has a caption."""
    folder = images(tmp_path / "photos", 5)
    (folder / "3.txt").write_text("sks dog asleep")
    return folder


def test_a_folder_is_packed_once_with_a_default_caption(photos: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    source = open_data(str(photos), "a photo of sks dog", cache)
    assert source.spec == str(photos) and open_data(str(photos), "a photo of sks dog", cache).manifest == source.manifest
    assert len(packed_folders(cache)) == 1
    pack(photos, tmp_path / "shards", keep_bytes=True, default_caption="a photo of sks dog")
    assert source.manifest.hash == open_data(str(tmp_path / "shards")).manifest.hash
    dataset = ImageDataset(source)
    captions = ["a photo of sks dog"] * 5
    captions[3] = "sks dog asleep"
    assert [dataset[number]["caption"] for number in range(5)] == captions
    (photos / "0.txt").write_text("another")
    changed = ImageDataset(open_data(str(photos), "a photo of sks dog", cache))
    assert changed[0]["caption"] == "another" and len(packed_folders(cache)) == 2
    assert open_data(str(photos), None, cache, read_captions=False).manifest.captioned is False


def test_what_ldm_sample_generated_has_its_prompts_as_captions(tmp_path: Path) -> None:
    folder = generated(tmp_path / "class", 4)
    dataset = ImageDataset(open_data(str(folder), cache=ShardCache(tmp_path / "cache")))
    assert [dataset[number]["caption"] for number in range(len(dataset))] == ["a dog", "a dog on a beach"] * 2  # no grid
    (folder / "2.png").unlink()
    with pytest.raises(LdmError, match=r"1 of 4 images .*2.png: is listed in run.json but has not been generated"):
        open_data(str(folder), cache=ShardCache(tmp_path / "cache"))


def test_regularisation_is_drawn_as_often_as_all_else_and_weighted(photos: Path, tmp_path: Path) -> None:
    prior = Regularisation(str(generated(tmp_path / "class", 4)), loss_weight=0.25)
    repeats = [WeightedSource(str(photos), 4.0)]
    settings: dict[str, Any] = {"default_caption": "sks", "regularisation": prior, "cache": str(tmp_path / "cache")}
    data = ShardDataModule(repeats, str(photos), batch_size=8, **settings)
    data.setup("fit")
    batches = [*islice(data.train_dataloader(), 10)]  # two epochs of 20 + 20 draws; 5 images fill batches of 8 by their weight
    samples = np.concatenate([batch["draws"][:, 0] for batch in batches])
    assert Counter(samples.tolist()) == {number: 8 if number < 5 else 10 for number in range(9)}
    weights = np.concatenate([batch["loss_weight"].numpy() for batch in batches])
    assert (weights == np.where(samples < 5, 1, 0.25)).all() and weights.dtype == np.float32
    plain = ShardDataModule(repeats, str(photos), batch_size=8, default_caption="sks", cache=str(tmp_path / "cache"))
    plain.setup("fit")
    assert "loss_weight" not in next(iter(plain.train_dataloader()))


def test_what_cannot_be_meant_is_refused_in_one_line(
    photos: Path, image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    one = images(tmp_path / "one", 1)
    with_heic = images(tmp_path / "heic", 2)
    (with_heic / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    shards, prior = str(image_shards), Regularisation(str(photos), "a dog", -1)
    cases: tuple[tuple[Path | str, dict[str, Any], str], ...] = (
        (tmp_path / "empty", {}, "empty is empty; give a folder of images"),
        (one, {"default_caption": "sks"}, "one holds 1 image; give 5 to 50"),
        (photos, {}, r"4 of 5 images in .*photos cannot be used \(0.png: no caption: .*; give a caption"),
        (with_heic, {"default_caption": "sks"}, r"1 of 3 images .*IMG_1.HEIC: .*; convert it or move it away"),
        (photos, {"default_caption": " "}, "caption is ' '"),
        (shards, {"default_caption": "sks"}, r"default_caption is 'sks', but .*images holds shards, whose captions are fixed"),
        (shards, {"regularisation": Regularisation(shards, "a dog")}, "caption of the regularisation is 'a dog', but"),
        (shards, {"regularisation": prior}, "loss_weight of the regularisation is -1; give 0 or more"),
        (tmp_path / "nowhere", {"default_caption": "sks"}, "nowhere"),
    )
    for train, settings, said in cases:
        with pytest.raises(LdmError, match=said) as refused:
            ShardDataModule(str(train), str(train), batch_size=2, **settings).setup("fit")
        assert "\n" not in str(refused.value)
    monkeypatch.setattr("ldm.data.image_folder.MAX_IMAGES", 4)
    with pytest.raises(LdmError, match="photos holds 5 images; pack them first: ldm shards pack"):
        open_data(str(photos), "sks")
