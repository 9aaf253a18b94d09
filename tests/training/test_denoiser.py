"""Stage two: training, averages, validation, online encoding, skipped steps, and all that it refuses."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.utils import parameters_to_vector

from ldm.cli import dispatch
from ldm.data.buckets import Buckets
from ldm.data.datamodule import ShardDataModule, datamodule_of
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import latent_info
from ldm.data.plan import PlannedSample
from ldm.data.sources import open_source
from ldm.data.writer import write_images
from ldm.diffusion.path import RectifiedFlow, VariancePreserving
from ldm.diffusion.prediction import V, Velocity
from ldm.diffusion.timesteps import LogitNormal, Uniform, shift_time
from ldm.errors import LdmError, UsageError
from ldm.inference.generate import ImageGenerator
from ldm.inference.settings import GenerationSettings
from ldm.latents.export import export_latents
from ldm.models.autoencoder import AutoencoderConfig, autoencoder_hash, load_autoencoder, set_latent_statistics, statistics_hash
from ldm.models.dit import DiT
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import load_pipeline
from ldm.runs.callbacks import AverageSnapshots
from ldm.runs.posthoc_ema import export_average, find_snapshots, reconstruct
from ldm.shapes.scenes import generate
from ldm.training.denoiser import DenoiserTraining, fixed_noise
from ldm.training.ema import PowerAverages
from ldm.training.optimiser import MuonConfig
from ldm.training.randomness import DenoisingNoise
from tests.samples import write_photographs
from tests.tiny import make_trainer, write_config


def new_autoencoder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    AutoencoderConfig([8, 16], 4, 1, 4, False, 32).build().save_pretrained(folder)
    return folder


def make(autoencoder: Path, **changes: Any) -> DenoiserTraining:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "denoiser": DiT(
            in_channels=4, sample_size=16, patch_size=4, width=32, num_layers=2, num_attention_heads=2, caption_channels=8
        ),
        "autoencoder": str(autoencoder),
        "path": RectifiedFlow(),
        "prediction": Velocity(),
        "timesteps": LogitNormal(),
        "optimiser": MuonConfig(3e-3),
        "ema_decay": 0.9,
        "preview_prompts": ["a red ring", "a blue star"],
        "preview_steps": 3,
    }
    return DenoiserTraining(**settings | changes)


def fit(
    module: DenoiserTraining, latents: Path, folder: Path, steps: int, data: dict[str, Any] | None = None, **changes: Any
) -> Trainer:
    torch.manual_seed(1)
    trainer = make_trainer(folder, steps, val_check_interval=steps, **changes)
    trainer.fit(module, ShardDataModule(str(latents), str(latents), **{"batch_size": 8, **(data or {})}))
    return trainer


def noisy_batch(module: DenoiserTraining, data: ShardDataModule, *numbers: int) -> dict[str, Any]:
    """The training batch of these samples, each drawn as the draw of its number."""
    draws = [PlannedSample(number, number) for number in numbers]
    batch = data.train_set.batch(draws)
    return batch | module.batch_noise()(batch, draws)


@pytest.mark.parametrize("diffusion", [(RectifiedFlow(), Velocity(), LogitNormal()), (VariancePreserving(), V(), Uniform())])
def test_the_loss_falls(latents: tuple[Path, Path], tmp_path: Path, diffusion: tuple) -> None:
    path, prediction, timesteps = diffusion
    short = fit(make(latents[0], path=path, prediction=prediction, timesteps=timesteps), latents[1], tmp_path, 2)
    long = fit(make(latents[0], path=path, prediction=prediction, timesteps=timesteps), latents[1], tmp_path, 150)
    assert long.callback_metrics["val/loss"] < 0.8 * short.callback_metrics["val/loss"]


def test_bf16_keeps_fp32_master_weights(latents: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(latents[0])
    trainer = fit(module, latents[1], tmp_path, 2, precision="bf16-mixed")
    assert {parameter.dtype for parameter in module.denoiser.parameters()} == {torch.float32}
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_the_preview_is_what_the_saved_pipeline_generates(latents: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(latents[0])
    fit(module, latents[1], tmp_path, 20)
    with module.average_applied():
        preview = [images[0] for _, images in module.preview()]
        module.save(tmp_path / "pipeline")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generated = pipeline(
        module.preview_prompts, num_inference_steps=3, generator=[torch.Generator().manual_seed(seed) for seed in range(2)]
    ).images
    for ours, theirs in zip(preview, generated, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_previews_encode_their_prompts_once_and_leave_the_text_encoder_where_it_is(
    latents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(latents[0])
    fit(module, latents[1], tmp_path, 2)
    text_encoder, encoded = module.encoders.text_encoders[0].model, []
    monkeypatch.setattr(text_encoder, "to", lambda *_, **__: pytest.fail("the text encoder is moved"))
    text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    previews = [[images[0] for _, images in module.preview()] for _ in range(2)]
    assert len(encoded) == 2  # the prompts, and the empty ones of guidance
    pipeline: Any = module.pipeline()
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images = pipeline(module.preview_prompts, num_inference_steps=3, guidance_scale=3.0, generator=generators).images
    for several in zip(images, *previews, strict=True):
        assert all(np.array_equal(several[0], other) for other in several)


def test_another_autoencoder_is_refused_and_both_are_named(latents: tuple[Path, Path], tmp_path: Path) -> None:
    other = new_autoencoder(tmp_path / "other", 1)
    with pytest.raises(UsageError) as refused:
        fit(make(other), latents[1], tmp_path, 1)
    assert str(other) in str(refused.value) and str(latents[1]) in str(refused.value)


@pytest.mark.parametrize(
    ("denoiser", "named"),
    [({"in_channels": 8}, "in_channels"), ({"caption_channels": 64}, "caption_channels")],
)
def test_sizes_that_do_not_fit_the_latents_are_refused(
    latents: tuple[Path, Path], tmp_path: Path, denoiser: dict, named: str
) -> None:
    sizes: dict[str, Any] = {"in_channels": 4, "sample_size": 16, "caption_channels": 8} | denoiser
    module = make(latents[0], denoiser=DiT(patch_size=4, width=32, num_layers=1, num_attention_heads=2, **sizes))
    with pytest.raises(UsageError, match=named):
        fit(module, latents[1], tmp_path, 1)


def test_the_frozen_encoders_are_in_no_checkpoint(latents: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(latents[0])
    trainer = fit(module, latents[1], tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(name.startswith("denoiser.") for name in state["state_dict"])
    assert set(state["average"]) >= {"shadow_params", "optimization_step"}


def test_validation_latents_of_another_autoencoder_are_refused(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, tmp_path: Path
) -> None:
    export_latents(new_autoencoder(tmp_path / "other", 1), image_shards, tmp_path / "latents", tiny_text_encoder)
    trainer = make_trainer(tmp_path, 1)
    with pytest.raises(UsageError, match=r"latents has another autoencoder than .*export both with the same"):
        trainer.fit(make(latents[0]), ShardDataModule(str(latents[1]), str(tmp_path / "latents"), batch_size=8))


def test_checkpoints_hold_the_trained_weights_beside_the_average(latents: tuple[Path, Path], tmp_path: Path) -> None:
    """Lightning saves at the end of a validation, while the average is applied."""
    module = make(latents[0])
    saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False)
    fit(module, latents[1], tmp_path, 6, enable_checkpointing=True, callbacks=[saver])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for (name, trained), average in zip(module.denoiser.named_parameters(), state["average"]["shadow_params"], strict=True):
        saved = state["state_dict"][f"denoiser.{name}"]
        assert torch.equal(saved, trained)
        assert trained.grad is None or not torch.equal(saved, average)


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["fingerprint"]  # as in older manifests
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_another_text_encoder_is_refused_and_both_are_named(
    latents: tuple[Path, Path], tiny_text_encoder: str, tmp_path: Path
) -> None:
    """The text encoder's folder has changed between export and stage two."""
    shutil.copytree(latents[1], tmp_path / "latents")
    shutil.copytree(tiny_text_encoder, tmp_path / "text")
    edit_manifest(tmp_path / "latents", lambda manifest: manifest["text_encoders"][0].update(folder="../text"))
    fit(make(latents[0]), tmp_path / "latents", tmp_path, 1)  # the same weights, config and words from another folder
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    with pytest.raises(UsageError) as refused:
        fit(make(latents[0]), tmp_path / "latents", tmp_path, 1)
    was, found = (TextEncoder.load(folder).hash[:12] for folder in (tiny_text_encoder, str(tmp_path / "text")))
    where = (tmp_path / "text").resolve()
    assert f"was exported with text encoder {was}, but {where} is {found}; give the one" in str(refused.value)


def test_latents_of_several_sizes_are_validated_each_sample_once_whatever_the_batch_size(
    latents: tuple[Path, Path], tiny_text_encoder: str, tmp_path: Path, randomised: Callable
) -> None:
    cuts = [np.s_[:, :]] * 5 + [np.s_[:16, :]] * 3 + [np.s_[:, 8:24]] * 2
    images = [(key, pixels[cut], text) for (key, pixels, text), cut in zip(generate(10, 32, seed=0), cuts, strict=True)]
    write_images(tmp_path / "shards", "shapes", images, samples_per_shard=4)
    folder = tmp_path / "latents"
    export_latents(latents[0], tmp_path / "shards", folder, tiny_text_encoder, buckets=Buckets((24,), 8))
    module = make(latents[0], optimiser=MuonConfig(0.0))
    randomised(module.denoiser)
    losses = []
    for data in ({"batch_size": 3}, {"batch_size": 2}, {"max_tokens": 18}):  # two squares of 3 x 3 patches
        losses.append(float(fit(module, folder, tmp_path, 1, data).callback_metrics["val/loss"]))
    dataset, expected = LatentDataset(folder), []
    assert dataset.groups is not None and sorted(dataset.group_sizes) == [(8, 16), (12, 12), (16, 8)]
    for number, sample in enumerate(np.argsort(dataset.groups, kind="stable").tolist()):
        x0, condition = module.encode(dataset.batch([sample]))
        with module.average_applied():
            expected.append(module.objective(module.denoiser, x0, condition, *fixed_noise(number, x0)).unweighted.item())
    assert losses == pytest.approx([np.mean(expected)] * 3, rel=1e-5)
    edit_manifest(folder, lambda manifest: manifest.pop("shard_shapes"))
    with pytest.raises(
        UsageError, match="latents of several sizes, and its older manifest does not say which are where; export"
    ):
        fit(make(latents[0]), folder, tmp_path, 1)


class Sizes(Callback):
    """Keeps the sizes of training batches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        assert batch["mean"].shape == batch["eps"].shape == batch["posterior_noise"].shape
        self.seen.append(tuple(batch["mean"].shape))


def test_several_sizes_train_together_and_can_be_sampled(
    latents: tuple[Path, Path], three_sizes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, sizes = make(latents[0]), Sizes()
    trainer = fit(module, three_sizes, tmp_path, 27, {"batch_size": 1}, callbacks=[sizes])
    shapes = [(4, 20, 12), (4, 16, 16), (4, 12, 20)]
    assert Counter(sizes.seen) == {(1, *shape): 3 * count for shape, count in zip(shapes, (4, 3, 2), strict=True)}
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert module.encoders.latent_shapes == shapes
    module.save(tmp_path / "pipeline")
    pipeline = load_pipeline(tmp_path / "pipeline")
    assert pipeline.config["trained_on"]["latent_shapes"] == [list(shape) for shape in shapes]
    assert pipeline.trained_sizes == [(40, 24), (32, 32), (24, 40)] and pipeline.default_size == (40, 24)
    assert [image.size for _, images in module.preview() for image in images] == [(24, 40)] * 2
    pipeline.set_progress_bar_config(disable=True)
    caplog.clear()
    for height, width in (*pipeline.trained_sizes, (64, 64)):
        image = pipeline("a red ring", num_inference_steps=1, height=height, width=width).images[0]
        assert image.size == (width, height)
    assert [record.getMessage()[:5] for record in caplog.records] == ["64x64"]


def test_a_step_sees_its_own_size_alone(
    latents: tuple[Path, Path], three_sizes: Path, randomised: Callable, tmp_path: Path
) -> None:
    """With ``base_side`` times are shifted by the size of the batch, in sampling as in training; all else is that of a set of
    one size."""
    data = ShardDataModule(str(three_sizes), str(three_sizes), batch_size=2)
    data.setup("fit")
    module = make(latents[0], timesteps=LogitNormal(base_side=8))
    module.seed = 5
    module.prepare(data)
    randomised(module.denoiser)
    for group in range(3):
        numbers = np.flatnonzero(data.train_set.groups == group)[:2].tolist()
        batch = noisy_batch(module, data, *numbers)
        height, width = batch["mean"].shape[2:]
        plain = LogitNormal(shift=(height * width) ** 0.5 / 8)
        noise = DenoisingNoise(5, 4, 2, RectifiedFlow(), plain)(batch, [PlannedSample(number, number) for number in numbers])
        torch.testing.assert_close(batch["t"], noise["t"])
        assert torch.equal(batch["eps"], noise["eps"])
        assert module.loss_terms(batch)["train/loss"].isfinite()
    module.save(tmp_path)
    pipeline: Any = load_pipeline(tmp_path)
    sizes: dict[str, Any] = {"height": 40, "width": 24}
    pipeline.set_progress_bar_config(disable=True)
    training = LogitNormal(shift=(20 * 12) ** 0.5 / 8)
    assert torch.equal(
        pipeline.make_sampler(4, **sizes).t,
        shift_time(torch.tensor([1.0, 0.75, 0.5, 0.25]), training.resolution_shift.at(20, 12)),
    )
    noise = torch.randn(1, 4, 20, 12)
    by_latents, by_size = (
        pipeline("a red ring", latents=noise, num_inference_steps=2, output_type="latent", **given).images
        for given in ({}, {"sampler": pipeline.make_sampler(2, **sizes)} | sizes)
    )
    assert torch.equal(by_latents, by_size)
    with pytest.raises(UsageError, match=r"shifts noise levels by 1\.936, but this size needs 2; make"):
        pipeline("a red ring", sampler=pipeline.make_sampler(2, **sizes), height=32, width=32)


def test_modes_and_mirrored_latents_can_be_trained_on(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, tmp_path: Path
) -> None:
    export_latents(latents[0], image_shards, tmp_path / "latents", tiny_text_encoder, mode=True, flip=True, captions="all")
    data = {"flip": 0.5, "caption": "random", "caption_dropout": 0.1}
    trainer = fit(make(latents[0]), tmp_path / "latents", tmp_path, 3, data=data)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_the_pipeline_knows_what_its_denoiser_was_trained_on(latents: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(latents[0])
    fit(module, latents[1], tmp_path, 1)
    saved = tmp_path / "pipeline"
    module.save(saved)
    autoencoder = autoencoder_hash(load_autoencoder(latents[0]))
    trained_on = {
        "autoencoder": autoencoder,
        "text_encoder": module.encoders.text_encoders[0].hash,
        "latent_shape": [4, 16, 16],
    }
    trained_on["latent_statistics"] = statistics_hash(module.encoders.autoencoder)
    assert load_pipeline(saved).config["trained_on"] == trained_on
    other = new_autoencoder(tmp_path / "other", 1)
    shutil.move(saved / "vae", tmp_path / "own")
    shutil.copytree(other, saved / "vae")
    found = autoencoder_hash(load_autoencoder(other))
    with pytest.raises(UsageError) as refused:
        load_pipeline(saved)
    expected = f"vae/ of the pipeline is autoencoder {found[:12]}, but its denoiser was trained with {autoencoder[:12]}"
    assert str(refused.value) == f"{saved}: {expected}; put that one back"
    shutil.rmtree(saved / "vae")
    shutil.move(tmp_path / "own", saved / "vae")
    for file, change, expected in (
        ("text_encoder/config.json", {"layer_norm_eps": 1e-6}, "text_encoder/ of the pipeline is text encoder "),
        ("vae/config.json", {"latents_std": [1.0] * 4}, "vae/config.json of the pipeline has latent statistics "),
        ("vae/config.json", {"latents_mean": [float("nan")] * 4}, "statistics of latents must be a finite mean"),
        ("vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "channel 1 of the latents has a standard deviation of 0"),
        ("vae/config.json", {"latents_std": None}, "vae/config.json of the pipeline has latent statistics "),
        ("vae/config.json", {"latents_std": [1.0]}, "statistics of latents must be"),
        ("transformer/config.json", {"sample_size": 32}, "sample_size in transformer/config.json .* is 32, but it was saved"),
    ):
        before = (saved / file).read_text()
        (saved / file).write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(UsageError, match=expected):
            load_pipeline(saved)
        (saved / file).write_text(before)
    load_pipeline(saved)


def test_micro_conditioning_trains_on_the_sizes_of_the_images_and_samples_by_those_asked_for(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"in_channels": 4, "sample_size": 16, "patch_size": 4, "width": 32, "caption_channels": 8}
    module = make(latents[0], denoiser=DiT(num_layers=1, num_attention_heads=2, micro_conditioning=True, **sizes))
    trainer = fit(module, latents[1], tmp_path, 10)
    batch = noisy_batch(module, datamodule_of(trainer), 3, 1)
    batch["original_size"][0] = torch.tensor([64, 48])
    sizes_seen = module.encode(batch)[1].sizes
    assert sizes_seen is not None and sizes_seen.tolist() == [[64, 48, 0, 0, 32, 32], [32, 32, 0, 0, 32, 32]]
    module.save(tmp_path / "pipeline")
    pipeline = load_pipeline(tmp_path / "pipeline")

    def sample(**sizes: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a red ring", num_inference_steps=2, generator=generator, output_type="latent", **sizes).images

    asked = sample(original_size=(32, 32), crops_coords_top_left=(0, 0))
    assert torch.equal(sample(), asked) and not torch.equal(sample(original_size=(8, 8)), asked)
    settings = GenerationSettings("a red ring", steps=2, original_width=8, original_height=16, crop_left=3)
    (image,) = ImageGenerator(pipeline).generate([settings])
    given = sample(original_size=(16, 8), crops_coords_top_left=(0, 3))
    assert np.array_equal(np.asarray(image.image), np.asarray(pipeline.decode(given)[0]))
    for wrong in ({"original_size": (8,)}, {"crops_coords_top_left": (-1, 0)}, {"original_size": "8"}):
        with pytest.raises(UsageError, match="give two whole numbers"):
            sample(**wrong)
    online = make(latents[0], denoiser=module.denoiser, online=True, text_encoder=tiny_text_encoder)
    data = datamodule_of(fit(online, image_shards, tmp_path, 1))
    own, exported = (noisy_batch(module, each, 3, 1) for module, each in ((online, data), (module, datamodule_of(trainer))))
    assert torch.equal(own["original_size"], exported["original_size"]) and torch.equal(own["crop"], exported["crop"])
    plain = make(latents[0])
    fit(plain, latents[1], tmp_path, 1)
    with pytest.raises(UsageError, match="made without micro-conditioning"):
        plain.pipeline()("a red ring", original_size=(8, 8))


# -- the averages ----------------------------------------------------------------------------------------------------


def test_an_average_reconstructed_after_training_is_the_one_kept_in_it(latents: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(latents[0], power_averages=PowerAverages([0.05, 0.075, 0.1], snapshot_every=6))
    fit(module, latents[1], tmp_path, 60, callbacks=[AverageSnapshots()])
    snapshots = find_snapshots(tmp_path)
    assert [one.step for one in snapshots] == [step for step in range(6, 61, 6) for _ in range(3)]
    made, _ = reconstruct([one for one in snapshots if one.sigma_rel != 0.075], 0.075)
    error = total = 0.0
    kept = module.average.power[0.075].shadow_params
    for (name, trained), average in zip(module.denoiser.named_parameters(), kept, strict=True):
        error += float((made[name] - average).square().sum())
        total += float((trained.detach() - average).square().sum())
    assert error**0.5 < 0.02 * total**0.5  # against how far averaging takes the weights


def test_the_selected_average_is_applied_and_a_checkpoint_has_them_all(latents: tuple[Path, Path], tmp_path: Path) -> None:
    averages = {"power_averages": PowerAverages([0.05, 0.1], selected=0.1)}
    module = make(latents[0], **averages)
    trainer = fit(module, latents[1], tmp_path, 4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = make(latents[0], **averages)
    again.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert again.num_images_seen == module.num_images_seen == 32
    for ours, theirs in zip(again.average.all(), module.average.all(), strict=True):
        assert ours.optimization_step == 4
        assert all(torch.equal(*pair) for pair in zip(ours.shadow_params, theirs.shadow_params, strict=True))
    with again.average_applied():
        applied = [parameter.clone() for parameter in again.denoiser.parameters()]
    assert all(torch.equal(*pair) for pair in zip(applied, module.average.power[0.1].shadow_params, strict=True))


@pytest.mark.parametrize("accumulate", [3, 8])
def test_micro_batches_are_the_batch(latents: tuple[Path, Path], tmp_path: Path, accumulate: int) -> None:
    """The same weights up to rounding, and one step and one average a batch; 3 splits 8 samples unevenly."""
    whole, split = make(latents[0]), make(latents[0], accumulate=accumulate)
    for module in (whole, split):
        fit(module, latents[1], tmp_path, 3)
    torch.testing.assert_close(
        *(parameters_to_vector(module.denoiser.parameters()) for module in (whole, split)), atol=1e-4, rtol=0
    )
    assert whole.global_step == split.global_step == split.average.step == 3 and split.num_images_seen == 24


def test_the_command_line_makes_a_pipeline_of_any_average(latents: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = {"max_steps": 12, "val_check_interval": 12}
    config = write_config(tmp_path / "config.yaml", latents, trainer, power_averages={"snapshot_every": 2, "selected": 0.1})
    dispatch(["denoiser", "fit", "--config", str(config), "--out", str(tmp_path / "run")])
    export_average(DenoiserTraining, tmp_path / "run", tmp_path / "made", 0.1)
    made, exported_one = (load_pipeline(folder).transformer for folder in (tmp_path / "made", tmp_path / "run/pipeline"))
    for ours, theirs in zip(made.parameters(), exported_one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)  # 0.1 was stored and is the selected one
    dispatch(["denoiser", "export", str(tmp_path / "run"), str(tmp_path / "card"), "--model-card"])
    assert "power-function average of relative length 0.1" in (tmp_path / "card/README.md").read_text()
    with pytest.raises(UsageError, match="no average was stored at step 5; give one of 2, 4, 6, 8, 10, 12"):
        export_average(DenoiserTraining, tmp_path / "run", tmp_path / "other", 0.07, 5)


# -- the validation loss ---------------------------------------------------------------------------------------------


def test_the_validation_loss_is_that_of_the_objective_whatever_the_batch_size(
    latents: tuple[Path, Path], tmp_path: Path, randomised: Callable
) -> None:
    module = make(latents[0], optimiser=MuonConfig(0.0))
    randomised(module.denoiser)
    metrics = []
    for batch_size in (10, 3):
        trainer = fit(module, latents[1], tmp_path, 1, {"batch_size": batch_size})
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")})
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    x0, condition = module.encode(datamodule_of(module.trainer).validation_set.batch(range(10)))
    t, eps = fixed_noise(0, x0)
    with module.average_applied():
        loss = module.objective(module.denoiser, x0, condition, t, eps).unweighted
    assert metrics[0]["val/loss"] == pytest.approx(float(loss.mean()), rel=1e-5)
    for number in range(10):
        inside = (t >= number / 10) & (t < (number + 1) / 10)
        assert bool(inside.any()) == (f"val/loss_bin_{number:02d}" in metrics[0])
        if inside.any():
            assert metrics[0][f"val/loss_bin_{number:02d}"] == pytest.approx(float(loss[inside].mean()), rel=1e-5)


def test_validation_times_are_spread_evenly_and_noise_is_each_samples_own() -> None:
    t, eps = fixed_noise(0, torch.zeros(256, 4, 8, 8))
    counts = torch.histc(t, 10, 0, 1)
    assert counts.min() >= 25 and counts.max() <= 26
    assert abs(float(eps.mean())) < 4 / eps.numel() ** 0.5 and float(eps.std()) == pytest.approx(1, abs=0.02)
    later_t, later_eps = fixed_noise(100, torch.zeros(7, 4, 8, 8))
    assert torch.equal(later_t, t[100:107]) and torch.equal(later_eps, eps[100:107])


# -- images encoded on the fly -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_online_gives_the_loss_of_exported_latents(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, dropout: float, randomised: Callable
) -> None:
    losses, statistics = [], []
    for shards, online in ((latents[1], False), (image_shards, True)):
        data = ShardDataModule(str(shards), str(shards), batch_size=4, caption_dropout=dropout)
        data.setup("fit")
        module = make(latents[0], online=online, text_encoder=tiny_text_encoder if online else None)
        if online:  # they would be measured by a trainer
            module.statistics = statistics[0]
        module.prepare(data)
        statistics.append(module.encoders.statistics)
        randomised(module.denoiser)
        module.seed = 2
        batch = noisy_batch(module, data, 3, 1, 4, 9)
        x0, condition = module.encode(batch)
        losses.append(module.objective(module.denoiser, x0, condition, batch["t"], batch["eps"]).loss)
        if dropout:  # every caption is the empty one
            torch.testing.assert_close(condition.embeddings, condition.embeddings[:1].expand_as(condition.embeddings))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)


def test_online_in_buckets_gives_the_latents_of_an_export(
    latents: tuple[Path, Path], tmp_path: Path, tiny_text_encoder: str
) -> None:
    """Wide, square and upright images: latents and sizes are those of an export."""
    shards = write_photographs(tmp_path / "x", [(90, 60)] * 4 + [(64, 64)] * 3 + [(60, 90)] * 2)
    export_latents(latents[0], shards, tmp_path / "latents", tiny_text_encoder, dtype="float32", buckets=Buckets((32,), 8))
    info = latent_info(open_source(tmp_path / "latents"))
    online = make(latents[0], online=True, text_encoder=tiny_text_encoder)
    online.statistics = info.latents_mean, info.latents_std
    fit(online, shards, tmp_path, 3, {"batch_size": 2, "crop": "bucket", "buckets": [32], "bucket_step": 8})
    assert tuple(online.encoders.latent_shapes) == info.latent_shapes == ((4, 12, 20), (4, 16, 16), (4, 20, 12))
    encoded = LatentDataset(tmp_path / "latents")
    stored = {encoded.name_of(number)[1]: torch.as_tensor(encoded[number]["mean"]) for number in range(len(encoded))}
    dataset = datamodule_of(online.trainer).train_set
    batches = [dataset.batch(rows) for rows in dataset.batches_of_one_size(range(9), 2)]
    pairs = [zip(batch["key"], online.encoders.encode(batch)["mean"], strict=True) for batch in batches]
    found = dict(chain.from_iterable(pairs))
    assert len(found) == 9 and all(torch.allclose(mean, stored[key], atol=1e-4) for key, mean in found.items())


def test_online_encodes_in_the_precision_that_is_asked_for(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str
) -> None:
    """Whatever the autocast of training. The results are fp32, and those of bf16 have bf16's error."""
    data = ShardDataModule(str(image_shards), str(image_shards), batch_size=4)
    data.setup("fit")
    module = make(latents[0], online=True, online_precision="bf16", text_encoder=tiny_text_encoder)
    module.statistics = [0.0] * 4, [1.0] * 4
    module.prepare(data)
    batch = data.train_set.batch([PlannedSample(number, number) for number in (3, 1, 4, 9)])
    with torch.autocast("cpu", torch.bfloat16):
        exact, rounded = module.encoders.encode(batch), module.encoders.encode(batch, "bf16")
        z, _ = module.encode(batch)
    torch.testing.assert_close(module.encoders.encode(batch), exact, rtol=0, atol=0)
    assert torch.equal(z, rounded["mean"])
    assert {values.dtype for values in (*exact.values(), *rounded.values()) if values.is_floating_point()} == {torch.float32}
    error = (rounded["mean"] - exact["mean"]).norm() / exact["mean"].norm()
    assert 1e-4 < error < 2e-2 and not torch.equal(rounded["text"], exact["text"])
    with pytest.raises(UsageError, match="online_precision bf16, but nothing is encoded; set online"):
        make(latents[0], online_precision="bf16")


def test_online_statistics_are_measured_kept_and_shipped(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, tmp_path: Path
) -> None:
    module = make(latents[0], online=True, text_encoder=tiny_text_encoder)
    trainer = fit(module, image_shards, tmp_path, 2)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    exact = json.loads((latents[1] / "manifest.json").read_text())
    measured = module.encoders.statistics
    for values, name in zip(measured, ("latents_mean", "latents_std"), strict=True):
        np.testing.assert_allclose(values, exact[name], rtol=1e-3, atol=1e-3)  # all ten images, in fp32
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["latent_statistics"] == [list(values) for values in measured]
    module.save(tmp_path / "pipeline")
    assert load_pipeline(tmp_path / "pipeline").vae.config.latents_std == measured[1]
    # an export has no trainer to measure with
    again = make(latents[0], online=True, text_encoder=tiny_text_encoder)
    again.on_load_checkpoint(checkpoint)
    data = ShardDataModule(str(image_shards), str(image_shards))
    data.setup("fit")
    again.prepare(data)
    assert [*map(list, again.encoders.statistics)] == checkpoint["latent_statistics"]


def test_online_takes_the_statistics_of_the_autoencoders_directory(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, tmp_path: Path
) -> None:
    autoencoder = load_autoencoder(latents[0])
    set_latent_statistics(autoencoder, [0.5] * 4, [2.0] * 4)
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    module = make(tmp_path / "autoencoder", online=True, text_encoder=tiny_text_encoder)
    fit(module, image_shards, tmp_path, 1)
    assert [*map(list, module.encoders.statistics)] == [[0.5] * 4, [2.0] * 4]


def test_fp8_is_refused_on_a_cpu(latents: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"fp8 needs a GPU of compute capability 8\.9 or more .*, and this is cpu"):
        fit(make(latents[0], fp8=True, compile=True), latents[1], tmp_path, 1)


def test_shards_of_the_other_kind_are_refused(latents: tuple[Path, Path], image_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without online trains on ldm-latent-shards; .* ldm latents export"):
        fit(make(latents[0]), image_shards, tmp_path, 1)
    with pytest.raises(UsageError, match="with online trains on ldm-image-shards; set online to false"):
        fit(make(latents[0], online=True), latents[1], tmp_path, 1)


def test_latents_and_their_text_encoder_may_move(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, tmp_path: Path
) -> None:
    """Together they are found, apart they are given; another text encoder is refused."""
    shutil.copytree(tiny_text_encoder, tmp_path / "a" / "text")
    export_latents(latents[0], image_shards, tmp_path / "a" / "latents", str(tmp_path / "a" / "text"))
    (tmp_path / "a").rename(tmp_path / "b")
    fit(make(latents[0]), tmp_path / "b" / "latents", tmp_path, 1)
    (tmp_path / "b" / "text").rename(tmp_path / "text")
    with pytest.raises(
        UsageError, match=r"latents was exported with text encoder text \(\w{12}\); if it has moved, give it as"
    ):
        fit(make(latents[0]), tmp_path / "b" / "latents", tmp_path, 1)
    fit(make(latents[0], text_encoder=str(tmp_path / "text")), tmp_path / "b" / "latents", tmp_path, 1)
    with pytest.raises(UsageError, match=r"was exported with text encoder \w{12}, but minilm is \w{12}; give the one it was"):
        fit(make(latents[0], text_encoder="minilm"), tmp_path / "b" / "latents", tmp_path, 1)


@pytest.mark.parametrize(
    ("denoiser", "data", "named"),
    [
        ({"caption_channels": 64}, {}, "caption_channels is 64, but captions are encoded by minilm of width 384; change it"),
        ({"in_channels": 8}, {}, "in_channels is 8, but the latents need 4"),
        ({}, {"image_size": 31}, "images of 31 x 31 in .* are not multiples of the .* factor 2"),
        ({}, {"validation_whole": True}, "validation_whole is for stage one"),
    ],
)
def test_online_sizes_that_do_not_fit_are_refused(
    latents: tuple[Path, Path], image_shards: Path, tmp_path: Path, denoiser: dict, data: dict, named: str
) -> None:
    sizes: dict[str, Any] = {"in_channels": 4, "sample_size": 16, "caption_channels": 384} | denoiser
    module = make(latents[0], online=True, denoiser=DiT(patch_size=4, width=32, num_layers=1, num_attention_heads=2, **sizes))
    with pytest.raises(UsageError, match=named):
        fit(module, image_shards, tmp_path, 1, data)


# -- skipped steps and refusals --------------------------------------------------------------------------------------


class Poison(Callback):
    """Puts a NaN into some batches, and keeps the weights and averages before each step."""

    def __init__(self, batches: set[int]) -> None:
        self.batches, self.weights, self.averages = batches, [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int) -> None:
        assert isinstance(pl_module, DenoiserTraining)
        if batch_idx in self.batches:
            batch["mean"][3, 1, 0, 0] = torch.nan
        self.weights.append(parameters_to_vector(pl_module.denoiser.parameters()).clone())
        self.averages.append(parameters_to_vector(pl_module.average.exponential.shadow_params).clone())


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_step_with_nan_is_skipped_and_counted_with_its_samples(
    latents: tuple[Path, Path], tmp_path: Path, log_every: int
) -> None:
    """Weights and averages do not change; the step counts, and training continues.

    What became of a step is known at its end where it is logged, and in the next step where it is not.
    """
    module, poison = make(latents[0]), Poison({2, 3})
    trainer = fit(module, latents[1], tmp_path, 6, callbacks=[poison], log_every_n_steps=log_every)
    assert trainer.global_step == 6 and module.skips.total == 2 and module.average.step == 4
    moved = [[not torch.equal(*pair) for pair in pairwise(values)] for values in (poison.weights, poison.averages)]
    taken = [True, True, False, False, True]
    assert moved == [taken, taken if log_every == 1 else [False, *taken[:-1]]]
    if log_every == 1:
        assert trainer.callback_metrics["train/skipped"] == 2
    assert all(torch.isfinite(parameter).all() for parameter in module.denoiser.parameters())
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["network"], len(line["samples"])) for line in lines]
    assert steps == [(2, "denoiser", 8), (3, "denoiser", 8)]
    train_set = datamodule_of(trainer).train_set
    names = {train_set.name_of(number) for number in range(len(train_set))}
    assert {tuple(sample.values()) for line in lines for sample in line["samples"]} <= names


def test_too_many_such_steps_in_a_row_stop_the_run(latents: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(LdmError, match=r"not finite 3 times in a row, at step 4; .*skipped\.jsonl") as error:
        fit(make(latents[0], max_skipped=2), latents[1], tmp_path, 9, callbacks=[Poison({2, 3, 4})])
    assert "\n" not in str(error.value)


def prepared(latents: tuple[Path, Path], randomised: Callable) -> tuple[DenoiserTraining, ShardDataModule]:
    """A module with random weights and a seed, as it is before the first step, and its data."""
    data = ShardDataModule(str(latents[1]), str(latents[1]), batch_size=4)
    data.setup("fit")
    module = make(latents[0])
    module.seed = 5
    module.prepare(data)
    randomised(module.denoiser)
    return module, data


def test_a_sample_s_noise_does_not_depend_on_its_batch(latents: tuple[Path, Path], randomised: Callable) -> None:
    """The losses of two halves are those of the whole batch, and of the same planned samples in another batch."""
    module, data = prepared(latents, randomised)

    def losses(*numbers: int) -> torch.Tensor:
        batch = noisy_batch(module, data, *numbers)
        x0, condition = module.encode(batch)
        return module.objective(module.denoiser, x0, condition, batch["t"], batch["eps"]).loss

    whole = losses(3, 1, 4, 9)
    torch.testing.assert_close(torch.cat([losses(3, 1), losses(4, 9)]), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses(9, 4).flip(0), whole[2:], rtol=1e-5, atol=1e-6)


def test_padding_of_captions_changes_no_bit_of_the_loss_on_a_cpu(latents: tuple[Path, Path], randomised: Callable) -> None:
    module, data = prepared(latents, randomised)
    batch = noisy_batch(module, data, 3, 1, 4, 9)
    longest = int(batch["text_mask"].sum(1).max())
    cut = {name: batch[name][:, :longest].clone() for name in ("text", "text_mask")}
    assert batch["text"].shape[1] % 16 == 0 < batch["text"].shape[1] - longest
    losses = [module.loss_terms(each)["train/loss"] for each in (batch, batch | cut)]
    assert torch.equal(*losses)


def test_latents_that_the_patch_does_not_divide_are_refused(latents: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(latents[1], tmp_path / "latents")
    edit_manifest(tmp_path / "latents", lambda manifest: manifest.update(latent_shapes=[[4, 14, 16]]))
    with pytest.raises(UsageError, match=r"latents of 16 x 14 are not multiples of the denoiser's patch_size 4"):
        fit(make(latents[0]), tmp_path / "latents", tmp_path, 1)


def test_a_checkpoint_of_another_shape_is_refused_with_its_keys(latents: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = fit(make(latents[0]), latents[1], tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other = DiT(in_channels=4, sample_size=16, patch_size=2, width=32, num_layers=1, num_attention_heads=2, caption_channels=8)
    with pytest.raises(UsageError) as refused:
        make(latents[0], denoiser=other).on_load_checkpoint(checkpoint)
    message = str(refused.value)
    assert "patch_embed.weight: (32, 4, 4, 4) there, (32, 4, 2, 2) here" in message and "more); give the config" in message
    assert "\n" not in message


def test_the_switches_reach_every_block(latents: tuple[Path, Path], tmp_path: Path) -> None:
    module = make(latents[0], gradient_checkpointing=True, compile=True)
    with torch.compiler.set_stance("force_eager"):  # compiling takes half a minute
        fit(module, latents[1], tmp_path, 1)
    assert module.denoiser.gradient_checkpointing
    assert all(block._compiled_call_impl is not None for block in module.denoiser.blocks)
    assert not any("_orig_mod" in name for name in module.denoiser.state_dict())
