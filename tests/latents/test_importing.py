"""Latents in the formats of other tools, written here as those write them, come back as they were."""

import errno
import json
import logging
import os
import pickle
import shutil
import zipfile
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file

from ldm.data.check import check_folder
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import LatentShard, latent_info, read_null_text, sample_shapes
from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.moments import Moments
from ldm.data.quarantine import QUARANTINE_NAME
from ldm.data.sources import open_source
from ldm.errors import LdmError, UsageError
from ldm.latents.compute import Dtype
from ldm.latents.external import FilePerImageFolder, LightningDiTFolder, read_class_captions, read_latent
from ldm.latents.importing import import_latents
from ldm.latents.text_encoders import TextEncoders
from ldm.models.autoencoder import autoencoder_hash, load_autoencoder

CHANNELS = 4


@pytest.fixture
def imported(autoencoder, tiny_text_encoder, tmp_path):
    """The function that imports ``src``, and the manifest and images by key that come of it."""

    def run(src, dtype: Dtype = "float32", **options):
        out = tmp_path / "out"
        manifest = import_latents(src, out, autoencoder, tiny_text_encoder, dtype=dtype, device="cpu", **options)
        problems, shards = check_folder(out, deep=True)
        assert not problems and not any(shard.problems for shard in shards)
        return manifest, stored(out)

    return run


def stored(folder):
    """Key -> everything that is stored of the image."""
    images = {}
    for entry in Manifest.load(folder).shards:
        shard = LatentShard(folder / entry.name, entry.samples)
        for chunk in range(len(shard.spans)):
            tensors, words = shard.tensors(chunk), shard.metadata(chunk)
            for row, (key, captions) in enumerate(zip(words["keys"], words["captions"], strict=True)):
                starts = tensors["text_start"][tensors["caption_start"][row] : tensors["caption_start"][row + 1] + 1]
                image = {
                    name: np.array(tensors[name][row])
                    for name in ("mean", "std", "mean_flip", "std_flip", "original_size", "crop")
                    if name in tensors
                }
                texts = [np.array(tensors["text"][a:b]) for a, b in pairwise(starts)]
                images[key] = image | {"captions": captions, "texts": texts}
    return images


def drawn(count, channels=CHANNELS, height=4, width=4, seed=0):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def write_lightning(folder, counts=(3, 4), flips=True, labels=None, dtype=torch.float32):
    """As extract_features.py of LightningDiT does; returns all latents, mirrored ones and labels."""
    folder.mkdir()
    total = sum(counts)
    latents, mirrored = drawn(total).to(dtype), drawn(total, seed=1).to(dtype)
    labels = torch.arange(total) % 3 if labels is None else torch.tensor(labels)
    start = 0
    for rank, count in enumerate(counts):
        part = slice(start, start + count)
        tensors = {"latents": latents[part].clone(), "labels": labels[part].clone()}
        tensors |= {"latents_flip": mirrored[part].clone()} if flips else {}
        save_file(tensors, folder / f"latents_rank{rank:02d}_shard000.safetensors", metadata={"total_size": str(count)})
        start += count
    torch.save({"mean": latents.mean((0, 2, 3)), "std": latents.std((0, 2, 3))}, folder / "latents_stats.pt")
    return latents, mirrored, labels


def write_files(folder, latents, suffix=".npy", captions=True):
    folder.mkdir(exist_ok=True)
    for number, latent in enumerate(latents):
        path = folder / f"{number // 50}" / f"{number:04d}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".npy":
            np.save(path, latent.numpy())
        else:
            torch.save(latent, path)
        if captions:
            path.with_suffix(".txt").write_text(f"image {number} — é\n", "utf-8")
    return folder


def key(number):
    return f"{number // 50}/{number:04d}"


@pytest.fixture
def classes(tmp_path):
    (tmp_path / "classes.txt").write_text("a tench\na goldfish\na shark\n")
    return tmp_path / "classes.txt"


def test_what_lightningdit_writes_comes_back_to_the_bit(imported, classes, tmp_path, tiny_text_encoder, autoencoder):
    latents, mirrored, labels = write_lightning(tmp_path / "src")
    seen = []
    manifest, images = imported(tmp_path / "src", captions=classes, samples_per_shard=3, on_progress=lambda *a: seen.append(a))
    keys = [f"latents_rank{rank:02d}_shard000/{row:06d}" for rank, count in enumerate((3, 4)) for row in range(count)]
    assert list(images) == keys and seen == [(done, 7) for done in range(1, 8)]
    for number, image in enumerate(images.values()):
        assert np.array_equal(image["mean"], latents[number]) and np.array_equal(image["mean_flip"], mirrored[number])
        assert image["captions"] == [("a tench", "a goldfish", "a shark")[labels[number]]]
        assert image["original_size"].tolist() == [8, 8] and image["crop"].tolist() == [0, 0, 8, 8]
    assert [entry.samples for entry in manifest.shards] == [3, 3, 1]
    info = latent_info(open_source(tmp_path / "out", LATENT_SHARDS))
    assert info.autoencoder == autoencoder_hash(load_autoencoder(autoencoder))
    assert (info.posterior, info.flips, info.captions, info.latent_shapes) == ("mode", True, "first", ((4, 4, 4),))
    assert (info.resolution, info.dtype, info.source_shards) == (8, "float32", "../src")
    whole = Moments.of(latents.numpy())
    np.testing.assert_allclose(info.latents_mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(info.latents_std, whole.std, rtol=1e-12)
    # captions go through the code that an export sends them through
    encoders = TextEncoders.load([tiny_text_encoder], "cpu", "float32", "fp32")
    tench = encoders.lookup(["a tench"])[0]["a tench"].text
    np.testing.assert_allclose(images[keys[0]]["texts"][0], tench, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(read_null_text(open_source(tmp_path / "out")), encoders.null()[0])


def test_without_mirrored_latents_and_in_bfloat16(imported, tmp_path):
    latents, _, _ = write_lightning(tmp_path / "src", flips=False, dtype=torch.bfloat16)
    (tmp_path / "classes.json").write_text('{"0": "zero", "1": "one", "2": "two"}')
    _, images = imported(tmp_path / "src", captions=tmp_path / "classes.json")
    assert np.array_equal([image["mean"] for image in images.values()], latents.float())
    assert not any("mean_flip" in image for image in images.values())
    assert [image["captions"][0] for image in images.values()] == ["zero", "one", "two"] * 2 + ["zero"]


def test_class_captions_are_a_line_or_an_entry_for_each_class(tmp_path):
    for name, content in (
        ("a.txt", "zero\none\n"),
        ("b.json", '["zero", "one"]'),
        ("c.json", '{"1": "one", "0": "zero"}'),
    ):
        (tmp_path / name).write_text(content)
        assert read_class_captions(tmp_path / name) == {0: "zero", 1: "one"}
    for name, content in (("d.json", '[["n01440764", "tench"]]'), ("e.json", '{"tench": "0"}'), ("f.json", "{")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=rf"{name} .*caption of class i"):
            read_class_captions(tmp_path / name)


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("axis", [True, False])
def test_a_file_for_each_image_comes_back_to_the_bit(imported, tmp_path, suffix, axis):
    latents = drawn(5)
    write_files(tmp_path / "src", latents[:, None] if axis else latents, suffix)
    manifest, images = imported(tmp_path / "src")
    assert manifest.samples == 5 and manifest.extra["quarantined"] == 0
    for number, latent in enumerate(latents):
        assert np.array_equal(images[key(number)]["mean"], latent)
        assert images[key(number)]["captions"] == [f"image {number} — é"]
    assert latent_info(open_source(tmp_path / "out", LATENT_SHARDS)).posterior == "mode"


def test_moments_are_what_diffusers_makes_of_them(imported, tmp_path):
    """Log-variances, also those that it clamps."""
    moments = drawn(5, 2 * CHANNELS)
    moments[:, CHANNELS:] = moments[:, CHANNELS:] * 10 - 20
    _, images = imported(write_files(tmp_path / "src", moments))
    for number, parameters in enumerate(moments):
        posterior = DiagonalGaussianDistribution(parameters[None])
        assert np.array_equal(images[key(number)]["mean"], posterior.mean[0])
        assert np.array_equal(images[key(number)]["std"], posterior.std[0])
    assert latent_info(open_source(tmp_path / "out", LATENT_SHARDS)).posterior == "gaussian"


def test_standard_deviations_are_told_from_log_variances(imported, tmp_path):
    """PixArt-alpha and REPA store means and standard deviations, which are nowhere negative."""
    both = drawn(5, 2 * CHANNELS)
    both[:, CHANNELS:] = both[:, CHANNELS:].abs() / 100
    _, images = imported(write_files(tmp_path / "src", both))
    for number, (mean, std) in enumerate(zip(*both.chunk(2, 1), strict=True)):
        assert np.array_equal(images[key(number)]["mean"], mean) and np.array_equal(images[key(number)]["std"], std)


@pytest.mark.parametrize("name", ["latent", "latents", "moments"])
@pytest.mark.parametrize("flip", ["_flip", "_flipped"])
def test_dicts_with_the_usual_names(imported, tmp_path, name, flip):
    channels = 2 * CHANNELS if name == "moments" else CHANNELS
    latents, mirrored = drawn(3, channels) - 5, drawn(3, channels, seed=1) - 5
    dicts = [{name: a, name + flip: b[None], "label": 7} for a, b in zip(latents, mirrored, strict=True)]
    _, images = imported(write_files(tmp_path / "src", dicts, ".pt"))
    for number in range(3):
        image = images[key(number)]
        assert np.array_equal(image["mean"], latents[number][:CHANNELS])
        assert np.array_equal(image["mean_flip"], mirrored[number][:CHANNELS])
        assert ("std" in image, "std_flip" in image) == (name == "moments",) * 2


@pytest.mark.parametrize("kind", ["factor", "factor and shift", "statistics"])
def test_scaling_is_undone(autoencoder, imported, tmp_path, kind):
    mean, std = torch.zeros(1), torch.tensor([1 / 0.18215])
    config = {"scaling_factor": 0.18215}
    if kind == "factor and shift":
        config["shift_factor"], mean = 0.6, torch.tensor([0.6])
    if kind == "statistics":
        mean, std = torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([2.0, 4.0, 5.0, 0.5])
        config = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    path = autoencoder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    latents, spread = drawn(4), drawn(4, seed=1).abs()
    scaled = torch.cat([(latents - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), spread / std.view(-1, 1, 1)], 1)
    _, images = imported(write_files(tmp_path / "src", scaled), scaled=True)
    for number in range(4):
        np.testing.assert_allclose(images[key(number)]["mean"], latents[number], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(images[key(number)]["std"], spread[number], rtol=1e-6, atol=1e-6)


def test_scaling_that_the_autoencoder_does_not_know_is_refused(imported, tmp_path):
    with pytest.raises(UsageError, match=r"scaled has no effect: the config of .*autoencoder has no scaling factor"):
        imported(write_files(tmp_path / "src", drawn(2)), scaled=True)


@pytest.mark.parametrize(("are_scaled", "said"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_wrong_scale_is_told(autoencoder, imported, tmp_path, caplog, are_scaled, said):
    path = autoencoder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.18215}))
    latents = drawn(6) / 3  # mean 1/3, standard deviation 1
    with caplog.at_level(logging.WARNING):
        imported(write_files(tmp_path / "src", latents if are_scaled else latents / 0.18215), scaled=said)
    told = [record.getMessage() for record in caplog.records if "root mean square" in record.getMessage()]
    if are_scaled == said:
        assert not told
    else:
        (line,) = told
        assert (", set scaled" if are_scaled else ", do not set scaled") in line and "\n" not in line
        assert str(tmp_path / "src") in line and "5.49" in line


def test_several_sizes_are_a_chunk_each(imported, tmp_path):
    wide, tall = drawn(3, height=2, width=6), drawn(2, height=4, width=2)
    latents = [wide[0], tall[0], wide[1], tall[1], wide[2]]
    manifest, images = imported(write_files(tmp_path / "src", latents))
    for number, latent in enumerate(latents):
        image = images[key(number)]
        assert np.array_equal(image["mean"], latent)
        assert image["original_size"].tolist() == [2 * side for side in latent.shape[1:]]
    assert manifest.samples == 5
    source = open_source(tmp_path / "out", LATENT_SHARDS)
    info = latent_info(source)
    assert info.latent_shapes == ((4, 2, 6), (4, 4, 2)) and info.resolution is None
    dataset, numbers = LatentDataset(source), sample_shapes([source])
    assert numbers is not None
    assert [info.latent_shapes[number] for number in numbers] == [dataset[row]["mean"].shape for row in range(5)]


def test_malformed_rows_of_a_table_are_named_with_their_reason(tmp_path):
    write_files(tmp_path, drawn(3), captions=False)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npy"))
    (tmp_path / "t.csv").write_text(f'file,caption\n{names[0]},"red\n{names[1]},blue"\n{names[2]},one,two\n')
    found = [str(image) for image in FilePerImageFolder(tmp_path, CHANNELS, tmp_path / "t.csv").images()]
    assert f"line 2 has a quote that is not closed before line 3, the row of {names[1]}" in found[0]
    assert "line 3 has a quote without its partner" in found[1]
    assert "line 4 has 3 cells" in found[2]


def test_captions_from_a_table(imported, tmp_path):
    write_files(tmp_path / "src", drawn(3), captions=False)
    rows = [{"file": f"{key(2)}.npy", "caption": ["two", "zwei"]}, {"file": f"{key(0)}.npy", "caption": "zero"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest, images = imported(tmp_path / "src", captions=tmp_path / "captions.jsonl")
    assert {name: image["captions"] for name, image in images.items()} == {key(2): ["two", "zwei"], key(0): ["zero"]}
    assert [len(image["texts"]) for image in images.values()] == [2, 1]
    assert manifest.samples == 2 and latent_info(open_source(tmp_path / "out", LATENT_SHARDS)).captions == "all"


class Hostile:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_does_not_run(tmp_path):
    trap = tmp_path / "trap"
    for number, kwargs in enumerate(({}, {"_use_new_zipfile_serialization": False})):
        torch.save({"latent": drawn(1)[0], "more": Hostile(trap)}, tmp_path / f"{number}.pt", **kwargs)
        with pytest.raises(LdmError, match=r"holds more than tensors \(needs posix.mkdir\), which was not run"):
            read_latent(tmp_path / f"{number}.pt")
    np.save(tmp_path / "array.npy", np.array([Hostile(trap)], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Hostile(trap)))
    for name in ("array", "pickle"):
        with pytest.raises(LdmError, match="cannot be read"):
            read_latent(tmp_path / f"{name}.npy")
    assert not trap.exists()


def test_files_that_unpack_to_more_than_they_should_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.latents.external.MAX_FILE_BYTES", 2**20)
    torch.save(torch.zeros(2**19), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 2**14
    for name, reason in (("a", "is larger than"), ("b", "unpacks to 2")):
        with pytest.raises(LdmError, match=f"^{reason}.* limit (is|of) 1048576"):
            read_latent(tmp_path / f"{name}.pt")


BAD = {
    "empty.npy": lambda path: path.write_bytes(b""),
    "cut.npy": lambda path: path.write_bytes(whole_npy()[:-7]),
    "words.npy": lambda path: np.save(path, np.array(["a", "b"])),
    "cut.pt": lambda path: path.write_bytes(b"PK\3\4 and then nothing"),
    "names.pt": lambda path: torch.save({"z": drawn(1)[0]}, path),
    "list.pt": lambda path: torch.save([1, 2], path),
    "whole numbers.pt": lambda path: torch.save(torch.ones(CHANNELS, 4, 4, dtype=torch.int64), path),
    "channels.npy": lambda path: np.save(path, drawn(1, 3)[0].numpy()),
    "shape.npy": lambda path: np.save(path, drawn(2).numpy()),
    "moments.npy": lambda path: np.save(path, drawn(1, 2 * CHANNELS)[0].numpy()),
    "mirrored.pt": lambda path: torch.save({"latent": drawn(1)[0], "latent_flip": drawn(1)[0]}, path),
    "nan.npy": lambda path: np.save(path, np.full((CHANNELS, 4, 4), np.nan, np.float32)),
    "view.pt": lambda path: torch.save(torch.ones(1).expand(CHANNELS, 2**15, 2**15), path),
    "hostile.pt": lambda path: torch.save(Hostile(path.parent / "trap"), path),
}


def whole_npy():

    np.save(file := BytesIO(), drawn(1)[0].numpy())
    return file.getvalue()


def test_what_cannot_be_used_is_put_on_record_and_counted(imported, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.latents.importing.MAX_BAD_SHARE", 0.5)
    src = write_files(tmp_path / "src", drawn(16))
    for name, write in BAD.items():
        write(src / name)
        (src / name).with_suffix(".txt").write_text("a caption")
    np.save(src / "no caption.npy", drawn(1)[0].numpy())
    os.mkfifo(src / "pipe.npy")
    (src / "pipe.txt").write_text("a caption")
    manifest, images = imported(src)
    lines = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE_NAME).read_text("utf-8").splitlines()]
    assert sorted(line["key"] for line in lines) == sorted([*BAD, "no caption.npy", "pipe.npy"])
    assert {line["shard"] for line in lines} == {str(src)} and all(line["reason"] for line in lines)
    assert manifest.extra["quarantined"] == len(lines) == len(BAD) + 2
    assert manifest.samples == len(images) == 16 and set(images) == {key(number) for number in range(16)}
    assert not (src / "trap").exists()
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons["channels.npy"] == "has 3 channels, the autoencoder 4"
    assert reasons["names.pt"] == "holds none of moments, latents, latent (found: z)"
    assert reasons["moments.npy"] == "has 8 channels, unlike the others"
    assert reasons["mirrored.pt"] == "has a mirrored latent, unlike the others"
    assert reasons["nan.npy"] == "is not finite"
    assert reasons["pipe.npy"] == "is a named pipe; give a regular file"
    assert reasons["no caption.npy"].startswith("has no caption: no .txt of the same name beside it")


def test_more_than_one_in_a_hundred_ends_it_and_leaves_nothing(imported, tmp_path):
    src = write_files(tmp_path / "src", drawn(99))
    np.save(src / "z.npy", np.zeros(3))
    (src / "z.txt").write_text("a caption")
    manifest, _ = imported(src)
    assert (manifest.samples, manifest.extra["quarantined"]) == (99, 1)
    (src / key(7)).with_suffix(".txt").unlink()

    shutil.rmtree(tmp_path / "out")
    with pytest.raises(LdmError) as error:
        imported(src)
    assert str(error.value) == (
        f"2 of 100 latents cannot be used, more than 1%, the last one {src}: z.npy has shape [3], a latent has (C, h, w); "
        "repair or remove them and import again"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "src"]


def test_a_label_without_a_caption_is_put_on_record(imported, classes, tmp_path):
    write_lightning(tmp_path / "src", (100, 100), labels=[0] * 150 + [3] + [1] * 49)
    manifest, images = imported(tmp_path / "src", captions=classes)
    assert (manifest.samples, manifest.extra["quarantined"], len(images)) == (199, 1, 199)
    (line,) = (tmp_path / "out" / QUARANTINE_NAME).read_text().splitlines()
    assert json.loads(line) == {
        "shard": str(tmp_path / "src"),
        "key": "latents_rank01_shard000.safetensors#50",
        "reason": f"has label 3, for which {classes} holds no caption",
    }


def test_a_broken_file_of_many_latents_stops_before_anything_is_written(imported, classes, tmp_path):
    write_lightning(tmp_path / "src")
    with pytest.raises(UsageError, match=r"src holds class labels, not captions; give captions"):
        imported(tmp_path / "src")
    path = tmp_path / "src" / "latents_rank01_shard000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(LdmError, match=rf"{path} cannot be read .*; restore it"):
        imported(tmp_path / "src", captions=classes)
    save_file({"latents": drawn(2), "label": torch.zeros(2)}, path)
    with pytest.raises(UsageError, match=r"lacks labels \(found: label, latents\)"):
        imported(tmp_path / "src", captions=classes)
    save_file({"latents": drawn(2, 5), "labels": torch.zeros(2, dtype=torch.int64)}, path)
    with pytest.raises(UsageError, match="has latents of 5 channels, the autoencoder 4"):
        imported(tmp_path / "src", captions=classes)
    save_file({"latents": drawn(2), "labels": torch.zeros(3, dtype=torch.int64)}, path)
    with pytest.raises(UsageError, match="do not match"):
        imported(tmp_path / "src", captions=classes)
    assert not (tmp_path / "out").exists()


def test_every_so_many_images_are_those_of_the_whole_set(classes, tmp_path):
    write_lightning(tmp_path / "a", (4, 3, 1, 5))
    write_files(tmp_path / "b", drawn(13))
    for source in (
        LightningDiTFolder(tmp_path / "a", CHANNELS, sorted((tmp_path / "a").glob("*.safetensors")), classes),
        FilePerImageFolder(tmp_path / "b", CHANNELS, None),
    ):
        keys = [image.key for image in source.images()]
        assert len(set(keys)) == source.found == 13
        for step in (2, 3, 5, 20):
            assert [image.key for image in source.images(step)] == keys[::step]


@pytest.mark.parametrize("size", [600, 0])
def test_a_file_of_many_latents_that_is_cut_meanwhile_is_named(classes, tmp_path, size):
    """Mapped into memory, it would end the process."""
    write_lightning(tmp_path / "a")
    (path, _) = paths = sorted((tmp_path / "a").glob("*.safetensors"))
    source = LightningDiTFolder(tmp_path / "a", CHANNELS, paths, classes)
    images = source.images()
    next(images)
    os.truncate(path, size)
    with pytest.raises(LdmError, match=f"^{path} changed while it was read .*; restore it"):
        list(images)


def test_pipes_in_the_place_of_latents_do_not_block(imported, classes, tmp_path):
    write_lightning(tmp_path / "a")
    os.mkfifo(tmp_path / "a" / "z.safetensors")
    with pytest.raises(LdmError, match=r"z.safetensors is a named pipe"):
        imported(tmp_path / "a", captions=classes)
    os.mkfifo(tmp_path / "classes.json")
    with pytest.raises(UsageError, match=r"classes.json"):
        read_class_captions(tmp_path / "classes.json")


def test_a_folder_that_grows_meanwhile_is_told(imported, tmp_path):
    write_files(tmp_path / "src", drawn(101))

    def grow(done, total):
        shutil.copy(tmp_path / "src" / f"{key(0)}.npy", tmp_path / "src" / "2" / "more.npy")

    with pytest.raises(LdmError, match=r"src changed while it was read \(101 latents, then 102\); import again"):
        imported(tmp_path / "src", on_progress=grow)
    assert not (tmp_path / "out").exists()


def test_too_large_for_half_precision_is_told(imported, tmp_path):
    latents = drawn(3) * 1e5
    with pytest.raises(LdmError, match=r"does not fit float16; use float32"):
        imported(write_files(tmp_path / "src", latents), dtype="float16")
    _, images = imported(tmp_path / "src")
    assert len(images) == 3


def test_folders_that_do_not_serve_are_named(imported, tmp_path):
    (tmp_path / "src").mkdir()
    with pytest.raises(UsageError, match=r"src holds neither \*.safetensors nor .npy or .pt"):
        imported(tmp_path / "src")
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        imported(tmp_path / "nowhere")
    np.save(tmp_path / "src" / "a.npy", drawn(1)[0].numpy())
    with pytest.raises(UsageError, match=r"no latent in .*src can be used; the first: .*a.npy has no caption"):
        imported(tmp_path / "src")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work").write_text("")
    with pytest.raises(UsageError, match="already holds other work"):
        imported(tmp_path / "src")


def test_a_full_disk_is_told_and_leaves_nothing(imported, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LdmError, match=r"out cannot be written \(No space left on device\); fix that and import again"):
        imported(write_files(tmp_path / "src", drawn(2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder", "src"]


def test_the_source_is_known_by_its_content(imported, tmp_path):

    def source(latents):
        for folder in ("src", "out"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
        imported(write_files(tmp_path / "src", latents))
        return latent_info(open_source(tmp_path / "out", LATENT_SHARDS)).source

    latents = drawn(3)
    first = source(latents)
    assert source(latents) == first and len(first) == 64
    latents[1, 0, 0, 0] += 1
    assert source(latents) != first
