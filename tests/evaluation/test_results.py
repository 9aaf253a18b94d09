"""Generated images against real ones: the same from a pipeline and from files, worse as images get worse."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from ldm.cli import main
from ldm.data.image_dataset import ImageDataset
from ldm.data.writer import write_images
from ldm.evaluation.features import FeatureNetwork, load_feature_network
from ldm.evaluation.image_sets import FixedSizes, ImageSet, Scorer, open_folder
from ldm.evaluation.results import Reference
from ldm.models.text_encoder import TextEncoder
from ldm.shapes.scenes import generate


class Words(FeatureNetwork):
    """A stand-in for a network of images and text: mean colours, and the number of letters."""

    name, description, hash, resize, num_features, takes_texts = "words", "words", "0" * 64, "none", 3, True

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[len(text), text.count("e"), 1.0] for text in texts])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty shapes of 40 x 32 pixels."""
    folder = tmp_path_factory.mktemp("evaluation") / "shards"
    write_images(folder, "shapes", generate(40, (40, 32), seed=0))
    return folder


@pytest.fixture(scope="module")
def saved(make_pipeline: Callable, tiny_text_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an untrained pipeline."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    make_pipeline(words=TextEncoder.load(tiny_text_encoder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer([load_feature_network("alex-random"), Words()], batch_size=8)


def real_images(scorer: Scorer, shards: Path, *sizes: tuple[int, int]) -> ImageSet:
    dataset = ImageDataset(shards, buckets=FixedSizes(sizes=sizes))
    return scorer.real_images(dataset, range(len(dataset)))


def test_images_of_a_pipeline_and_of_its_files_score_the_same(
    scorer: Scorer, shards: Path, make_pipeline: Callable, tmp_path: Path
) -> None:
    real = real_images(scorer, shards, (32, 32), (32, 48))
    assert real.different_sizes == ((32, 48),) or real.different_sizes == ((32, 32),)
    reference = Reference(scorer, real, 14)
    settings: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0}
    captions, sizes = [str(caption) for caption in real.captions[:14]], [(32, 32), (32, 48)] * 7
    made = scorer.generated_images(make_pipeline(), captions, sizes, 5, **settings)
    (image,) = make_pipeline()(captions[3], generator=torch.Generator().manual_seed(8), height=32, width=48, **settings).images
    assert abs(np.asarray(made.shown[3]).astype(int) - np.asarray(image)).max() <= 1  # the batches differ
    for number, image in made.shown.items():
        image.save(tmp_path / f"{number:02d}.png")
        (tmp_path / f"{number:02d}.txt").write_text(captions[number])
    read = scorer.image_files(open_folder(tmp_path))
    assert read.captions == made.captions and read.sizes == made.sizes == sizes
    for ours, theirs in zip(made.features, read.features, strict=True):
        torch.testing.assert_close(ours, theirs)  # not bit by bit: the batches hold other images
    found, of_files = reference.compare(made), reference.compare(read)
    assert reference.values(made.features, range(14)) == {metric.name: metric.value for metric in found.metrics}
    assert [metric.name for metric in found.metrics][:3] == ["fid_alex_random", "kid_alex_random", "precision_alex_random"]
    for metric, of_file in zip(found.metrics, of_files.metrics, strict=True):
        assert of_file.value == pytest.approx(metric.value, rel=1e-3, abs=1e-5), metric.name
    # agreement of the network that takes texts alone, and only where captions are known
    assert {name for name in found.to_json() if "clipscore" in name} == {"clipscore_words"}
    silent = reference.compare(made.without_captions())
    assert not any("clipscore" in name for name in silent.to_json())
    assert silent.protocol["agreement"] == "not measured: the captions of 14 of 14 images are not known"
    assert "14 images for 256 features" in found.metrics[0].note
    with pytest.raises(Exception, match="too few for metrics; 6 or more"):
        reference.compare(made.part(0, 5))


def test_metrics_get_worse_with_blur_noise_and_lost_modes_and_real_images_are_the_best(scorer: Scorer) -> None:
    alone, half = Scorer(scorer.networks[:1]), 80
    every = torch.stack([torch.from_numpy(np.asarray(pixels)) for _, pixels, _ in generate(2 * half, 32, seed=0)])
    real, others = every.permute(0, 3, 1, 2).split(half)

    def scored(pixels: Tensor) -> ImageSet:
        return ImageSet.of(alone.score(pixels, [None] * len(pixels), range(len(pixels))))

    reference = Reference(alone, scored(torch.cat([real, others])), half)
    floor = reference.compare(scored(others))
    for metric in floor.metrics[:-1]:  # all but the variety, of which the real value is that of the first half
        assert metric.value == pytest.approx(metric.real)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    worse = {
        "blurred": [gaussian_blur(others, [15, 15], [sigma, sigma]) for sigma in (0.5, 1.0, 2.0, 4.0)],
        "noisy": [(others + level * noise).clamp(0, 255).byte() for level in (32, 64, 128)],
        "of few modes": [others[:modes].repeat(half // modes, 1, 1, 1) for modes in (16, 8, 4)],
    }
    for name, sets in worse.items():
        found = [floor, *(reference.compare(scored(each)) for each in sets)]
        fids = [each["fid_alex_random"] for each in found]
        assert fids == sorted(fids), name
        variety = [each["vendi_alex_random"] for each in found]
        assert variety == sorted(variety, reverse=True), name


def test_the_command_writes_the_whole_protocol_and_a_page(
    shards: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["evaluate", "pipeline", f"{saved}", "--shards", f"{shards}", "--network", "alex-random"]
    command += [
        "--size",
        "32",
        "--steps",
        "1",
        "--count",
        "12",
        "--json",
        f"{tmp_path}/out.json",
        "--page",
        f"{tmp_path}/p.html",
    ]
    main(command)
    assert "FID (alex_random)*" in capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    protocol = record["protocol"]
    assert (protocol["generated"], protocol["real"], protocol["real_halves"]) == (12, 12, 12)
    assert len(protocol["model_hash"]) == len(protocol["shards_hash"]) == len(protocol["networks"][0]["hash"]) == 64
    assert (protocol["steps"], protocol["guidance"], protocol["seed"], protocol["sizes"]) == (1, 3.0, 0, ["32x32"])
    assert {"scheduler", "sampler", "versions"} <= protocol.keys() and protocol["networks"][0]["resize"] == "none"
    assert record["metrics"]["fid_alex_random"]["value"] > record["metrics"]["fid_alex_random"]["real"] > 0
    page = (tmp_path / "p.html").read_text()
    assert "Real images of the same captions" in page and "Distance to the nearest real image" in page


def test_bad_input_is_one_line(shards: Path, saved: Path, capsys: pytest.CaptureFixture) -> None:
    on_shards = ["--shards", str(shards)]
    for options, said in [
        ([*on_shards, "--prompts", "3"], "--prompts is of the built-in shapes"),
        (["--page", "x.html"], "--page is of real images to compare with; give --shards, too"),
        ([*on_shards, "--images", "x"], "one of them"),
        ([*on_shards, "--images", "x", "--guidance", "0"], "--guidance is of images that a pipeline generates"),
        ([*on_shards, "--count", "41"], f"--count is 41, but {shards} holds 40 images"),
        ([*on_shards, "--network", "clop"], "the feature network clop does not exist"),
        ([*on_shards, "--network", "alex-random", "--size", "32", "--count", "5"], "5 of 10 real images are too few"),
        ([*on_shards, "--scheduler", "none"], "no sampler 'none'"),
    ]:
        with pytest.raises(SystemExit):
            main(["evaluate", "pipeline", f"{saved}", *options])
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
