import pytest
import torch
from torch import nn

from ldm.losses import Hinge
from ldm.models.discriminator import PatchDiscriminator


@pytest.mark.parametrize("num_layers, size, logits", [(2, 32, 6), (3, 64, 6), (3, 256, 30)])
def test_one_logit_per_patch(num_layers, size, logits):
    discriminator = PatchDiscriminator(4, num_layers)
    assert discriminator(torch.randn(2, 3, size, size)).shape == (2, 1, logits, logits)


@pytest.mark.parametrize("num_layers, field", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_receptive_field_and_no_more(num_layers, field):
    torch.manual_seed(0)
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = PatchDiscriminator(4, num_layers).double()(images.double())
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    columns = images.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == field


def test_weights_after_the_first_layer_have_spectral_norm_1():
    discriminator = PatchDiscriminator(8, 2)
    for _ in range(50):  # the power iteration goes on with each training step
        discriminator(torch.randn(1, 3, 16, 16))
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in convolutions]
    assert norms[1:] == pytest.approx([1.0] * (len(norms) - 1), rel=0.02)


@torch.no_grad()
def test_a_picture_is_judged_by_itself():
    discriminator = PatchDiscriminator(8, 2).eval()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]))


def test_it_learns_to_tell_smooth_from_rough():
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
