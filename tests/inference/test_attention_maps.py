import numpy as np
import pytest
import torch
from diffusers.models import PixArtTransformer2DModel
from PIL import Image

from ldm.cli import dispatch
from ldm.errors import UsageError
from ldm.inference.attention_maps import (
    attention_grid,
    attention_probabilities,
    generate_with_attention,
    record_attention,
    word_tokens,
)
from ldm.inference.settings import GenerationSettings
from ldm.models.layers import Attention, KeysValues

SETTINGS = GenerationSettings("a chartreuse circle, and a ring", negative="something much longer than that prompt is", steps=3)


def ordinary(pipeline, settings):
    generator = torch.Generator().manual_seed(settings.seed)
    return pipeline(settings.prompt, settings.negative, settings.steps, settings.guidance, generator=generator).images[0]


def hooks(network):
    return [hook for part in network.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_probabilities_are_those_the_attention_answers_with(qk_norm):
    torch.manual_seed(0)
    attention = Attention(16, 4, context_width=12, qk_norm=qk_norm)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()[:, None, None, :]
    looked_up = attention.keys_values(context)
    for given in (context, looked_up):
        found = attention_probabilities(attention, x, given, mask)  # (2, 4, 9, 5)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 9))
        assert (found[0, ..., 3:] == 0).all() and (found[0, ..., :3] > 0).all()
        answer = attention.to_out((found @ looked_up.values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(answer, attention(x, given, mask))


@torch.no_grad()
def test_a_token_that_wins_is_read_back_where_it_wins(tiny_dit):
    """Queries are the first feature of a place; token 2 is wanted where it is 1, token 1 where it is −1."""
    attention = Attention(4, 1, qk_norm=False)
    attention.to_q.weight.copy_(torch.eye(4))
    attention.to_q.bias.zero_()
    places = torch.zeros(1, 6, 4)
    places[0, :, 0] = torch.tensor([1.0, 1, -1, -1, 1, -1])
    keys = torch.zeros(1, 1, 4, 4)
    keys[0, 0, :, 0] = torch.tensor([0.0, -100, 100, 1000])  # the last is padding
    mask = torch.tensor([True, True, True, False])[None, None, None]
    found = attention_probabilities(attention, places, KeysValues(keys, keys), mask)[0, 0]
    assert found.argmax(-1).tolist() == [2, 2, 1, 1, 2, 1] and (found.max(-1).values > 0.999).all()


@torch.no_grad()
def test_conditional_rows_and_real_tokens_alone_count_and_encoded_texts_change_nothing(tiny_dit):
    generator = torch.Generator().manual_seed(0)
    x, time = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([500.0, 500.0])
    texts = torch.randn(2, 5, 16, generator=generator)  # the null condition is the longer one
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with record_attention(tiny_dit, 1, 3) as alone:
        tiny_dit(x[1:], texts[1:], time[1:], mask[1:])
    with record_attention(tiny_dit, 1, 3) as guided:
        tiny_dit(x, texts, time, mask)
    encoded = tiny_dit.encode_text(texts, mask)
    with record_attention(tiny_dit, 1, 3) as kept:
        for _ in range(2):
            tiny_dit(x, encoder_hidden_states=encoded, timestep=time)
    assert alone.mean().shape == (1, 16, 3) and (alone.count, kept.count) == (2, 4)
    torch.testing.assert_close(alone.mean().sum(-1), torch.ones(1, 16))
    for other in (guided, kept):
        torch.testing.assert_close(other.mean(), alone.mean())


@torch.no_grad()
def test_hooks_are_gone_afterwards_whatever_happened(tiny_dit):
    x, text, time = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.tensor([500.0])
    before = tiny_dit(x, text, time).sample
    with record_attention(tiny_dit, 1, 5):
        assert len(hooks(tiny_dit)) == 3
        assert torch.equal(tiny_dit(x, text, time).sample, before)
    assert not hooks(tiny_dit)
    with pytest.raises(KeyboardInterrupt), record_attention(tiny_dit, 1, 5):
        raise KeyboardInterrupt
    assert not hooks(tiny_dit)


@torch.no_grad()
def test_only_the_times_asked_for_count(tiny_dit):
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)

    def watched(*times):
        with record_attention(tiny_dit, 1, 5, times) as found:
            for time in (900.0, 400.0, 100.0):
                tiny_dit(x, text, torch.tensor([time]))
        return found

    whole, early, late = watched(0, 1000), watched(500, 1000), watched(0, 500)
    assert (whole.count, early.count, late.count) == (6, 2, 4)
    torch.testing.assert_close(whole.mean(), (early.mean() + 2 * late.mean()) / 3)
    with pytest.raises(UsageError, match="no step of the sampler lies within these times"):
        watched(500, 600).mean()


def test_a_network_that_is_no_dit_is_refused():
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, caption_channels=16, sample_size=8
    )
    with (
        pytest.raises(UsageError, match="this model's denoiser is a PixArtTransformer2DModel"),
        record_attention(network, 1, 1),
    ):
        pass
    assert not hooks(network)


def test_every_token_but_the_special_ones_stands_for_one_word(minilm):
    prompt = "A chartreuse, anti-aliased ❤️ ring's edge"
    found = word_tokens(minilm.tokenizer, prompt)
    assert [prompt[start:end] for start, end in found] == ["A", "chartreuse", ",", "anti-aliased", "❤️", "ring's", "edge"]
    count = len(minilm.tokenizer(prompt)["input_ids"])
    assert [place for places in found.values() for place in places] == [*range(1, count - 1)]  # [CLS] and [SEP] are no words
    assert len(found[2, 12]) > 1  # a word of several tokens


def test_looking_changes_no_image_and_each_words_map_is_the_sum_of_its_tokens(pipeline):
    image, maps = generate_with_attention(pipeline, SETTINGS)
    assert not hooks(pipeline.transformer)
    assert np.array_equal(np.asarray(image), np.asarray(ordinary(pipeline, SETTINGS)))
    assert maps.words == ["a", "chartreuse", "circle", ",", "and", "a", "ring"]
    assert maps.tokens[0] == "[CLS]" and maps.tokens[-1] == "[SEP]" and len(maps.tokens) == len(maps.token_maps)
    assert maps.token_maps.shape[1:] == maps.maps.shape[1:] == (4, 4)
    np.testing.assert_allclose(maps.token_maps.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(maps.maps.sum(0), maps.token_maps[1:-1].sum(0), atol=1e-5)
    page = attention_grid(image, SETTINGS.prompt, maps)
    assert page.width > 4 * 192 and np.asarray(page).std() > 10


def test_the_command_writes_image_grid_and_arrays(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "pipeline")

    def run(*arguments):
        given = ["attention", tmp_path / "pipeline", "a red ring", "--steps", "2", "--device", "cpu", *arguments]
        dispatch([str(argument) for argument in given])

    run("--out", tmp_path / "out", "--size", "16x24", "--times", "0.5", "1")
    assert "attention.png of 3 words" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "attention.npz") as arrays:
        assert [*arrays["words"]] == ["a", "red", "ring"] and arrays["maps"].shape == (3, 6, 4)
        assert len(arrays["tokens"]) == len(arrays["token_maps"]) == 5
    assert Image.open(tmp_path / "out" / "image.png").size == (16, 24)
    for name in ("image.png", "attention.png"):
        info = Image.open(tmp_path / "out" / name).info
        assert "trainedAlgorithmicMedia" in info["XML:com.adobe.xmp"] and "a red ring" in info["ldm"]
    with pytest.raises(UsageError, match="--times is 1 to 0"):
        run("--out", tmp_path / "other", "--times", "1", "0.5")
    assert not (tmp_path / "other").exists()
