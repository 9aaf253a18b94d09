"""Likelihoods of images under tiny pipelines, and captions that are wrong."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm.cli import main
from ldm.data.writer import write_images
from ldm.diffusion.path import VariancePreserving, expand
from ldm.diffusion.prediction import V
from ldm.errors import UsageError
from ldm.evaluation.likelihood import ImageLikelihood, LikelihoodEvaluator, Likelihoods, LikelihoodSettings
from ldm.shapes.scenes import generate

QUICK = LikelihoodSettings(("latent", "image", "captions"), 10, 0, "rk4", steps=2, levels=2, others=2, batch_size=4)


@pytest.fixture(scope="module")
def saved(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood") / "pipeline"
    make_pipeline(VariancePreserving(), V()).save_pretrained(folder)
    return folder


def test_an_image_is_measured_alike_whatever_the_batch_it_is_in(pipeline, image_shards):
    """By a solver of fixed steps; and the bound of the image is the sum of its three parts."""
    found = LikelihoodEvaluator(pipeline, str(image_shards), QUICK).measure()
    again = LikelihoodEvaluator(pipeline, str(image_shards), replace(QUICK, batch_size=7)).measure()
    for one, other in zip(found.images, again.images, strict=True):
        assert (one.key, one.compared) == (other.key, other.compared)
        for name in ("latent", "density", "squares", "own"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)
    first = found.images[0]
    variance = (found.decoder_std or 0) ** 2
    assert variance * sum(one.values[1] for one in found.images) == pytest.approx(sum(one.squares or 0 for one in found.images))
    decoder = -768 / 2 * math.log(2 * math.pi * variance) - (first.squares or 0) / (2 * variance) + 768 * math.log(2 / 255)
    assert found.image_nats(first) == pytest.approx(decoder + (first.density or 0), rel=1e-5)
    assert found.summary()["images"] == 10


def test_pixels_have_no_more_bits_than_a_uniform_guess_and_the_decoder_is_fitted():
    """8 bits a value where nothing is known; the variance is the mean of the squares."""
    one = ImageLikelihood(0, "a", "a", (4, 12), density=0.0, squares=12 * 0.25)
    found = Likelihoods([one], LikelihoodSettings(("latent", "image")), None, None, {})
    assert found.decoder_std == 0.5
    expected = 12 * (-0.5 * math.log(2 * math.pi * 0.25) - 0.5 + math.log(2 / 255))
    assert found.image_nats(one) == pytest.approx(expected)
    assert found.bits(one, "image") == pytest.approx(-expected / (12 * math.log(2)))


def test_shuffled_captions_are_the_first_suspects(pipeline, tmp_path, monkeypatch):
    """Under a denoiser of a normal density around the image that a caption belongs to; 2 of 40 captions are swapped."""
    write_images(tmp_path / "shards", "shapes", generate(40, 32, seed=0))
    evaluator = LikelihoodEvaluator(pipeline, str(tmp_path / "shards"), replace(QUICK, measures=("captions",), count=40))
    samples: list[dict[str, Any]] = [{**evaluator.dataset[row], "number": row} for row in range(40)]
    path, prediction = pipeline.diffusion
    latents = evaluator._latents(samples, evaluator._generators(samples))[0]
    belongs = dict(zip((sample["captions"][0] for sample in samples), latents, strict=True))
    assert len(belongs) == 40
    one, other = (samples[row]["captions"][0] for row in (7, 30))
    belongs[one], belongs[other] = belongs[other], belongs[one]

    belongs[""] = latents.mean(0)

    def denoiser(samples, texts):
        middle = torch.stack([belongs[text] for text in texts])

        def says(scaled, network_time, t):
            alpha, sigma = expand(path.alpha(t), scaled), expand(path.sigma(t), scaled)
            x0 = middle + 0.09 * alpha / (0.09 * alpha**2 + sigma**2) * (scaled - alpha * middle)
            return prediction.target(path, x0, (scaled - alpha * x0) / sigma, t)

        return says

    monkeypatch.setattr(evaluator, "_denoiser", denoiser)
    found = evaluator.measure()
    assert {image.number for image in found.suspects(40)} == {7, 30}
    assert found.summary()["likelier_under_own"] == 0.95
    assert all(own < min(others) for own, *others in found.errors.values())


def test_the_command_writes_a_page_and_json(saved, image_shards, tmp_path, capsys):
    command = ["evaluate", "likelihood", str(saved), "--shards", str(image_shards), "--count", "4", "--solver", "euler"]
    command += ["--steps", "2", "--probes", "2", "--ddpm-steps", "3", "--levels", "2", "--others", "2"]
    main([*command, "--page", f"{tmp_path}/page.html", "--json", f"{tmp_path}/out.json"])
    printed = capsys.readouterr()
    assert "this takes about" in printed.err and "suspects" in printed.out
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["settings"]["solver"] == "euler" and len(record["images"]) == 4
    for name in ("latent_bits_per_dim", "image_bits_per_dim", "ddpm_bits_per_dim", "probes_standard_error", "solver_error"):
        assert math.isfinite(record["metrics"][name])
    assert record["metrics"]["evaluations"] == 2
    page = (tmp_path / "page.html").read_text()
    assert "Suspects of a wrong caption" in page and "data:image/png" in page


def test_what_cannot_be_measured_is_refused(saved, make_pipeline, image_shards, tmp_path, capsys):
    def refusal(*options, shards=image_shards):
        with pytest.raises(SystemExit):
            main(["evaluate", "likelihood", str(saved), "--shards", str(shards), "--count", "2", *options])
        return capsys.readouterr().err

    assert "invalid choice: 'rk5'" in refusal("--solver", "rk5")
    assert "tolerance is 2; give" in refusal("--tolerance", "2")
    assert "probes is 0; give 1 to" in refusal("--probes", "0")
    assert "image is computed from latent; measure both" in refusal("--measure", "image")
    for name, caption in (("plain", ""), ("same", "a shape")):
        write_images(
            tmp_path / name,
            name,
            [(key, image, caption) for key, image, _ in generate(2, 32, seed=0)],
            extra={"captioned": 2 * bool(caption)},
        )
    assert "has no captions" in refusal(shards=tmp_path / "plain")
    assert "one caption for all of its images" in refusal("--measure", "captions", shards=tmp_path / "same")
    with pytest.raises(UsageError, match="ddpm cannot be measured of this pipeline: it follows RectifiedFlow"):
        LikelihoodEvaluator(make_pipeline(), str(image_shards), LikelihoodSettings(("ddpm",)))
