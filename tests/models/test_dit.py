import inspect
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel

from ldm.diffusion.conditioning import (
    Condition,
    concatenate,
    denoise,
    denoise_with_activations,
    encode_condition,
    join_encoders,
    micro_conditions,
    takes_sizes,
)
from ldm.diffusion.objective import DenoisingObjective
from ldm.diffusion.path import RectifiedFlow
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.timesteps import Uniform
from ldm.errors import UsageError
from ldm.models.dit import DiT
from ldm.models.layers import FeedForward, position_embedding, rotary_embedding, rotate, scaled_dot_product_attention

SIZES: dict[str, Any] = {"sample_size": 8, "width": 32, "num_layers": 2, "num_attention_heads": 2, "caption_channels": 16}
# the default, and every other choice at least once
VARIANTS: list[dict[str, Any]] = [
    {},
    {"adaln": "zero", "norm": "rms_norm", "activation": "swiglu", "positions": "rope", "micro_conditioning": True},
    {"adaln": "zero", "qk_norm": False, "positions": "sincos_rope", "pooled_text": False, "patch_bottleneck": 8},
]


def make(**changes):
    return DiT(**SIZES | changes)


def inputs(batch=3, height=8, width=8, length=5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, height, width, generator=generator)
    text = torch.randn(batch, length, 16, generator=generator)
    sizes = torch.tensor([480.0, 640, 0, 80, 8 * height, 8 * width]).expand(batch, 6)  # for those with micro_conditioning
    return x, torch.linspace(50, 950, batch), Condition(text, torch.ones(batch, length, dtype=torch.int64), sizes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_of_a_fresh_dit_is_zero(variant):
    x, timestep, condition = inputs()
    assert not denoise(make(**variant), x, timestep, condition).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_blocks_of_a_fresh_dit_are_the_identity(variant):
    dit = make(**variant)
    modulations = dit.modulation(torch.randn(3, 32)).unflatten(1, (-1, 6, 32)).unbind(1)
    assert len(modulations) == (2 if variant.get("adaln") == "zero" else 1)
    x, text = torch.randn(3, 16, 32), torch.randn(3, 5, 32)
    for block in dit.blocks:
        assert torch.equal(block(x, modulations[-1], text, None), x)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("height, width", [(8, 8), (8, 12), (16, 4), (16, 16)])
def test_the_output_has_the_shape_of_the_latents(randomised, patch_size, height, width):
    x, timestep, condition = inputs(2, height, width)
    dit = randomised(make(patch_size=patch_size, positions="sincos_rope"))
    output = denoise(dit, x, timestep, condition)
    assert output.shape == x.shape and output.isfinite().all()


@pytest.mark.parametrize("patch_size, height, width", [(1, 8, 4), (2, 8, 8), (2, 4, 12), (4, 8, 16)])
def test_patches_return_to_their_places(patch_size, height, width):
    """With the blocks still the identity, a patch of the output depends on its own patch of the input, and no other."""
    dit = make(patch_size=patch_size)
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


def test_a_bottleneck_is_a_patch_embedding_of_low_rank(randomised):
    x, timestep, condition = inputs()
    narrow, wide = randomised(make(patch_bottleneck=5)), make()
    embedding: Any = wide.patch_embed
    wide.load_state_dict(narrow.state_dict(), strict=False)
    first, second = narrow.patch_embed
    with torch.no_grad():
        embedding.weight.copy_(torch.einsum("dkij,kcpq->dcpq", second.weight, first.weight))
        embedding.bias.copy_(second.bias)
    torch.testing.assert_close(denoise(narrow, x, timestep, condition), denoise(wide, x, timestep, condition))
    assert torch.linalg.matrix_rank(embedding.weight.flatten(1)) == 5


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="9 is not a multiple of patch_size 2"):
        DiT(sample_size=9)
    with pytest.raises(UsageError, match="width 30 is not a multiple of num_attention_heads 4"):
        make(width=30, num_attention_heads=4)
    with pytest.raises(UsageError, match="positions rope needs a width that is a multiple of 4 x 3 heads"):
        make(width=30, num_attention_heads=3, positions="rope")
    with pytest.raises(UsageError, match=r"\(8, 7\) are not divisible by patch_size 2"):
        denoise(make(), *inputs(1, 8, 7))
    with pytest.raises(UsageError, match="text embeddings are 16 wide, but the denoiser takes 24"):
        denoise(make(caption_channels=24), *inputs())


@torch.no_grad()
@pytest.mark.parametrize("pooled", [True, False])
def test_padding_has_no_effect(randomised, pooled):
    dit = randomised(make(pooled_text=pooled)).eval()
    x, timestep, condition = inputs()
    plain = denoise(dit, x, timestep, condition)
    torch.testing.assert_close(denoise(dit, x, timestep, condition.pad(12)), plain, rtol=1e-4, atol=1e-5)
    padded = condition.pad(12)
    padded.embeddings[:, 5:] = 100 * torch.randn(3, 7, 16)
    torch.testing.assert_close(denoise(dit, x, timestep, padded), plain, rtol=1e-4, atol=1e-5)
    # tokens have
    assert (denoise(dit, x, timestep, condition._replace(embeddings=condition.embeddings.flip(0))) - plain).abs().max() > 1e-2


@torch.no_grad()
def test_padding_that_no_caption_needs_costs_nothing(tiny_dit):
    """Nor does a mask without padding: neither reaches the blocks."""
    seen = []
    tiny_dit.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append((arguments[2].shape[1], arguments[3])))
    x, timestep, condition = inputs()
    denoise(tiny_dit, x, timestep, condition.pad(12))
    assert seen == [(5, None)]
    condition.mask[1, 3:] = 0
    denoise(tiny_dit, x, timestep, condition.pad(12))
    assert seen[1][0] == 5 and torch.equal(seen[1][1][:, 0, 0], condition.mask.bool())
    condition.mask.zero_()  # a caption without a token
    assert denoise(tiny_dit, x, timestep, condition).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [5, 3])
def test_an_encoded_text_gives_the_same_prediction(randomised, variant, tokens):
    dit = randomised(make(**variant)).eval()
    x, timestep, condition = inputs()
    condition.mask[1, tokens:] = 0
    plain = [denoise(dit, x, t * timestep, condition) for t in (1.0, 0.5)]
    calls = []
    for layer in (dit.text_embed, dit.blocks[1].text_attention.to_k):
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    encoded = encode_condition(dit, condition)
    for t, expected in zip((1.0, 0.5), plain, strict=True):
        torch.testing.assert_close(denoise(dit, x, t * timestep, encoded), expected, rtol=1e-6, atol=1e-6)
    assert len(calls) == 2  # each layer once


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_the_outputs_of_the_blocks_asked_for(tiny_dit, checkpointing):
    x, timestep, condition = inputs()
    outputs = []
    for block in tiny_dit.blocks:
        block.register_forward_hook(lambda _, arguments, output: outputs.append(output))
    if checkpointing:
        tiny_dit.enable_gradient_checkpointing()
    prediction, activations = denoise_with_activations(tiny_dit, x, timestep, condition, (1,))
    assert list(activations) == [1] and activations[1].shape == (3, 16, 32) and torch.equal(activations[1], outputs[1])
    assert torch.equal(prediction, denoise(tiny_dit, x, timestep, condition))
    assert tiny_dit(x, condition.embeddings, timestep, condition.mask).activations == {}
    assert list(tiny_dit(x, condition.embeddings, timestep, return_activations=[0, 1]).activations) == [0, 1]
    activations[1].sum().backward()
    assert tiny_dit.blocks[1].feed_forward[0].weight.grad.any() and tiny_dit.proj_out.weight.grad is None
    with pytest.raises(UsageError, match="there is no block 2 to return; give numbers from 0 to 1"):
        denoise_with_activations(tiny_dit, x, timestep, condition, (2,))


@torch.no_grad()
def test_a_caption_s_image_does_not_depend_on_its_batch(tiny_dit):
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
    # without positions, attention would not tell an image of moved patches from a moved image
    moved = denoise(tiny_dit, x.roll(2, 3), timestep, condition).roll(-2, 3)
    assert (moved - plain).abs().max() > 1e-2


@torch.no_grad()
def test_each_number_of_micro_conditioning_matters_and_only_where_it_is_asked_for(randomised):
    x, timestep, condition = inputs()
    for on in (False, True):
        dit = randomised(make(micro_conditioning=on)).eval()
        plain, sizes = denoise(dit, x, timestep, condition), condition.sizes
        assert sizes is not None
        assert takes_sizes(dit) == on and torch.equal(denoise(dit, x, timestep, condition._replace(sizes=sizes + 0)), plain)
        for number in range(6):
            other = sizes + 50 * torch.eye(6)[number]
            assert torch.equal(denoise(dit, x, timestep, condition._replace(sizes=other)), plain) != on
    for wrong in (None, sizes[:, :4]):
        with pytest.raises(UsageError, match=r"with micro_conditioning takes time_ids \(3, 6\), found (none|\(3, 4\))"):
            denoise(dit, x, timestep, condition._replace(sizes=wrong))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_survives_saving_and_loading(randomised, variant, tmp_path):
    dit = randomised(make(**variant)).eval()
    dit.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = DiT.from_pretrained(tmp_path)
    assert again.config.items() >= {"width": 32, "patch_size": 2, **variant}.items()
    assert torch.equal(denoise(again, *inputs()), denoise(dit, *inputs()))


def gradients(dit):
    dit.zero_grad()
    x, timestep, condition = inputs()
    denoise(dit, x, timestep, condition).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in dit.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_gradient_checkpointing_changes_no_gradient(randomised, variant):
    tiny_dit = randomised(make(**variant))
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
    names = ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "return_dict"]
    assert list(ours)[1:] == [*names, "return_activations", "added_cond_kwargs"]
    assert ours.keys() - {"return_activations"} <= theirs.keys()
    assert ours["return_dict"].default is theirs["return_dict"].default is True


@pytest.mark.parametrize("sized", [False, True])
def test_pixart_can_replace_it(sized):
    torch.manual_seed(0)
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        use_additional_conditions=sized,
    ).eval()
    assert takes_sizes(pixart) == sized
    x, timestep, condition = inputs()
    output = denoise(pixart, x, timestep, condition)
    assert condition.sizes is not None
    larger = denoise(pixart, x, timestep, condition._replace(sizes=2 * condition.sizes))
    assert torch.equal(output, larger) != sized
    assert output.shape == x.shape and output.abs().max() > 0
    padded = condition.pad(9)
    torch.testing.assert_close(denoise(pixart, x, timestep, padded), output, rtol=1e-4, atol=1e-4)
    result = DenoisingObjective(RectifiedFlow(), Velocity(), Uniform())(pixart, x, padded)
    (gradient,) = torch.autograd.grad(result.loss.mean(), pixart.proj_out.weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_contiguous_in_every_block(randomised, variant):
    """The memory layout of an image would persist through all sums and slow each of them down."""
    dit, seen = randomised(make(**variant)), []
    for block in dit.blocks:
        block.register_forward_hook(lambda _, arguments, output: seen.extend([arguments[0], output]))
    denoise(dit, *inputs())
    assert len(seen) == 4 and all(x.is_contiguous() for x in seen)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_with_gradients_is_as_accurate_as_torch_s(masked):
    q, k, v = torch.randn(3, 2, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor([[20], [7]]))[:, None, None] if masked else None

    def with_gradients(attend, dtype):
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
        attended = attend(*given, mask)
        gradients = torch.autograd.grad(attended.float().square().sum(), given)
        return [attended.detach().float(), *(gradient.float() for gradient in gradients)]

    exact = with_gradients(F.scaled_dot_product_attention, torch.float32)
    torch_s = with_gradients(F.scaled_dot_product_attention, torch.bfloat16)
    for wanted, ours, theirs in zip(exact, with_gradients(scaled_dot_product_attention, torch.bfloat16), torch_s, strict=True):
        assert 0 < (ours - wanted).norm() <= (theirs - wanted).norm()


def test_a_compiled_block_is_the_same_block(randomised):
    """Traced whole, without a break, once for all blocks."""
    dit = randomised(make(**VARIANTS[1]))
    wanted = gradients(dit)
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    dit.compile_repeated_blocks(backend=backend, fullgraph=True)
    assert list(dit.state_dict()) == list(make(**VARIANTS[1]).state_dict())
    for name, gradient in gradients(dit).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert len(graphs) == 1


def linear_layers(block):
    """Of the compiled forward pass of a block."""
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    torch.compiler.reset()
    x, modulation, text = torch.randn(2, 16, 32), torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    torch.compile(block, backend=backend, fullgraph=True)(x, modulation, text, None)
    (graph,) = graphs
    return sum(node.target is F.linear for node in graph.graph.nodes)


def test_compiled_queries_keys_and_values_are_one_product():
    """Queries, keys and values; out; queries to the text; its keys and values; out; two of the feed-forward."""
    block: Any = make().blocks[0]
    assert linear_layers(block) == 7
    # layers of another kind, as of an adapter, are called as they are
    block.attention.to_v = type("Adapted", (torch.nn.Linear,), {})(32, 32)
    assert linear_layers(block) == 9


@pytest.mark.parametrize("width", [32, 384, 768, 1024, 1152])
def test_swiglu_has_as_many_parameters_as_gelu(width):
    gelu, swiglu = (sum(p.numel() for p in FeedForward(width, 4.0, kind).parameters()) for kind in ("gelu", "swiglu"))
    assert abs(swiglu / gelu - 1) < (0.05 if width == 32 else 0.002)  # a hidden size is a multiple of 8


def test_positions_of_a_larger_grid_interpolate_those_of_the_trained_one():
    """Twice the tokens over the same span: every second position is one of the trained grid, whatever the other side."""
    for embedding in (position_embedding, lambda *sizes: torch.cat(rotary_embedding(*sizes).cosines_sines, dim=1)):
        base, finer = embedding(16, 4, 4, 4).unflatten(0, (4, 4)), embedding(16, 8, 12, 4).unflatten(0, (8, 12))
        torch.testing.assert_close(finer[::2, ::3], base)
        assert len(base.flatten(0, 1).unique(dim=0)) == 16  # and no two positions are equal


def test_rotary_attention_logits_depend_on_the_offset_alone():
    """Of queries at (r, c) and keys at (r + i, c + j)."""
    rotation = rotary_embedding(16, 6, 6, 6)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def rotated(vector, row, column):
        return rotate(vector.expand(1, 36, 1, 16), rotation).reshape(6, 6, 16)[row, column]

    logits = {
        (i, j): [rotated(q, r, c) @ rotated(k, r + i, c + j) for r in range(3) for c in range(3)]
        for i in range(3)
        for j in range(3)
    }
    for values in logits.values():
        torch.testing.assert_close(torch.stack(values), values[0].expand(9), rtol=1e-4, atol=1e-5)
    assert len({round(values[0].item(), 4) for values in logits.values()}) == 9


def with_gradients(dit):
    return {name for name, parameter in dit.named_parameters() if parameter.grad.any()}


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter_after_two_steps(variant):
    torch.manual_seed(0)
    dit = make(**variant)
    steps = train(dit, 3, 1e-2)
    next(steps)
    # first only the output layer, which is zero; then the gates; then everything behind the gates
    assert with_gradients(dit) == {"proj_out.weight", "proj_out.bias"}
    next(steps)
    next(steps)
    assert with_gradients(dit) == {name for name, _ in dit.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_it_can_overfit_one_batch(variant):
    torch.manual_seed(0)
    losses = list(train(make(**variant), 100, 5e-3))
    assert losses[-1] < losses[0] / 5


def test_sampling_under_inference_mode_before_training_does_no_harm():
    """Positions that were cached under ``inference_mode`` can be used with autograd later."""
    dit = make(width=48, positions="sincos_rope")  # a width that is not in the cache yet
    with torch.inference_mode():
        denoise(dit, *inputs())
    denoise(dit, *inputs()).sum().backward()
    assert dit.proj_out.weight.grad is not None


def test_micro_conditions_are_in_pixels_of_the_training_image():
    """An image of 1000 x 800, packed to 500 x 400, whose middle 300 columns and 400 rows become 192 x 256 pixels."""
    original, crop = torch.tensor([[800, 1000], [64, 48]]), torch.tensor([[0, 100, 400, 300], [0, 0, 64, 48]])
    sizes = micro_conditions(original, crop, (256, 192))
    assert sizes.tolist() == [[800, 1000, 0, 64, 256, 192], [64, 48, 0, 0, 256, 192]]
    *_, condition = inputs(2)
    condition = condition._replace(sizes=sizes)
    repeated, joined = condition.repeat(2).rows(torch.tensor([1, 3])).sizes, concatenate(condition, condition.pad(9)).sizes
    assert repeated is not None and torch.equal(repeated, sizes)
    assert joined is not None and torch.equal(joined, sizes.repeat(2, 1))


def test_tokens_of_several_text_encoders_have_projections_of_their_own(randomised):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {name: value for name, value in SIZES.items() if name != "caption_channels"}
    two = randomised(DiT(**sizes, caption_channels=[16, 8], pooled_text=["last", "none"])).eval()
    one = randomised(DiT(**sizes, caption_channels=16, pooled_text=["last"])).eval()
    one.load_state_dict({name: value for name, value in two.state_dict().items() if name in one.state_dict()})
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    first = Condition(torch.randn(2, 3, 16), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    second = Condition(torch.randn(2, 2, 8), torch.tensor([[1, 1], [0, 0]]))
    text = join_encoders([first, second])
    assert text.mask.tolist() == [[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]] and text.embeddings.shape == (2, 5, 16)
    with torch.no_grad():
        joined = two(x, text.embeddings, t, text.mask).sample
        torch.testing.assert_close(two(x, two.encode_text(text.embeddings, text.mask), t).sample, joined)
        alone = one(x, first.embeddings, t, first.mask).sample
        torch.testing.assert_close(joined[1], alone[1])  # whose second caption has no tokens
        assert (joined[0] - alone[0]).abs().max() > 1e-3
        order = [2, 0, 3, 1, 4]  # attention and sums have none, but for the last token of the first encoder
        torch.testing.assert_close(two(x[:1], text.embeddings[:1, order], t[:1], text.mask[:1, order]).sample, joined[:1])
        changed = first.embeddings.clone()
        changed[0, 2] = 1e3  # padding
        torch.testing.assert_close(one(x, changed, t, first.mask).sample, alone)
    for wrong, message in (
        ({"pooled_text": ["mean"]}, "pooled_text is of 1 text encoders, caption_channels of 2"),
        ({"pooled_text": ["mean", "first"]}, "pooled_text is 'first'; choose from: mean, last, none"),
        ({"caption_channels": [16, 0]}, "caption_channels is 0"),
    ):
        with pytest.raises(UsageError, match=message):
            DiT(**{**sizes, "caption_channels": [16, 8], **cast(Any, wrong)})
    with pytest.raises(UsageError, match="need the mask"):
        two(x, text.embeddings, t)
