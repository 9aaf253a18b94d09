"""Metrics of an autoencoder: each image counts once whatever it is batched with; two autoencoders are shown side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.cli import main
from ldm.data.image_dataset import ImageDataset
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.writer import ShardWriter, encode_png, write_images
from ldm.errors import LdmError, UsageError
from ldm.evaluation.metrics import LatentHealth, ReconstructionFID
from ldm.evaluation.reconstruction import metric_texts, reconstruction_metrics, trim
from ldm.losses.perceptual import PerceptualLoss
from ldm.models.autoencoder import AutoencoderConfig, autoencoder_hash, pixels_to_images, reconstruct
from ldm.shapes.scenes import generate


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLoss:
    return PerceptualLoss("alex", "random")


@pytest.fixture(scope="module")
def fid() -> ReconstructionFID:
    return ReconstructionFID("alex-random")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 32, 35 and 48 x 41 pixels in turn."""
    folder = tmp_path_factory.mktemp("mixed") / "shards"
    drawn = [[image for _, image, _ in generate(4, size, seed=0)] for size in (32, 35, 48)]
    images = [image for turn in zip(drawn[0], drawn[1], (big[:41] for big in drawn[2]), strict=True) for image in turn]
    write_images(folder, "x", ((f"{number:03d}", image, "") for number, image in enumerate(images)))
    return folder


def test_metrics_do_not_depend_on_the_batch(tiny_autoencoder, image_shards, perceptual, fid) -> None:
    dataset, health = ImageDataset(image_shards), LatentHealth(4)
    one, four = (reconstruction_metrics(tiny_autoencoder, dataset, perceptual, 10, size, None, fid, health) for size in (1, 4))
    assert one.keys() == four.keys() >= {"psnr", "ssim", "lpips", "rfid_alex_random", "latent_kl", "latent_dead"}
    for name in one:
        assert one[name] == pytest.approx(four[name], rel=1e-3, abs=1e-5), name
    # and are the means over images
    images = pixels_to_images(dataset.batch(range(10))["image"])
    with torch.no_grad():
        again = reconstruct(tiny_autoencoder, images)
        lpips = [perceptual(a[None], b[None]).item() for a, b in zip(again, images, strict=True)]
        health.reset()
        health.update(tiny_autoencoder.encode(images).latent_dist)
    fid.reset()
    fid.update(images, real=True)
    fid.update(again, real=False)
    assert one["rfid_alex_random"] == pytest.approx(fid.compute().item(), rel=1e-3) and fid.compute() > 0.01
    assert one["samples"] == 10 and one["lpips"] == pytest.approx(np.mean(lpips))
    assert one["psnr"] == pytest.approx(np.mean((10 * torch.log10(4 / (again - images).square().mean((1, 2, 3)))).numpy()))
    assert one["latent_std"] == pytest.approx(health.compute()["std"].tolist())
    assert one["latent_dead"] == int(health.compute()["dead"])


def test_only_what_is_asked_for_is_measured_and_progress_said(tiny_autoencoder, image_shards) -> None:
    said = []
    metrics = reconstruction_metrics(
        tiny_autoencoder, ImageDataset(image_shards), samples=5, batch_size=2, on_progress=lambda *done: said.append(done)
    )
    assert metrics.keys() == {"samples", "psnr", "ssim"} and metrics["samples"] == 5
    assert said == [(2, 5), (4, 5), (5, 5)]


def test_whole_images_of_several_sizes(tiny_autoencoder, mixed, perceptual, fid) -> None:
    """Cut to multiples of 2, batched or not."""
    dataset, health = ImageDataset(mixed), LatentHealth(4)
    one, all_at_once = (
        reconstruction_metrics(tiny_autoencoder, dataset, perceptual, 12, size, None, fid, health) for size in (1, 12)
    )
    for name in one:
        assert one[name] == pytest.approx(all_at_once[name], rel=1e-3, abs=1e-5), name
    expected = []
    for index in range(12):
        images = pixels_to_images(torch.from_numpy(dataset[index]["image"].copy())[None])
        images = images[..., : (32, 34, 40)[index % 3], : (32, 34, 48)[index % 3]]
        with torch.no_grad():
            expected.append(peak_signal_noise_ratio(reconstruct(tiny_autoencoder, images), images, data_range=(-1.0, 1.0)))
    assert one["psnr"] == pytest.approx(np.mean(expected))


def test_what_it_measured_with_serves_in_training_afterwards(tiny_autoencoder, image_shards, perceptual, fid) -> None:
    health = LatentHealth(4)
    reconstruction_metrics(tiny_autoencoder, ImageDataset(image_shards), perceptual, 4, fid=fid, health=health)
    images = torch.zeros(2, 3, 32, 32)
    health.update(tiny_autoencoder.encode(images).latent_dist)
    fid.update(images, real=True)
    reconstruction = reconstruct(tiny_autoencoder, images).detach().requires_grad_()
    perceptual(reconstruction, images).backward()
    assert reconstruction.grad is not None and reconstruction.grad.isfinite().all()


def test_a_sample_that_cannot_be_used_is_left_out_and_nothing_counts_for_it(tiny_autoencoder, tmp_path, caplog) -> None:
    tmp_path.joinpath("x").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (101, 16, 16, 3), np.uint8)
    files = [encode_png(Image.fromarray(image)) for image in pixels]
    with ShardWriter(tmp_path / "x", "x") as writer:
        for number, png in enumerate(files):
            writer.write(f"{number:03d}", {"png": b"none" if number == 7 else png})
    Manifest(IMAGE_SHARDS, tuple(writer.entries)).save(tmp_path / "x")
    dataset = ImageDataset(tmp_path / "x")
    metrics = reconstruction_metrics(tiny_autoencoder, dataset, samples=101)
    images = pixels_to_images(torch.from_numpy(np.delete(pixels, 7, 0)).permute(0, 3, 1, 2))
    with torch.no_grad():
        error = (reconstruct(tiny_autoencoder, images) - images).square().mean((1, 2, 3))
    assert metrics["samples"] == 100 and metrics["psnr"] == pytest.approx(float((10 * torch.log10(4 / error)).mean()))
    assert "007" in caplog.text
    with pytest.raises(LdmError, match="1 of 20 samples cannot be used"):
        reconstruction_metrics(tiny_autoencoder, dataset, samples=20)


def test_trim_cuts_to_multiples_and_no_further() -> None:
    images = torch.arange(2 * 3 * 19 * 33.0).view(2, 3, 19, 33)
    assert torch.equal(trim(images, 8), images[..., :16, :32])
    assert torch.equal(trim(trim(images, 8), 8), trim(images, 8)) and torch.equal(trim(images, 1), images)
    with pytest.raises(UsageError, match="33 x 19 cannot be shrunk by the autoencoder's factor 32"):
        trim(images, 32)


def test_a_table_shows_the_least_and_the_greatest_of_a_value_per_channel() -> None:
    metrics = {"samples": 10, "psnr": 23.4567, "latent_std": [0.5, 2.0, 1.25], "latent_mean": [0.5, 0.5], "latent_dead": 0}
    shown = {"samples": "10", "psnr": "23.46", "latent_std": "0.5 .. 2", "latent_mean": "0.5", "latent_dead": "0"}
    assert metric_texts(metrics) == shown


class TestCommand:
    @pytest.fixture
    def directories(self, tmp_path: Path) -> list[Path]:
        torch.manual_seed(0)
        for name, widths in (("first", [8, 16]), ("second", [8, 16, 16])):
            AutoencoderConfig(widths, 4, 1, 4, False, 32).build().save_pretrained(tmp_path / name)
        return [tmp_path / "first", tmp_path / "second"]

    def test_two_autoencoders_side_by_side_as_table_and_json(
        self, directories: list[Path], mixed: Path, tmp_path: Path, capsys, monkeypatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "300")
        command = ["evaluate", "autoencoder", *map(str, directories), "--shards", str(mixed), "--fid", "alex-random"]
        main([*command, "--samples", "7", "--json", str(tmp_path / "metrics.json")])
        table = capsys.readouterr().out
        record = json.loads((tmp_path / "metrics.json").read_text())
        assert record["shards"] == str(mixed) and record["shards_hash"] == Manifest.load(mixed).hash
        assert record["metrics"] == {"lpips": "LPIPS (alex, random trunk)", "rfid_alex_random": "rFID (alex, random weights)"}
        rows = {cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in map(split, table.splitlines()) if cells}
        assert rows["metric"] == [str(folder) for folder in directories]
        for column, (folder, found) in enumerate(zip(directories, record["autoencoders"], strict=True)):
            assert found["path"] == str(folder) and found["samples"] == 7
            assert found["hash"] == autoencoder_hash(AutoencoderKL.from_pretrained(folder))
            assert all(len(found[f"latent_{name}"]) == 4 for name in ("mean", "std", "kl", "kurtosis", "high_frequency"))
            for label, value in {
                "PSNR (dB)": found["psnr"],
                "SSIM": found["ssim"],
                "LPIPS (alex, random trunk)": found["lpips"],
                "rFID (alex, random weights)": found["rfid_alex_random"],
                "dead channels": found["latent_dead"],
            }.items():
                assert float(rows[label][column]) == pytest.approx(value, rel=1e-3)
            low, high = map(float, rows["latent std"][column].split(" .. "))
            assert (low, high) == pytest.approx((min(found["latent_std"]), max(found["latent_std"])), rel=1e-3)
        first, second = record["autoencoders"]
        assert first["hash"] != second["hash"] and first["psnr"] != second["psnr"]
        # alone, and to stdout: the same metrics and nothing else
        main(["evaluate", "autoencoder", *command[3:], "--samples", "7", "--json", "-"])
        assert json.loads(capsys.readouterr().out)["autoencoders"] == [second]

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            (["--samples", "0"], "--samples is 0"),
            (["--samples", "1", "--fid", "alex-random"], "two images"),
            (["--image-size", "0"], "--image-size is 0"),
            (["--image-size", "1"], "image_size of 2 or more"),
            (["--fid", "no-such-trunk"], "no-such-trunk"),
            (["--lpips", "no-such.pth"], "no-such.pth"),
            (["--image-size", "4"], "6 pixels a side"),
            (["--samples", "99999999999"], "--samples is"),
            (["--json", "."], ". is a folder"),
            (["--json", "/proc/new/file"], "/proc/new/file cannot be made"),
            (["--json", "/dev/null"], "/dev/null is a device"),
            (["--fid", "/dev/zero"], "/dev/zero does not exist"),
            (["--lpips", "/dev/zero"], "/dev/zero does not exist"),
            (["--shards", "nowhere"], "nowhere"),
            (["nowhere-else"], "nowhere-else"),
        ],
    )
    def test_bad_input_is_one_line_that_names_it(self, directories, image_shards, capsys, changes, named) -> None:
        if changes[0] == "nowhere-else":
            changes = [*changes, "--shards", str(image_shards)]
        elif changes[0] != "--shards":
            changes = ["--shards", str(image_shards), *changes]
        with pytest.raises(SystemExit) as left:
            main(["evaluate", "autoencoder", str(directories[0]), *changes])
        captured = capsys.readouterr()
        said = [line for line in captured.err.splitlines() if line.startswith("ldm:")]
        assert left.value.code in (1, 2) and len(said) == 1 and named in said[0] and captured.out == ""


def split(line: str) -> list[str]:
    return re.split("[│┃|]", line) if re.match("[│┃|]", line) else []
