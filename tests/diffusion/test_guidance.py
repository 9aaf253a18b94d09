import pytest
import torch

from ldm.diffusion.guidance import ClassifierFreeGuidance, Condition, concatenate, denoise


def condition(batch, length, value=None):
    embeddings = torch.randn(batch, length, 16) if value is None else torch.full((batch, length, 16), value)
    return Condition(embeddings, torch.ones(batch, length, dtype=torch.int64))


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.tensor([100.0, 500.0, 900.0])


@pytest.fixture
def captions():
    torch.manual_seed(2)
    return condition(3, 5), condition(3, 2)  # captions and the null condition, of different lengths


@torch.no_grad()
def guided(denoiser, captions, inputs, scale):
    return ClassifierFreeGuidance(denoiser, *captions, scale)(*inputs)


@torch.no_grad()
def test_guidance_is_null_plus_w_times_the_difference_of_two_calls(tiny_dit, inputs, captions):
    conditional, null = (denoise(tiny_dit, *inputs, which) for which in captions)
    for scale in (0.0, 0.5, 1.0, 3.0, 7.5):
        expected = null + scale * (conditional - null)
        torch.testing.assert_close(guided(tiny_dit, captions, inputs, scale), expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_neutral_at_1_and_calls_for_no_null(tiny_dit, inputs, captions):
    batches = []
    tiny_dit.register_forward_pre_hook(lambda *call: batches.append(len(call[2]["hidden_states"])), with_kwargs=True)
    with torch.no_grad():
        assert torch.equal(guided(tiny_dit, captions, inputs, 1), denoise(tiny_dit, *inputs, captions[0]))
    guided(tiny_dit, captions, inputs, 2.0)
    assert batches == [3, 3, 6]


def test_guidance_is_linear_in_w(tiny_dit, inputs, captions):
    at = {scale: guided(tiny_dit, captions, inputs, scale) for scale in (0.0, 1.0, 2.0, 5.0)}
    torch.testing.assert_close(at[2.0] - at[1.0], at[1.0] - at[0.0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at[5.0], at[0.0] + 5 * (at[1.0] - at[0.0]), rtol=1e-4, atol=1e-4)


def test_all_channels_are_guided(tiny_dit, inputs, captions):
    change = guided(tiny_dit, captions, inputs, 4.0) - guided(tiny_dit, captions, inputs, 1)
    assert (change.abs().mean((0, 2, 3)) > 1e-3).all()


def test_conditions_are_padded_stacked_and_repeated(tiny_dit, inputs):
    short, long = condition(1, 2), condition(2, 5)
    both = concatenate(short, long)
    assert both.embeddings.shape == (3, 5, 16) and both.mask.tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1] * 5]
    assert torch.equal(both.embeddings[1:], long.embeddings) and torch.equal(both.embeddings[:1, :2], short.embeddings)
    repeated = long.repeat(3)
    assert torch.equal(repeated.embeddings, long.embeddings[[0, 0, 0, 1, 1, 1]]) and repeated.mask.shape == (6, 5)
    x_t, timestep = inputs[0][:1], inputs[1][:1]
    with torch.no_grad():
        torch.testing.assert_close(
            denoise(tiny_dit, x_t, timestep, short), denoise(tiny_dit, x_t, timestep, short.pad(9)), rtol=1e-5, atol=1e-5
        )
