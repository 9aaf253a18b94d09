"""The matcher: one loss over micro-batches, what it learns, its directory as a feature network, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer

from ldm.data.datamodule import ShardDataModule
from ldm.diffusion.path import RectifiedFlow
from ldm.diffusion.timesteps import Uniform
from ldm.errors import UsageError
from ldm.evaluation.features import load_feature_network
from ldm.losses.contrastive import same_rows
from ldm.models.autoencoder import pixels_to_images
from ldm.models.matcher import ImageTextModel, Matcher
from ldm.runs.dry_run.flops import ImageFlops
from ldm.training.base import TrainingModule
from ldm.training.matcher import MatcherTraining, pooled
from ldm.training.optimiser import MuonConfig
from tests.tiny import make_trainer

SIZES: dict[str, Any] = dict(
    in_channels=4, sample_size=16, patch_size=4, width=32, num_layers=1, num_attention_heads=2, caption_channels=8,
    text_layers=1, embedding_size=16,
)  # fmt: skip
NOISE = dict[str, Any](path=RectifiedFlow(), timesteps=Uniform())


def sizes(**changes: Any) -> dict[str, Any]:
    return {**SIZES, **changes}


def make(autoencoder: Path, noisy: bool = False, loss: Any = "contrastive", **changes: Any) -> MatcherTraining:
    torch.manual_seed(0)
    settings = {"optimiser": MuonConfig(3e-3), "ema_decay": 0.9} | (NOISE if noisy else {})
    return MatcherTraining(str(autoencoder), Matcher(**SIZES, noisy=noisy, loss=loss), **settings | changes)


def fit(
    module: MatcherTraining, shards: Path, folder: Path, steps: int, data: dict[str, Any] | None = None, **how: Any
) -> Trainer:
    trainer = make_trainer(folder, steps, val_check_interval=steps, **how)
    settings: dict[str, Any] = {"batch_size": 10, **(data or {})}
    trainer.fit(module, ShardDataModule(str(shards), str(shards), **settings))
    return trainer


@pytest.mark.parametrize(
    ("accumulate", "precision", "loss", "tolerance"),
    [(1, "32-true", "sigmoid", 1e-5), (3, "32-true", "contrastive", 1e-5), (3, "bf16-mixed", "sigmoid", 0.1)],
)
def test_the_gradients_are_those_of_the_loss_of_the_whole_batch(
    latents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    accumulate: int, precision: Any, loss: Any, tolerance: float,
) -> None:  # fmt: skip
    """However many micro-batches it is split into; noise included."""
    module = make(latents[0], noisy=True, loss=loss, accumulate=accumulate)
    batches, found = [], []

    def finish_step(self: MatcherTraining, *_: Any, **__: Any) -> None:
        found.append({name: weight.grad.clone() for name, weight in self.matcher.named_parameters()})  # pyright: ignore
        raise KeyboardInterrupt

    step = MatcherTraining.training_step
    monkeypatch.setattr(MatcherTraining, "training_step", lambda self, batch, i: (batches.append(batch), step(self, batch, i)))
    monkeypatch.setattr(TrainingModule, "finish_step", finish_step)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(module, latents[1], tmp_path, 1, precision=precision)
    module.zero_grad()
    inputs = module.inputs(batches[0])
    module.loss(module.matcher(*inputs).logits, same_rows(pooled(*inputs[2:]))).backward()
    for name, weight in module.matcher.named_parameters():
        assert weight.grad is not None and weight.grad.norm() > 0, name
        assert (found[0][name] - weight.grad).norm() <= tolerance * max(weight.grad.norm(), 1e-3), name


def test_it_learns_and_its_directory_is_a_feature_network(
    latents: tuple[Path, Path], image_shards: Path, tmp_path: Path
) -> None:
    """Online and from latents, clean images and noisy ones; the directory gives the same vectors, and is checked."""
    module = make(latents[0], noisy=True)
    logged = fit(module, latents[1], tmp_path / "run", 250).callback_metrics
    assert min(logged[f"val/{name}"] for name in ("image_to_text", "text_to_image")) >= 0.7  # by chance 0.1
    assert logged["val/image_to_text_bin_00"] >= logged["val/image_to_text_bin_09"] and logged["val/loss"] < 1.2
    assert ImageFlops(module).count(module.trainer.datamodule) > 1e5  # pyright: ignore[reportAttributeAccessIssue]

    data = ShardDataModule(str(image_shards), str(image_shards), batch_size=10)
    data.setup("fit")
    batch = data.train_set.batch(range(10))
    images, captions = pixels_to_images(batch["image"]), batch["caption"]
    with module.average_applied():
        module.save(tmp_path / "matcher")
        latent = data_of(latents[1]).train_set.batch(range(10))
        output = module.matcher(*module.inputs(latent | {"t": torch.zeros(10), "eps": torch.zeros_like(latent["mean"])}))
    network = load_feature_network(tmp_path / "matcher")
    assert network.takes_texts and network.name == f"matcher_{network.hash[:8]}" and network.num_features == 16
    assert network.resize == "bicubic, antialiased, to 32 x 32"
    torch.testing.assert_close(F.normalize(network(images)), output.images, atol=0.02, rtol=0)  # latents are float16
    torch.testing.assert_close(F.normalize(network.embed_texts(captions)), output.texts, atol=0.01, rtol=0)
    right = F.cosine_similarity(network(images), network.embed_texts(captions)).mean()
    assert right > F.cosine_similarity(network(images), network.embed_texts(captions[1:] + captions[:1])).mean() + 0.3
    larger = F.interpolate(images, scale_factor=2.0, mode="bicubic")
    assert F.cosine_similarity(network(larger), network(images)).min() > 0.8
    assert load_feature_network(tmp_path / "matcher").hash == network.hash
    assert ImageTextModel.load(tmp_path / "matcher").path == {"class_path": "ldm.diffusion.path.RectifiedFlow", "init_args": {}}

    other = make(latents[0], noisy=True).matcher
    other.save_pretrained(tmp_path / "matcher" / "matcher")
    with pytest.raises(UsageError, match=r"matcher/ is not what was saved; put it back"):
        load_feature_network(tmp_path / "matcher")


def data_of(shards: Path) -> ShardDataModule:
    data = ShardDataModule(str(shards), str(shards), batch_size=10)
    data.setup("fit")
    return data


def test_pixels_and_captions_encoded_online(image_shards: Path, tiny_text_encoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Matcher(**sizes(in_channels=3, sample_size=32, patch_size=8))
    module = MatcherTraining("identity", network, MuonConfig(3e-3), online=True, text_encoder=tiny_text_encoder)
    fit(module, image_shards, tmp_path, 2)
    module.save(tmp_path / "matcher")
    assert load_feature_network(tmp_path / "matcher")(torch.zeros(2, 3, 48, 24)).shape == (2, 16)


@pytest.mark.parametrize(
    ("changes", "data", "named"),
    [
        ({"noisy": True, "path": None}, {}, "a noisy matcher needs path and timesteps"),
        ({**NOISE}, {}, "path and timesteps are of noise, which the matcher does not take"),
        ({"online": True}, {}, "but a matcher with online trains on"),
        ({"online_precision": "bf16"}, {}, "nothing is encoded; set online"),
        ({"accumulate": 11}, {}, "accumulate 11 is more than batch_size 10"),
        ({}, {"text_encoder": [0, 1]}, "text_encoder is 0, 1"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    latents: tuple[Path, Path], tmp_path: Path, changes: dict, data: dict, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        fit(make(latents[0], **changes), latents[1], tmp_path, 1, data)


def test_a_matcher_of_other_sizes_is_refused(latents: tuple[Path, Path], tmp_path: Path) -> None:
    for size, named in {
        "caption_channels": "the matcher's caption_channels is 12",
        "in_channels": "the matcher's in_channels",
    }.items():
        with pytest.raises(UsageError, match=named):
            fit(MatcherTraining(str(latents[0]), Matcher(**sizes(**{size: 12})), MuonConfig()), latents[1], tmp_path, 1)
    with pytest.raises(UsageError, match="width 32 is not a multiple of num_attention_heads 3"):
        Matcher(**sizes(num_attention_heads=3))
