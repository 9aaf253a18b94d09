import pytest
import torch
from torch.nn.functional import avg_pool2d

from ldm.errors import UsageError
from ldm.losses.equivariance import Equivariance, turn_and_scale
from ldm.losses.perceptual import PerceptualLoss
from ldm.models.discriminator import PatchDiscriminator

FACTOR = 4


def pair(height=128, width=128):
    """Images of sixteenths, so that sums are exact, and ideally equivariant latents: the mean per latent pixel."""
    images = torch.randint(-16, 17, (2, 3, height, width), generator=torch.Generator().manual_seed(0)) / 16
    return images, avg_pool2d(images, FACTOR)


def grid(size=128):
    """Coordinates of the middles of pixels, 0 to 1 over the image."""
    middles = (torch.arange(size) + 0.5) / size
    return torch.meshgrid(middles, middles, indexing="ij")


def scaled_both_ways(images, side):
    """Scaled and then pooled; pooled and then scaled."""
    size = (side * FACTOR, side * FACTOR)
    return avg_pool2d(turn_and_scale(images, 0, size), FACTOR), turn_and_scale(avg_pool2d(images, FACTOR), 0, (side, side))


@pytest.mark.parametrize("turns", range(4))
def test_rotations_of_equivariant_latents_are_latents_of_rotated_images(turns):
    images, latents = pair(64, 128)
    images, latents = turn_and_scale(images, turns, (64, 128)), turn_and_scale(latents, turns, (16, 32))
    assert images.shape[-2:] == ((128, 64) if turns % 2 else (64, 128))
    assert torch.equal(avg_pool2d(images, FACTOR), latents)


@pytest.mark.parametrize("side", [8, 13, 21, 31])
def test_scaling_shifts_nothing(side):
    """A linear ramp stays the same at every size, off the edges, to a twentieth of a latent pixel."""
    for maps in scaled_both_ways(torch.stack(grid())[None], side):
        error = (maps - torch.stack(grid(side))).abs()[..., 2:-2, 2:-2].max()
        assert error < 0.05 / side


@pytest.mark.parametrize("side, bound", [(8, 0.04), (16, 0.015), (24, 0.008), (31, 0.005)])
def test_scaled_latents_of_a_smooth_image_are_nearly_those_of_the_scaled_image(side, bound):
    """One wave of height ±1 across the image: they differ by at most the bound on average, by more the smaller they get."""
    y, x = grid()
    pooled, latents = scaled_both_ways(torch.stack([(2 * torch.pi * x).sin(), (2 * torch.pi * (x + y)).cos()])[None], side)
    assert (pooled - latents).abs().mean() < bound


def test_both_are_transformed_alike():
    """A spot in the image's corner and the one in the latents' stay at the same position, whatever the transform."""
    images, latents = torch.zeros(1, 3, 128, 192), torch.zeros(1, 4, 32, 48)
    images[..., :32, :48], latents[..., :8, :12] = 1, 1
    equivariance = Equivariance(1.0)
    for seed in range(20):
        torch.manual_seed(seed)
        treated_images, treated_latents = equivariance(images, latents)
        pooled = avg_pool2d(treated_images, FACTOR)[:, :1]
        assert ((pooled > 0.5) != (treated_latents[:, :1] > 0.5)).float().mean() < 0.05


@pytest.mark.parametrize("height, width", [(128, 128), (96, 160), (256, 128)])
def test_sizes_are_whole_latent_pixels_within_the_bounds(height, width):
    images, latents = pair(height, width)
    equivariance, seen = Equivariance(1.0), set()
    torch.manual_seed(0)
    for _ in range(100):
        treated_images, treated_latents = equivariance(images, latents)
        size = treated_latents.shape[-2:]
        assert treated_images.shape == (2, 3, size[0] * FACTOR, size[1] * FACTOR) and treated_latents.shape[:2] == (2, 3)
        # the aspect ratio is kept, to the nearest latent pixel
        assert max(size) == round(min(size) * max(height, width) / min(height, width))
        seen.add(min(size))
    shorter = min(height, width) // FACTOR
    assert min(seen) == max(shorter // 4, 32 // FACTOR) and max(seen) == shorter


def test_how_often_batches_are_rotated_and_scaled():
    """At probability ½, of 9 sizes and 4 rotations, to four standard deviations of 2,000 batches."""
    images, latents = torch.zeros(1, 1, 128, 64), torch.zeros(1, 1, 32, 16)
    images[..., 0, 0] = 1  # in a corner: its position tells the rotation
    equivariance, treated, turned_sideways, unscaled = Equivariance(0.5), 0, 0, 0
    torch.manual_seed(0)
    for _ in range(2000):
        out, _ = equivariance(images, latents)
        treated += out is not images
        turned_sideways += out.shape[-1] > out.shape[-2]
        unscaled += out is not images and max(out.shape) == 128
    assert treated / 2000 == pytest.approx(0.5, abs=4 * (0.25 / 2000) ** 0.5)
    assert turned_sideways / treated == pytest.approx(1 / 2, abs=4 * (0.25 / treated) ** 0.5)
    # 8 to 16 latent pixels: 32 pixels are the smallest side; 4 would be a quarter
    assert unscaled / treated == pytest.approx(1 / 9, abs=4 * (8 / 81 / treated) ** 0.5)


def test_rotations_and_sizes_are_uniform():
    images, latents = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 16, 16)
    latents[..., :8, :8] = 1
    equivariance, turns, sides = Equivariance(1.0), torch.zeros(4), torch.zeros(17)
    torch.manual_seed(0)
    for _ in range(2000):
        _, out = equivariance(images, latents)
        turns[[(out[0, 0, row, column] > 0.5).item() for row in (0, -1) for column in (0, -1)].index(True)] += 1
        sides[out.shape[-1]] += 1
    torch.testing.assert_close(turns / 2000, torch.full((4,), 0.25), rtol=0, atol=4 * (3 / 16 / 2000) ** 0.5)
    torch.testing.assert_close(sides[8:] / 2000, torch.full((9,), 1 / 9), rtol=0, atol=4 * (8 / 81 / 2000) ** 0.5)
    assert sides[:8].sum() == 0


def test_probability_0_leaves_the_batch_and_the_generator_alone():
    images, latents = pair()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert all(Equivariance(0)(images, latents)[number] is given for number, given in enumerate((images, latents)))
    assert torch.equal(torch.get_rng_state(), before)


def test_probability_1_transforms_every_batch():
    images, latents = pair(64, 64)
    torch.manual_seed(0)
    assert all(Equivariance(1.0)(images, latents)[0] is not images for _ in range(50))


def test_the_same_state_of_the_generator_gives_the_same_transforms():
    images, latents = pair()
    torch.manual_seed(3)
    first = [Equivariance(0.7)(images, latents) for _ in range(8)]
    torch.manual_seed(3)
    again = [Equivariance(0.7)(images, latents) for _ in range(8)]
    assert all(torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True))
    assert len({one[1].shape for one in first}) > 1


def test_gradients_reach_the_latents_and_dtypes_stay():
    images, latents = pair(64, 64)
    latents = latents.bfloat16().requires_grad_()
    torch.manual_seed(0)
    treated_images, treated_latents = Equivariance(1.0, 0.5)(images, latents)
    assert treated_images.dtype == torch.float32 and treated_latents.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(treated_latents.sum(), latents)
    assert (gradient > 0).all()


def test_the_smallest_image_is_large_enough_for_lpips_and_discriminator():
    images, latents = pair(64, 64)
    perceptual, discriminator = PerceptualLoss("alex", "random"), PatchDiscriminator(4, 3)
    equivariance = Equivariance(1.0, 0.01)
    torch.manual_seed(0)
    treated = min((equivariance(images, latents)[0] for _ in range(60)), key=torch.numel)
    assert treated.shape[-2:] == (32, 32)
    assert perceptual(treated, -treated) > 0 and discriminator(treated).numel() > 0
    small, small_latents = pair(16, 16)
    assert equivariance(small, small_latents)[0].shape == small.shape  # smaller images are only rotated


@pytest.mark.parametrize("settings", [(-0.1, 0.5), (1.1, 0.5), (0.5, 0.0), (0.5, 1.5)])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UsageError, match=r"Equivariance: probability .* and min_scale"):
        Equivariance(*settings)
