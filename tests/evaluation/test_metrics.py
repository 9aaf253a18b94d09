"""The health of latents against closed forms; a FID whose trunk is always named."""

from __future__ import annotations

import sys
from math import pi
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.error import URLError

import pytest
import torch
import torchvision
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur, normalize

from ldm.errors import UsageError
from ldm.evaluation.metrics import LatentHealth, ReconstructionFID, health_scalars
from ldm.files import sha256_file


def posterior(mean: Tensor, std: Tensor | float) -> DiagonalGaussianDistribution:
    log_variance = 2 * torch.as_tensor(std).log().expand(mean.shape)
    return DiagonalGaussianDistribution(torch.cat([mean, log_variance.to(mean)], 1))


def health(*posteriors: DiagonalGaussianDistribution) -> dict[str, Tensor]:
    metric = LatentHealth(posteriors[0].mean.shape[1])
    for one in posteriors:
        metric.update(one)
    return metric.compute()


def channels(*values: float) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


class TestLatentHealth:
    def test_its_sums_stay_on_the_cpu_which_has_float64(self):
        assert LatentHealth(4).to("meta").sums.device.type == "cpu"

    def test_gaussian_channels_have_their_closed_forms(self):
        torch.manual_seed(0)
        m, s, noise = channels(0, 3, -1), channels(1, 0.5, 2), channels(0.1, 1, 0.5)
        q = posterior(m + s * torch.randn(64, 3, 32, 32), noise)
        found = health(q)
        m, s, noise = (x.flatten().double() for x in (m, s, noise))
        close: dict[str, Any] = {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(found["mean"], m, **close)
        torch.testing.assert_close(found["std"], (s**2 + noise**2).sqrt(), **close)
        torch.testing.assert_close(found["kl"], 0.5 * (m**2 + s**2 + noise**2 - 1 - 2 * noise.log()), **close)
        assert found["kurtosis"].abs().max() < 0.1 and found["dead"] == 0
        # what is drawn has the spread that was foretold, and the KL is diffusers' own
        z = q.sample()
        torch.testing.assert_close(found["std"].float(), z.std((0, 2, 3)), rtol=0.01, atol=0)
        torch.testing.assert_close(found["kl"].sum().float(), q.kl().mean() / 32**2)

    def test_kurtosis_of_other_densities(self):
        torch.manual_seed(0)
        uniform, signs = torch.rand(64, 1, 32, 32), torch.randn(64, 1, 32, 32).sign()
        rare = (torch.rand(64, 1, 32, 32) < 0.01).float()  # of probability p: 1/(p(1 − p)) − 6
        found = health(posterior(torch.cat([uniform, signs, rare], 1) + 5, 0.1))["kurtosis"]
        torch.testing.assert_close(found, torch.tensor([-1.2, -2, 1 / (0.01 * 0.99) - 6]).double(), rtol=0.1, atol=0.02)

    def test_batches_of_any_size_and_processes_add_up_to_one_pass_over_the_values(self):
        torch.manual_seed(0)
        sizes = [(3, 2, 8, 8), (1, 2, 5, 12), (4, 2, 8, 8), (2, 2, 1, 1)]
        pieces = [posterior(100 + torch.randn(size), 0.1 + torch.rand(size)) for size in sizes]
        whole = health(*pieces)
        first, second = LatentHealth(2), LatentHealth(2)
        for number, piece in enumerate(reversed(pieces)):
            (first, second)[number % 2].update(piece)
        first.merge_state(second)
        for name, value in first.compute().items():
            torch.testing.assert_close(value, whole[name], msg=name)
        # and every value counts alike, whichever image it is of
        flat = torch.cat([piece.mean.double().transpose(0, 1).flatten(1) for piece in pieces], 1)
        noise = torch.cat([piece.var.double().transpose(0, 1).flatten(1) for piece in pieces], 1)
        torch.testing.assert_close(whole["mean"], flat.mean(1))
        torch.testing.assert_close(whole["std"], (flat.var(1, correction=0) + noise.mean(1)).sqrt())
        deviation = flat - flat.mean(1, keepdim=True)
        kurtosis = (deviation**4).mean(1) / (deviation**2).mean(1) ** 2 - 3
        torch.testing.assert_close(whole["kurtosis"], kurtosis, rtol=0, atol=1e-5)
        first.reset()
        first.update(pieces[0])
        torch.testing.assert_close(first.compute(), health(pieces[0]))

    def test_channels_that_tell_nothing_are_dead_whatever_their_kl(self):
        torch.manual_seed(0)
        signal = torch.randn(32, 1, 16, 16)
        means = [
            (signal, 0.1, False),
            (1e-3 * signal, 1e-4, False),  # small, and yet read ten times over
            (torch.full_like(signal, 300.1), 1e-4, True),  # a constant, of large KL
            (300.1 + 1e-3 * signal, 1e-6, True),  # no more than rounding, in bf16
            (0.05 * signal, 1.0, True),  # the prior: Var[μ] = 0.0025
            (0.2 * signal, 1.0, False),  # Var[μ] = 0.04
            (7 + 0.05 * signal, 1.0, True),
        ]
        for mean, std, is_dead in means:
            assert int(health(posterior(mean, std))["dead"]) == is_dead, std
        every = posterior(torch.cat([mean for mean, _, _ in means], 1), channels(*(std for _, std, _ in means)))
        found = health(every)
        assert found["dead"] == 4
        assert found["kl"][2] > 1000 and found["kl"][4] < 0.01
        assert found["kurtosis"][2] == found["high_frequency"][2] == 0
        assert all(value.isfinite().all() for value in found.values())

    @pytest.mark.parametrize(
        ("fy", "fx", "high"), [(0, 5, 0), (5, 0, 0), (3, 3, 0), (0, 6, 1), (7, 0, 1), (4, 4, 1), (10, 10, 1)]
    )
    def test_a_wave_is_high_above_half_of_the_nyquist_frequency_counted_radially(self, fy, fx, high):
        """On 20 places: 5 waves are half of Nyquist, 4 and 4 along the diagonal are beyond it."""
        y, x = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
        wave = torch.cos(2 * pi * (fy * y + fx * x) / 20).expand(2, 1, 20, 20)
        assert health(posterior(wave, 0.1))["high_frequency"].item() == pytest.approx(high, abs=1e-6)
        # two waves share by their power, on whatever ground
        both = 3 * torch.cos(2 * pi * x / 20) + wave + 9
        expected = high * wave.square().mean() / (4.5 + wave.square().mean())
        assert health(posterior(both, 0.1))["high_frequency"].item() == pytest.approx(expected.item(), abs=1e-5)

    def test_white_noise_has_the_share_of_its_frequencies_and_a_smooth_field_almost_none(self):
        torch.manual_seed(0)
        noise = torch.randn(64, 1, 24, 40)
        y, x = torch.fft.fftfreq(24).view(-1, 1), torch.fft.fftfreq(40)
        share = (torch.hypot(y, x) > 0.25).sum().item() / (24 * 40 - 1)
        assert share == pytest.approx(1 - pi / 16, abs=0.02)
        assert health(posterior(noise, 0.1))["high_frequency"].item() == pytest.approx(share, abs=0.01)
        smooth = gaussian_blur(nn.functional.pad(noise, [12] * 4, mode="circular"), [13, 13], [2.0, 2.0])[..., 12:-12, 12:-12]
        assert health(posterior(smooth, 0.1))["high_frequency"].item() < 0.02

    def test_a_logger_gets_numbers_with_names(self):
        torch.manual_seed(0)
        found = health(posterior(torch.randn(2, 12, 4, 4), 0.1))
        scalars = health_scalars(found)
        assert len(scalars) == 3 * 12 + 3 and all(type(value) is float for value in scalars.values())
        assert scalars["latent_std_07"] == found["std"][7] and scalars["latent_kl_11"] == found["kl"][11]
        assert scalars["latent_dead"] == 0 and scalars["latent_kurtosis"] == pytest.approx(found["kurtosis"].mean().item())


def make_images(seed: int, count: int = 40, side: int = 48) -> Tensor:
    """Smooth colours with some grain."""
    torch.manual_seed(seed)
    coarse = nn.functional.interpolate(torch.randn(count, 3, 4, 4), (side, side), mode="bicubic")
    return (0.5 * coarse + 0.2 * torch.randn(count, 3, side, side)).clamp(-1, 1)


@pytest.fixture(scope="module")
def fid() -> ReconstructionFID:
    return ReconstructionFID("alex-random")


def distance(fid: ReconstructionFID, real: Tensor, other: Tensor) -> float:
    fid.reset()
    for images, reconstruction in zip(real.split(16), other.split(16), strict=True):
        fid.update(images, real=True)
        fid.update(reconstruction, real=False)
    return fid.compute().item()


class TestReconstructionFID:
    def test_its_sums_stay_on_the_cpu_which_has_float64(self):
        metric = ReconstructionFID("alex-random").to("meta")
        assert metric.real_features_cov_sum.device.type == "cpu"
        assert all(parameter.device.type == "meta" for parameter in metric.inception.parameters())

    def test_it_is_the_frechet_distance_of_gaussians_in_the_trunk_s_features(self, fid):
        """|m₁ − m₂|² + tr S₁ + tr S₂ − 2 tr (S₁^½ S₂ S₁^½)^½"""
        a, b = make_images(0), make_images(1) + 0.2
        with torch.no_grad():
            first, second = (fid.inception(images).double() for images in (a, b))

        def root(matrix: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(matrix)
            return vectors * values.clamp(min=0).sqrt() @ vectors.T

        s1, s2 = first.T.cov(), second.T.cov()
        trace = s1.trace() + s2.trace() - 2 * root(root(s1) @ s2 @ root(s1)).trace()
        expected = (first.mean(0) - second.mean(0)).square().sum() + trace
        assert distance(fid, a, b) == pytest.approx(expected.item(), rel=1e-3)

    def test_nothing_lies_between_equal_sets_and_more_blur_is_further(self, fid):
        images = make_images(0)
        found = [distance(fid, images, gaussian_blur(images, [9, 9], [sigma, sigma])) for sigma in (0.01, 0.5, 1.0, 2.0)]
        assert 0 <= found[0] < 1e-3 * found[1] and sorted(found) == found

    def test_a_random_trunk_is_the_same_each_time_and_leaves_the_generator_alone(self, fid):
        torch.manual_seed(123)
        expected = torch.rand(4)
        torch.manual_seed(123)
        again = ReconstructionFID("alex-random")
        assert torch.equal(torch.rand(4), expected)
        assert distance(again, make_images(0), make_images(1)) == distance(fid, make_images(0), make_images(1))

    def test_the_name_tells_the_trunk(self, fid, tmp_path):
        torch.manual_seed(0)
        alexnet = torchvision.models.alexnet(weights=None).eval()
        path = tmp_path / "alexnet.pth"
        torch.save({k: v for k, v in alexnet.state_dict().items() if k.startswith("features.")}, path)
        vgg = ReconstructionFID("vgg-random")
        weights = cast(nn.Module, vgg.inception.layers).state_dict()
        torch.save({f"features.{k}": v for k, v in weights.items()}, tmp_path / "vgg.pth")
        given = ReconstructionFID(str(path))
        names = [metric.name for metric in (fid, vgg, given, ReconstructionFID(str(tmp_path / "vgg.pth")))]
        digests = [sha256_file(tmp_path / name)[:8] for name in ("alexnet.pth", "vgg.pth")]
        assert names == ["rfid_alex_random", "rfid_vgg_random", f"rfid_alex_{digests[0]}", f"rfid_vgg_{digests[1]}"]
        assert fid.description == "rFID (alex, random weights)" and str(path) in given.description
        # and the checkpoint's convolutions are what it measures with: all but the last pooling, on ImageNet's scale
        images = make_images(0, 4)
        with torch.no_grad():
            scaled = normalize((images + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            torch.testing.assert_close(given.inception(images), alexnet.features[:-1](scaled).mean((2, 3)))

    def test_a_frozen_metric_learns_nothing_and_keeps_its_precision(self, fid):
        stage = nn.ModuleList([fid, nn.Dropout()]).train()
        assert stage[1].training and not any(module.training for module in fid.modules())
        assert not any(parameter.requires_grad for parameter in fid.parameters())
        expected = distance(fid, make_images(0), make_images(1))
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(fid, make_images(0), make_images(1)) == expected

    def test_images_of_any_size_down_to_what_the_layers_bear(self, fid):
        fid.reset()
        for height, width in ((31, 64), (50, 40)):
            images = make_images(0, 2, 64)[..., :height, :width]
            fid.update(images, real=True)
            fid.update(images, real=False)
        assert fid.compute() < 1e-3
        with pytest.raises(UsageError, match="31 pixels a side, not 64 x 30"):
            fid.update(torch.zeros(1, 3, 30, 64), real=True)

    def test_a_trunk_that_cannot_be_had_is_one_line_with_the_mend(self, tmp_path):
        torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
        torch.save([1], tmp_path / "list.pth")
        (tmp_path / "text.pth").write_text("not a checkpoint")
        for trunk, named in {
            "resnet": "resnet does not exist; give one of inception, dinov2, clip, alex-random, vgg-random, a hub name",
            "squeeze-random": "squeeze-random does not exist",
            str(tmp_path / "other.pth"): "other.pth is not torchvision's checkpoint of alexnet or vgg16",
            str(tmp_path / "list.pth"): "list.pth is not torchvision's checkpoint",
            str(tmp_path / "text.pth"): "text.pth is not torchvision's checkpoint",
        }.items():
            with pytest.raises(UsageError) as error:
                ReconstructionFID(trunk)
            assert named in str(error.value) and "\n" not in str(error.value)

    def test_inception_is_given_bytes_and_alone_called_rfid(self, monkeypatch):
        """With a stand-in of its size: the weights are a download."""

        class Extractor(nn.Module):
            def __init__(self, name: str, features: list[str]):
                super().__init__()
                assert features == ["2048"]

            def forward(self, pixels: Tensor) -> tuple[Tensor]:
                assert pixels.dtype == torch.uint8
                return (pixels.flatten(1)[:, :1].float().expand(-1, 2048),)

        def offline(*_: object) -> None:
            raise URLError("Name or service not known")

        module = SimpleNamespace(FeatureExtractorInceptionV3=Extractor, URL_INCEPTION_V3="https://host/inception.pth")
        monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(feature_extractor_inceptionv3=module))
        fid = ReconstructionFID("inception")
        assert fid.name == "rfid" and fid.description == "rFID (inception)"
        shades = torch.tensor([-1, -0.5, 0, 1]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
        assert fid.inception(shades)[:, 0].tolist() == [0, 64, 128, 255]
        module.FeatureExtractorInceptionV3 = offline
        with pytest.raises(UsageError) as error:
            ReconstructionFID("inception")
        said = str(error.value)
        assert "Name or service not known" in said and "https://host/inception.pth" in said and "\n" not in said
        assert str(Path(torch.hub.get_dir())) in said
