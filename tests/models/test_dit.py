import inspect

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from ldm.diffusion.guidance import Condition, denoise
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import RectifiedFlow
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.timesteps import Uniform
from ldm.errors import UsageError
from ldm.models.dit import DiT

SIZES = {"sample_size": 8, "width": 32, "num_layers": 2, "num_heads": 2, "text_width": 16}


def inputs(batch=3, height=8, width=8, length=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, height, width, generator=generator)
    text = torch.randn(batch, length, 16, generator=generator)
    return x, torch.linspace(50, 950, batch), Condition(text, torch.ones(batch, length, dtype=torch.int64))


def test_a_fresh_dit_says_exactly_nothing():
    x, timestep, condition = inputs()
    assert not denoise(DiT(**SIZES), x, timestep, condition).any()


def test_the_blocks_of_a_fresh_dit_are_the_identity():
    dit = DiT(**SIZES)
    modulation = dit.modulation(torch.randn(3, 32)).unflatten(1, (6, -1))
    x, text = torch.randn(3, 16, 32), torch.randn(3, 5, 32)
    for block in dit.blocks:
        assert torch.equal(block(x, modulation, text, None), x)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("height, width", [(8, 8), (8, 12), (16, 4), (16, 16)])
def test_the_output_has_the_shape_of_the_latents(patch_size, height, width):
    x, timestep, condition = inputs(2, height, width)
    dit = DiT(**SIZES, patch_size=patch_size)
    assert denoise(dit, x, timestep, condition).shape == x.shape


@pytest.mark.parametrize("patch_size, height, width", [(1, 8, 4), (2, 8, 8), (2, 4, 12), (4, 8, 16)])
def test_a_token_is_drawn_where_it_was_read(patch_size, height, width):
    """With the blocks still the identity, a patch of the output depends on its own patch of the input, and no other."""
    dit = DiT(**SIZES, patch_size=patch_size)
    torch.nn.init.normal_(dit.proj_out.weight)
    x, timestep, condition = inputs(1, height, width)
    x.requires_grad_()
    output = denoise(dit, x, timestep, condition)
    for row, column in ((0, 0), (0, width - 1), (height - 1, 0), (height // 2, width // 2)):
        top, left = row // patch_size * patch_size, column // patch_size * patch_size
        (gradient,) = torch.autograd.grad(output[0, :, row, column].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(0) > 0
        expected = torch.zeros_like(seen)
        expected[top : top + patch_size, left : left + patch_size] = True
        assert torch.equal(seen, expected)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="9 is not a multiple of patch_size 2"):
        DiT(sample_size=9)
    with pytest.raises(UsageError, match="width 30 is not a multiple of num_heads 4"):
        DiT(**SIZES | {"width": 30, "num_heads": 4})
    with pytest.raises(ValueError, match=r"\(8, 7\) are not divisible by patch_size 2"):
        denoise(DiT(**SIZES), *inputs(1, 8, 7))


@torch.no_grad()
@pytest.mark.parametrize("pooled", [True, False])
def test_padding_is_never_seen(randomised, pooled):
    dit = randomised(DiT(**SIZES, pooled_text=pooled)).eval()
    x, timestep, condition = inputs()
    plain = denoise(dit, x, timestep, condition)
    torch.testing.assert_close(denoise(dit, x, timestep, condition.pad(12)), plain, rtol=1e-4, atol=1e-5)
    padded = condition.pad(12)
    padded.embeddings[:, 5:] = 100 * torch.randn(3, 7, 16)
    torch.testing.assert_close(denoise(dit, x, timestep, padded), plain, rtol=1e-4, atol=1e-5)
    # and what is not padding is seen
    assert (denoise(dit, x, timestep, condition._replace(embeddings=condition.embeddings.flip(0))) - plain).abs().max() > 1e-2


@torch.no_grad()
def test_a_caption_s_picture_does_not_depend_on_its_batch(tiny_dit):
    x, timestep, condition = inputs()
    mask = condition.mask.clone()
    mask[1, 2:] = 0
    together = denoise(tiny_dit, x, timestep, Condition(condition.embeddings, mask))
    alone = denoise(tiny_dit, x[1:2], timestep[1:2], Condition(condition.embeddings[1:2, :2], mask[1:2, :2]))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_mask_means_that_every_token_counts_and_one_time_serves_all(tiny_dit):
    x, _, condition = inputs()
    expected = denoise(tiny_dit, x, torch.full((3,), 400.0), condition)
    (plain,) = tiny_dit(x, condition.embeddings, torch.tensor(400.0), return_dict=False)
    torch.testing.assert_close(plain, expected)
    assert torch.equal(tiny_dit(x, condition.embeddings, torch.tensor(400.0)).sample, plain)


@torch.no_grad()
def test_time_and_place_matter(tiny_dit):
    x, timestep, condition = inputs()
    plain = denoise(tiny_dit, x, timestep, condition)
    assert (denoise(tiny_dit, x, timestep + 300, condition) - plain).abs().max() > 1e-2
    # without positions, attention would not tell a picture of moved patches from a moved picture
    moved = denoise(tiny_dit, x.roll(2, 3), timestep, condition).roll(-2, 3)
    assert (moved - plain).abs().max() > 1e-2


@torch.no_grad()
def test_it_comes_back_from_its_directory(tiny_dit, tmp_path):
    tiny_dit.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = DiT.from_pretrained(tmp_path)
    assert again.config.width == 32 and again.config.patch_size == 2
    assert torch.equal(denoise(again, *inputs()), denoise(tiny_dit, *inputs()))


def gradients(dit):
    dit.zero_grad()
    x, timestep, condition = inputs()
    denoise(dit, x, timestep, condition).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in dit.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient(tiny_dit):
    calls = []
    tiny_dit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(tiny_dit)
    tiny_dit.enable_gradient_checkpointing()
    checkpointed = gradients(tiny_dit)
    assert len(calls) == 1 + 2  # the forward was indeed run again
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_its_call_is_that_of_pixart():
    ours = inspect.signature(DiT.forward).parameters
    theirs = inspect.signature(PixArtTransformer2DModel.forward).parameters
    assert list(ours)[1:] == [
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "encoder_attention_mask",
        "return_dict",
    ]
    assert ours.keys() <= theirs.keys()
    assert ours["return_dict"].default is theirs["return_dict"].default is True


def test_pixart_stands_in_for_it():
    torch.manual_seed(0)
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    ).eval()
    x, timestep, condition = inputs()
    output = denoise(pixart, x, timestep, condition)
    assert output.shape == x.shape and output.abs().max() > 0
    padded = condition.pad(9)
    torch.testing.assert_close(denoise(pixart, x, timestep, padded), output, rtol=1e-4, atol=1e-4)
    result = DenoisingObjective(RectifiedFlow(), Velocity(), Uniform())(pixart, x, padded)
    result.loss.mean().backward()
    assert pixart.proj_out.weight.grad.abs().max() > 0


def train(dit, steps, learning_rate):
    """Overfit one batch at fixed times and noise; yields the loss before each step."""
    x, timestep, condition = inputs(4)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    objective = DenoisingObjective(RectifiedFlow(), Velocity(), Uniform())
    optimiser = torch.optim.AdamW(dit.parameters(), lr=learning_rate, weight_decay=0)
    for _ in range(steps):
        loss = objective(dit, x, condition, timestep / 1000, eps).loss.mean()
        optimiser.zero_grad()
        loss.backward()
        yield loss.item()
        optimiser.step()


def test_gradients_reach_every_parameter_once_the_zeros_have_moved():
    torch.manual_seed(0)
    dit = DiT(**SIZES)
    steps = train(dit, 3, 1e-2)
    next(steps)
    # at first the output layer alone, behind its zeros; then the gates; then what stands behind the gates
    assert {name for name, p in dit.named_parameters() if p.grad.any()} == {"proj_out.weight", "proj_out.bias"}
    next(steps)
    next(steps)
    assert [name for name, p in dit.named_parameters() if not p.grad.any()] == []


def test_it_can_learn_one_batch_by_heart():
    torch.manual_seed(0)
    losses = list(train(DiT(**SIZES), 100, 5e-3))
    assert losses[-1] < losses[0] / 5


def test_a_preview_before_training_does_not_get_in_its_way():
    """What is cached under ``inference_mode`` (position embeddings) may enter autograd later."""
    dit = DiT(**SIZES | {"width": 48})  # a width of its own: nothing is in the cache yet
    with torch.inference_mode():
        denoise(dit, *inputs())
    denoise(dit, *inputs()).sum().backward()
    assert dit.proj_out.weight.grad is not None
