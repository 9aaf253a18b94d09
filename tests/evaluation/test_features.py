"""Networks whose features images are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.bit.image_processing_bit import BitImageProcessor

from ldm.errors import UsageError
from ldm.evaluation.features import load_feature_network


@pytest.fixture(scope="module")
def networks(tiny_text_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of a tiny CLIP and a tiny DINOv2."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_text_encoder)
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": tokenizer.sep_token_id or 1}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**small, image_size=28, patch_size=14)).save_pretrained(folder / "dino")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder / "dino")
    return folder / "clip", folder / "dino"


def test_networks_of_transformers_give_the_features_that_transformers_gives(networks: tuple[Path, Path]) -> None:
    images = torch.rand(3, 3, 40, 56) * 2 - 1
    pixels = ((images + 1) * 127.5).round().byte()
    clip, dino = map(load_feature_network, networks)
    assert clip.takes_texts and not dino.takes_texts and (clip.num_features, dino.num_features) == (12, 16)
    assert clip.name == f"clip_{clip.hash[:8]}" and dino.name == f"dinov2_{dino.hash[:8]}"
    assert clip.resize == "bicubic, antialiased, the shorter side to 32, then its centre 32 x 32"
    model: Any
    model, processor = CLIPModel.from_pretrained(networks[0]), CLIPImageProcessor.from_pretrained(networks[0])
    tokenizer = AutoTokenizer.from_pretrained(networks[0])
    texts = ["a red ring", "two green squares and a very long rest " * 20]
    with torch.no_grad():
        expected = model.get_image_features(**processor([*pixels], return_tensors="pt")).pooler_output
        torch.testing.assert_close(clip(images), expected)
        tokens = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=64)
        torch.testing.assert_close(clip.embed_texts(texts), model.get_text_features(**tokens).pooler_output)
        pixels = BitImageProcessor.from_pretrained(networks[1])([*pixels], return_tensors="pt")
        class_token = Dinov2Model.from_pretrained(networks[1])(**pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(dino(images), class_token)


def test_the_hash_is_of_the_weights_and_the_processor(networks: tuple[Path, Path], tmp_path: Path) -> None:
    first = load_feature_network(networks[1])
    assert load_feature_network(networks[1]).hash == first.hash
    Dinov2Model.from_pretrained(networks[1]).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    assert load_feature_network(tmp_path).hash != first.hash


def test_a_network_that_cannot_be_had_is_one_line_with_the_ways_out(tiny_text_encoder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, named in {
        "clop": "the feature network clop does not exist; give one of inception, dinov2, clip, alex-random",
        str(tmp_path / "empty"): "empty is not the directory of a feature network (no config.json); give",
        tiny_text_encoder: "cannot be loaded",
    }.items():
        with pytest.raises(UsageError) as error:
            load_feature_network(name)
        assert named in str(error.value) and "\n" not in str(error.value), str(error.value)
