import pytest
import torch
from torch import nn

from ldm.errors import UsageError
from ldm.losses.adversarial import Hinge
from ldm.models.discriminator import PatchDiscriminator

NORMS = ["spectral", "group", "none"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_layers, size, logits", [(2, 32, 6), (3, 64, 6), (3, 256, 30)])
def test_one_logit_per_patch(num_layers, size, logits, norm):
    discriminator = PatchDiscriminator(4, num_layers, norm)
    assert discriminator(torch.randn(2, 3, size, size)).shape == (2, 1, logits, logits)


@pytest.mark.parametrize("norm", ["spectral", "none"])
@pytest.mark.parametrize("num_layers, field", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_depends_on_its_receptive_field_alone(num_layers, field, norm):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = PatchDiscriminator(4, num_layers, norm).double()(images.double())
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
    columns = gradient.abs().sum((0, 1, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == field


def test_weights_after_the_first_layer_have_spectral_norm_1():
    discriminator = PatchDiscriminator(8, 2)
    for _ in range(50):  # each training step adds an iteration of the power method
        discriminator(torch.randn(1, 3, 16, 16))
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in convolutions]
    assert norms[1:] == pytest.approx([1.0] * (len(norms) - 1), rel=0.02)


def test_group_normalisation_skips_the_first_layer_and_makes_a_logit_depend_on_the_whole_image():
    discriminator = PatchDiscriminator(16, 2, "group")
    groups = {position: layer for position, layer in enumerate(discriminator.layers) if isinstance(layer, nn.GroupNorm)}
    assert [layer.num_channels // layer.num_groups for layer in groups.values()] == [8, 8]
    assert list(groups) == [3, 6] and not isinstance(discriminator.layers[1], nn.GroupNorm)
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images)[0, 0, 0, 0], images)
    assert gradient[..., -8:, -8:].any()


@pytest.mark.parametrize("width", [1, 3, 5, 7, 12])
def test_groups_fit_any_width(width):
    assert PatchDiscriminator(width, 2, "group")(torch.randn(1, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_an_image_s_logits_depend_on_that_image_alone(norm, training):
    discriminator = PatchDiscriminator(8, 2, norm).train(training)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images)[1].sum(), images)
    assert gradient[1].any() and not gradient[[0, 2, 3]].any()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_an_image_without_a_single_logit_is_refused(num_layers):
    discriminator = PatchDiscriminator(4, num_layers)
    side = discriminator.smallest_side
    assert discriminator(torch.randn(1, 3, side, side)).shape == (1, 1, 1, 1)
    for height, width in ((side - 1, 64), (64, side - 1)):
        with pytest.raises(UsageError, match=rf"num_layers {num_layers} has no logit for images of {width} x {height}"):
            discriminator(torch.randn(1, 3, height, width))
        with pytest.raises(RuntimeError):
            discriminator.layers(torch.randn(1, 3, height, width))


def test_no_layers_are_refused():
    for sizes in ((0, 3), (64, 0)):
        with pytest.raises(UsageError, match="give 1 or more of both"):
            PatchDiscriminator(*sizes)


def test_it_learns_to_separate_smooth_from_rough_images():
    torch.manual_seed(0)
    discriminator, loss = PatchDiscriminator(8, 2), Hinge()
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-3)

    def batch():
        rough = torch.rand(8, 3, 32, 32) * 2 - 1
        return nn.functional.avg_pool2d(rough, 3, 1, 1), rough

    for _ in range(60):
        real, fake = batch()
        optimiser.zero_grad()
        loss.discriminator(discriminator(real), discriminator(fake)).backward()
        optimiser.step()
    real, fake = batch()
    assert discriminator(real).mean() > discriminator(fake).mean() + 1
