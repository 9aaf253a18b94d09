from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from ldm.errors import UsageError
from ldm.losses.perceptual import PerceptualLoss


def make_images(seed=0, size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def perceptual():
    return PerceptualLoss("squeeze", "random")


class TestPerceptualLoss:
    def test_a_random_trunk_is_the_same_each_time_and_leaves_the_generator_alone(self, perceptual):
        torch.manual_seed(123)
        expected = torch.rand(4)
        torch.manual_seed(123)
        again = PerceptualLoss("squeeze", "random")
        assert torch.equal(torch.rand(4), expected)
        ours, theirs = perceptual.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert again.description == "LPIPS (squeeze, random trunk)"

    def test_it_is_a_distance(self, perceptual):
        a, b = make_images(0), make_images(1)
        assert perceptual(a, a) == 0 and perceptual(a, b) > 0
        torch.testing.assert_close(perceptual(a, b), perceptual(b, a))
        near = (a + 0.05 * (b - a)).clamp(-1, 1)
        assert perceptual(near, a) < perceptual(b, a)

    def test_its_gradient_reaches_the_reconstruction_and_no_weight(self, perceptual):
        reconstruction = make_images(0).requires_grad_()
        (gradient,) = torch.autograd.grad(perceptual(reconstruction, make_images(1)), reconstruction)
        assert gradient.abs().max() > 0 and gradient.isfinite().all()
        assert not any(parameter.requires_grad for parameter in perceptual.parameters())

    def test_a_frozen_metric_stays_in_evaluation(self, perceptual):
        stage = nn.Sequential(perceptual, nn.Dropout())
        stage.train()
        assert stage[1].training and not any(module.training for module in perceptual.modules())

    def test_a_checkpoint_of_torchvision_gives_exactly_its_weights(self, tmp_path):
        torch.manual_seed(7)
        whole = torchvision.models.squeezenet1_1(weights=None).state_dict()
        torch.save(whole, tmp_path / "squeezenet.pth")
        perceptual = PerceptualLoss("squeeze", str(tmp_path / "squeezenet.pth"))
        trunk = perceptual.network.net.state_dict()
        expected = {name: value for name, value in whole.items() if name.startswith("features.")}
        assert len(trunk) == len(expected) == 50
        for name, value in trunk.items():
            assert torch.equal(value, expected["features." + name.split(".", 1)[1]])
        assert str(tmp_path / "squeezenet.pth") in perceptual.description

    def test_a_path_without_such_a_checkpoint_is_refused_by_name(self, tmp_path):
        with pytest.raises(UsageError, match=r"missing\.pth does not exist"):
            PerceptualLoss("squeeze", str(tmp_path / "missing.pth"))
        torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
        (tmp_path / "text.pth").write_text("not a checkpoint")
        for name in ("other.pth", "text.pth"):
            with pytest.raises(UsageError) as error:
                PerceptualLoss("squeeze", str(tmp_path / name))
            assert f"{name} is not a checkpoint" in str(error.value) and "\n" not in str(error.value)

    def test_an_offline_pretrained_trunk_names_both_alternatives(self, tmp_path, monkeypatch):
        def offline(*_, **__):
            raise URLError("Name or service not known")

        monkeypatch.setattr(torch.hub, "urlopen", offline)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(UsageError) as error:
            PerceptualLoss("squeeze")
        message = str(error.value)
        assert "pretrained squeeze trunk" in message and "Name or service not known" in message and "\n" not in message
        assert "set the weights of PerceptualLoss" in message and "path" in message and "'random'" in message


def test_images_too_small_for_the_trunk_are_refused_in_one_line():
    small = torch.zeros(1, 3, 30, 40)
    with pytest.raises(UsageError, match=r"LPIPS \(alex, random trunk\) cannot take images of 40 x 30 pixels") as error:
        PerceptualLoss("alex", "random")(small, small)
    assert "\n" not in str(error.value)
