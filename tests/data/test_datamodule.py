from collections import Counter
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ldm.data.datamodule import ShardDataModule, WeightedSource
from ldm.data.image_dataset import ImageDataset
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import Chunk, write_null_text
from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.plan import Plan
from ldm.data.writer import ShardWriter, write_images
from ldm.errors import UsageError
from tests import samples
from tests.samples import same, write_photographs

INFO = replace(samples.INFO, resolution=16)


def write_latents(folder, count=10, info=INFO, sizes=((2, 2),)):
    """Latents that hold their own number, -1 - that where mirrored; captions of their number, the second one plus a half.

    Chunks of four, of the ``sizes`` in turn.
    """
    folder.mkdir()
    numbers = np.arange(count, dtype=np.float32)[:, None, None, None]
    latents = {"mean": numbers, "std": numbers}
    if info.flips:
        latents |= {f"{name}_flip": -1 - array for name, array in latents.items()}
    keys = [str(index) for index in range(count)]
    captions = [[key, key] if info.captions == "all" else [key] for key in keys]
    texts = [
        [np.full((1 + i % 3, text.width), i + j / 2, np.float32) for i in range(count) for j in range(len(captions[i]))]
        for text in info.text_encoders
    ]
    runs = []
    with ShardWriter(folder, "latents") as writer:
        for start in range(0, count, 4):
            some, few = slice(start, start + 4), len(captions[0])
            number, size = start // 4 % len(sizes), len(keys[some])
            chunk = {name: np.broadcast_to(array[some], (size, 4, *sizes[number])) for name, array in latents.items()}
            words = [text[start * few : (start + 4) * few] for text in texts]
            members = Chunk(keys[some], captions[some], chunk, words, np.full((size, 2), 16), np.full((size, 4), 16)).members()
            writer.write(f"{start:08d}", members)
            runs.append((number, size))
    write_null_text(folder, [np.full((2, text.width), 7.25, np.float32) for text in info.text_encoders])
    if len(sizes) > 1:
        shapes = tuple((4, *size) for size in sizes)
        info = replace(info, latent_shapes=shapes, shard_shapes={writer.entries[0].name: tuple(runs)})
    Manifest(LATENT_SHARDS, (replace(writer.entries[0], samples=count),), info.as_extra()).save(folder)
    return folder


@pytest.fixture(scope="module")
def latent_shards(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("shards") / "latents")


@pytest.fixture(params=["images", "latents"])
def folder(request, image_shards, latent_shards):
    return {"images": image_shards, "latents": latent_shards}[request.param]


def module(folder, **settings):
    made = ShardDataModule(str(folder), str(folder), batch_size=3, seed=5, **settings)
    made.setup("fit")
    return made


def take(loader, count):
    """The first batches, without what the loader adds; an endless loader's workers end with its iterator."""
    batches = list(islice(iter(loader), count))
    return [{name: value for name, value in batch.items() if name not in ("draws", "position")} for batch in batches]


def test_training_batches_follow_the_plan_without_end(folder):
    made = module(folder)
    kind = LatentDataset if "latents" in str(folder) else ImageDataset
    dataset = kind(folder)
    assert type(made.train_set) is kind
    found = take(made.train_dataloader(), 8)
    plan = Plan(tuple(shard.samples for shard in Manifest.load(folder).shards), seed=5)
    for batch, draws in zip(found, islice(plan.batches(3), 8), strict=True):
        assert same(batch, dataset.collate([dataset[draw.sample] for draw in draws]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_no_batch(folder, workers):
    plain, parallel = module(folder), module(folder, workers=workers)
    for ours, theirs in zip(take(plain.train_dataloader(), 7), take(parallel.train_dataloader(), 7), strict=True):
        assert same(ours, theirs)
    for ours, theirs in zip(plain.val_dataloader(), parallel.val_dataloader(), strict=True):
        assert same(ours, theirs)


def test_validation_is_the_first_samples_always_in_order(folder):
    made = module(folder, validation_samples=7)
    made.setup("validate")
    sizes = [len(batch["text_mask"] if "text_mask" in batch else batch["key"]) for batch in made.val_dataloader()]
    assert sizes == [3, 3, 1]
    for batch, again in zip(made.val_dataloader(), made.val_dataloader(), strict=True):
        assert same(batch, again)
    dataset = made.validation_set
    batch = next(iter(made.val_dataloader()))
    assert batch.pop("bad") == [[], [], []]
    assert same(batch, dataset.collate([dataset[index] for index in range(3)]))
    assert sum(1 for _ in module(folder, validation_samples=1000).val_dataloader()) == 4


def test_dropped_captions_are_the_null_text_at_the_rate_asked_for(latent_shards, image_shards):
    latents = module(latent_shards, caption_dropout=0.3)
    texts = [
        text[mask.bool()]
        for batch in take(latents.train_dataloader(), 200)
        for text, mask in zip(batch["text"], batch["text_mask"], strict=True)
    ]
    dropped = [torch.equal(text, torch.full((2, 6), 7.25)) for text in texts]
    assert abs(np.mean(dropped) - 0.3) < 4 * (0.3 * 0.7 / 600) ** 0.5
    captions = [
        caption
        for batch in take(module(image_shards, caption_dropout=0.3).train_dataloader(), 200)
        for caption in batch["caption"]
    ]
    assert abs(captions.count("") / 600 - 0.3) < 4 * (0.3 * 0.7 / 600) ** 0.5
    assert all(all(batch["caption"]) for batch in module(image_shards, caption_dropout=1.0).val_dataloader())


def test_flips_mirror_half_the_images_and_workers_agree(image_shards):
    made, parallel = module(image_shards, flip=0.5), module(image_shards, flip=0.5, workers=2)
    plain = {sample["key"]: sample["image"] for sample in (made.train_set[index] for index in range(10))}
    batches = take(made.train_dataloader(), 60)
    flipped = []
    for batch in batches:
        for key, image in zip(batch["key"], batch["image"].numpy(), strict=True):
            mirrored = np.array_equal(image, plain[key][:, :, ::-1])
            assert mirrored or np.array_equal(image, plain[key])
            flipped.append(mirrored)
    assert abs(np.mean(flipped) - 0.5) < 4 * 0.5 / 180**0.5
    for ours, theirs in zip(batches[:9], take(parallel.train_dataloader(), 9), strict=True):
        assert same(ours, theirs)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Nine images of noise of several sizes, one smaller than the rest: their folder and pixels (H, W, 3)."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    shapes = [(24, 40), (40, 24), (33, 17), (24, 40), (24, 40), (50, 51), (10, 30), (40, 24), (64, 20)]
    pixels = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    write_images(folder, "x", [(f"{index}", image, "noise") for index, image in enumerate(pixels)], samples_per_shard=4)
    return folder, pixels


@pytest.mark.filterwarnings("ignore")
def test_windows_are_those_of_their_draws_whatever_the_workers_and_after_a_resume(photographs):
    folder, pixels = photographs
    settings = {"image_size": 16, "crop": "window", "flip": 0.5}
    found = take(module(folder, **settings).train_dataloader(), 9)
    for batch in found:
        for key, image in zip(batch["key"], batch["image"].permute(0, 2, 3, 1).numpy(), strict=True):
            if key != "6":  # that one was scaled
                windows = np.lib.stride_tricks.sliding_window_view(pixels[int(key)], (16, 16, 3))
                assert any((windows == variant).all((-3, -2, -1)).any() for variant in (image, image[:, ::-1]))
    for ours, theirs in zip(found, take(module(folder, workers=2, **settings).train_dataloader(), 9), strict=True):
        assert same(ours, theirs)
    stopped, resumed = (module(folder, **settings).train_dataloader() for _ in range(2))
    take(stopped, 4)
    resumed.load_state_dict(stopped.state_dict())
    for ours, theirs in zip(found[4:], take(resumed, 5), strict=True):
        assert same(ours, theirs)


def test_without_a_draw_windows_lie_in_the_centre(photographs):
    folder, pixels = photographs
    batches = module(folder, image_size=16, crop="window", flip=1.0).val_dataloader()
    for key, image in ((int(key), image) for batch in batches for key, image in zip(batch["key"], batch["image"], strict=True)):
        height, width = (side - 16 for side in pixels[key].shape[:2])
        centre = pixels[key][height // 2 : height // 2 + 16, width // 2 : width // 2 + 16]
        assert image.shape == (3, 16, 16) and (key == 6 or np.array_equal(image.permute(1, 2, 0), centre))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_whole_images_are_validated_one_by_one_while_training_is_on_crops(photographs, workers):
    folder, pixels = photographs
    made = module(folder, image_size=16, crop="window", validation_whole=True, validation_samples=8, workers=workers)
    loader = made.val_dataloader()
    for batches in (list(loader), list(loader)):  # all held, so that none is written over
        assert [batch["key"] for batch in batches] == [[f"{index}"] for index in range(8)]
        for batch, original in zip(batches, pixels, strict=False):
            assert batch["bad"] == [[]] and np.array_equal(batch["image"][0].permute(1, 2, 0), original)
    assert all(batch["image"].shape == (3, 3, 16, 16) for batch in take(made.train_dataloader(), 4))
    assert len(list(module(folder, image_size=8, validation_whole=True).val_dataloader())) == 9


def test_windows_and_whole_images_are_refused_where_they_cannot_be(image_shards, latent_shards):
    refusals = {
        r"^crop is window, but .* holds latents.* set it to centre$": (latent_shards, {"crop": "window", "image_size": 8}),
        r"^validation_whole is True, but .* holds latents.* set it to False$": (latent_shards, {"validation_whole": True}),
        r"^crop window .*; set image_size$": (image_shards, {"crop": "window", "validation_whole": True}),
    }
    for message, (folder, settings) in refusals.items():
        with pytest.raises(UsageError, match=message):  # "." is no end of line: one line each
            module(folder, **settings)


def test_a_mixture_holds_its_weights(tmp_path):
    for name, count in (("a", 8), ("b", 4)):
        images = [(f"{name}{index}", np.full((8, 8, 3), index, np.uint8), name) for index in range(count)]
        write_images(tmp_path / name, name, images, samples_per_shard=3)
    sources = [WeightedSource(str(tmp_path / "a"), 0.5), WeightedSource(str(tmp_path / "b"), 2.0)]
    made = ShardDataModule(sources, str(tmp_path / "a"), batch_size=3)
    made.setup("fit")
    counts = Counter(key for batch in take(made.train_dataloader(), 8) for key in batch["key"])  # two epochs of 12
    assert counts == {f"a{index}": 1 for index in range(8)} | {f"b{index}": 4 for index in range(4)}


def test_kinds_are_not_mixed_and_shares_are_shares(image_shards, latent_shards):
    with pytest.raises(UsageError, match="mix image shards and latent shards"):
        ShardDataModule([WeightedSource(str(image_shards)), WeightedSource(str(latent_shards))], str(image_shards)).setup("fit")
    with pytest.raises(UsageError, match=r"caption_dropout is 1.5; give 0 to 1"):
        module(image_shards, caption_dropout=1.5)


def drawn(batches):
    """Of every latent in the batches: its number, whether it is mirrored, which caption it has, None for none."""
    found = []
    for batch in batches:
        for mean, std, text in zip(batch["mean"], batch["std"], batch["text"], strict=True):
            assert torch.equal(mean, std) and mean.unique().numel() == 1
            number, mirrored = (mean.max().item(), False) if mean.max() >= 0 else (-1 - mean.max().item(), True)
            caption = (text[0, 0].item() - number) * 2
            found.append((number, mirrored, None if text[0, 0] == 7.25 else caption))
    return found


@pytest.mark.filterwarnings("ignore")
def test_latents_are_mirrored_and_their_captions_chosen_whatever_the_workers_and_after_a_resume(latent_shards):
    settings = {"flip": 0.3, "caption": "random", "caption_dropout": 0.2}
    batches = take(module(latent_shards, **settings).train_dataloader(), 200)
    found = drawn(batches)
    assert Counter(number for number, _, _ in found) == dict.fromkeys(range(10), 60)
    shares = {
        "mirrored": (0.3, [mirrored for _, mirrored, _ in found]),
        "dropped": (0.2, [caption is None for _, _, caption in found]),
        "second": (0.5, [caption == 1 for _, _, caption in found if caption is not None]),
    }
    for share, values in shares.values():
        assert abs(np.mean(values) - share) < 4 * (share * (1 - share) / len(values)) ** 0.5
    for ours, theirs in zip(batches[:9], take(module(latent_shards, workers=2, **settings).train_dataloader(), 9), strict=True):
        assert same(ours, theirs)
    for workers in (0, 2):
        stopped, resumed = (module(latent_shards, workers=workers, **settings).train_dataloader() for _ in range(2))
        take(stopped, 4)
        resumed.load_state_dict(stopped.state_dict())
        for ours, theirs in zip(batches[4:], take(resumed, 5), strict=False):
            assert same(ours, theirs)
    assert {(mirrored, caption) for _, mirrored, caption in drawn(module(latent_shards, **settings).val_dataloader())} == {
        (False, 0)
    }


@pytest.mark.filterwarnings("ignore")
def test_batches_that_workers_made_stay_as_they_are(latent_shards):
    """They lie in memory that is written again and again; texts of one to three tokens need more and less of it."""
    parallel = list(islice(iter(module(latent_shards, workers=2).train_dataloader()), 20))
    for ours, theirs in zip(take(module(latent_shards).train_dataloader(), 20), parallel, strict=True):
        assert same(ours | {name: theirs[name] for name in ("draws", "position")}, theirs)
        assert not any(value.is_shared() for value in theirs.values() if isinstance(value, torch.Tensor))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"max_tokens": 16}])
def test_batches_of_latents_of_several_sizes_are_each_of_one(tmp_path, settings):
    """In training each sample is in a batch once an epoch, or waits for one; in validation each is in one."""
    sizes = ((2, 2), (4, 2), (2, 3))
    folder = write_latents(tmp_path / "latents", 30, sizes=sizes)
    made = module(folder, validation_samples=20, **settings)
    loader = made.train_dataloader()
    batches, seen = list(islice(loader, 40)), []
    for batch in batches:
        number, (samples, _) = len(batch["draws"]), batch["draws"].T
        shape = sizes[samples[0] // 4 % 3]
        assert number == (16 // (shape[0] * shape[1]) if settings else 3) and batch["mean"].shape == (number, 4, *shape)
        assert batch["mean"][:, 0, 0, 0].tolist() == samples.tolist()
        seen += samples.tolist()
    state = loader.state_dict()
    seen += [sample for sample, _ in state.get("waiting", [])]
    counts = np.bincount(seen, minlength=30)
    assert set(counts - state["epoch"]) <= {0, 1} and counts.sum() == 30 * state["epoch"] + state["samples_consumed"]
    validated = [batch["mean"][:, 0, 0, 0].tolist() for batch in made.val_dataloader()]
    assert [len({sizes[int(number) // 4 % 3] for number in batch}) for batch in validated] == [1] * len(validated)
    assert sorted(chain.from_iterable(validated)) == (np.arange(20) * 30 // 20).tolist()
    parallel = module(folder, validation_samples=20, workers=2, **settings)
    for ours, theirs in zip(batches, islice(parallel.train_dataloader(), 40), strict=True):
        assert same(ours | {"position": None}, theirs | {"position": None})
    with pytest.raises(UsageError, match=r"^max_tokens is 7, but a sample of the largest size has 8; raise it$"):
        module(folder, max_tokens=7).train_dataloader()


PHOTOGRAPHS = [(90, 60), (60, 90), (64, 64), (150, 100), (40, 60), (33, 33), (90, 61), (61, 90), (50, 50), (20, 20)]
BUCKET = {"crop": "bucket", "buckets": [32], "bucket_step": 8}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_images_in_buckets_are_each_of_one_size(tmp_path, workers, caplog):
    """Every image that fits comes as often as any other, and is validated on once; the one that is too small never is."""
    folder = write_photographs(tmp_path / "x", PHOTOGRAPHS)
    made = module(folder, workers=workers, **BUCKET)
    assert "1 of 10 images in" in caplog.text and "fit no bucket" in caplog.text
    batches = [batch for batch in islice(made.train_dataloader(), 9)]
    assert made.buckets is not None and made.train_set.groups is not None
    table, groups = made.buckets.table, made.train_set.groups
    for batch in batches:
        (group,) = {*groups[batch["draws"][:, 0]].tolist()}
        assert tuple(batch["image"].shape[2:]) == table[group]
    drawn = Counter(key for batch in batches for key in batch["key"])
    waiting = batches[-1]["position"].waiting
    drawn.update(f"{sample:02d}" for sample in ([] if waiting is None else waiting[:, 0].tolist()))
    assert len({batch["image"].shape for batch in batches}) == 3 and max(drawn.values()) - min(drawn.values()) <= 1
    assert "09" not in drawn and len(drawn) == 9
    assert Counter(key for batch in made.val_dataloader() for key in batch["key"]) == Counter(f"{n:02d}" for n in range(9))


def test_buckets_that_cannot_be_are_refused(tmp_path, latent_shards):
    folder = write_photographs(tmp_path / "x", PHOTOGRAPHS)
    refusals = {
        "crop is bucket and buckets is None; give buckets, for example": {"crop": "bucket"},
        "crop is centre and buckets is .*; set crop to bucket": {"buckets": [32]},
        "image_size is 32, but buckets give": BUCKET | {"image_size": 32},
        "2 of 10 images in .* fit no bucket: .* or max_bad_share to 0.2 to leave them out": BUCKET | {"buckets": [40]},
        "10 of 10 images in .* fit no bucket": BUCKET | {"max_bad_share": 1.0, "buckets": [512]},
    }
    for message, settings in refusals.items():
        with pytest.raises(UsageError, match=message) as error:
            module(folder, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"crop is bucket, but .* holds latents, exported without; set it to centre"):
        module(latent_shards, **BUCKET)
    manifest = Manifest.load(folder)
    Manifest(manifest.format, manifest.shards).save(folder)  # of before there were sizes
    with pytest.raises(UsageError, match=r"has no sizes of its images; .*ldm shards index"):
        module(folder, **BUCKET)


def test_the_text_encoder_asked_for_is_trained_on_with_its_own_null_text(latent_shards):
    for encoder, width in ((0, 6), (1, 5)):
        made = module(latent_shards, text_encoder=encoder, caption_dropout=0.5)
        found = take(made.train_dataloader(), 8)
        assert {batch["text"].shape[2] for batch in (*found, *made.val_dataloader())} == {width}
        assert len({caption is None for _, _, caption in drawn(found)}) == 2


def test_what_was_not_exported_is_refused(tmp_path, latent_shards):
    first = write_latents(tmp_path / "first", info=replace(INFO, flips=False, captions="first"))
    other = write_latents(tmp_path / "other", info=replace(INFO, autoencoder="b" * 64))
    refusals = {
        rf"^flip is 0.5, but {first} holds .* set it to 0, or export them again: ldm latents export --flip$": (
            first,
            {"flip": 0.5},
        ),
        rf"^caption is random, but {first} holds .* set it to first, .*: ldm latents export --captions all$": (
            first,
            {"caption": "random"},
        ),
        rf"^text_encoder is 2, but {first} was exported with 0: minilm, 1: other; give one of these$": (
            first,
            {"text_encoder": 2},
        ),
        r"^text_encoder is -1, but .*; give one of these$": (first, {"text_encoder": -1}),
    }
    for message, (folder, settings) in refusals.items():
        with pytest.raises(UsageError, match=message):
            module(folder, **settings)
    mixed = ShardDataModule([WeightedSource(str(latent_shards)), WeightedSource(str(other))], str(latent_shards))
    with pytest.raises(UsageError, match=rf"^{other} has another autoencoder than {latent_shards} "):
        mixed.setup("fit")
    some = ShardDataModule([WeightedSource(str(latent_shards)), WeightedSource(str(first))], str(latent_shards), flip=0.5)
    with pytest.raises(UsageError, match=rf"^flip is 0.5, but {first} holds"):
        some.setup("fit")


class Recorder(LightningModule):
    """Trains nothing; writes down what it is given, and may be killed."""

    def __init__(self, die_after=None):
        super().__init__()
        self.weight, self.seen, self.die_after = torch.nn.Parameter(torch.zeros(())), [], die_after

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.die_after:
            raise InterruptedError
        self.seen.append(batch["key"])
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        assert "position" not in batch and "bad" not in batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, out, steps, die_after=None, resume=None, **settings):
    """Train, a checkpoint after every step; returns the keys of the batches in order."""
    data = ShardDataModule(str(folder), str(folder), batch_size=3, seed=5, **settings)
    recorder = Recorder(die_after)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        num_sanity_val_steps=0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        callbacks=[
            ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
        ],
    )
    try:
        trainer.fit(recorder, data, ckpt_path=resume, weights_only=True)
    except InterruptedError:
        assert die_after is not None
    return recorder.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_step_and_resumed_twice_is_never_killed(image_shards, tmp_path, workers):
    whole = fit(image_shards, tmp_path / "whole", 9)
    assert len(whole) == 9
    for first, second in ((1, 2), (3, 4), (4, 2)) if workers == 0 else ((3, 2),):
        out = tmp_path / f"{first}-{second}"
        before = fit(image_shards, out, 9, die_after=first, workers=workers)
        between = fit(image_shards, out, 9, second, out / f"step={first}.ckpt", workers=workers)
        after = fit(image_shards, out, 9, None, out / f"step={first + second}.ckpt", workers=workers)
        assert before + between + after == whole


@pytest.mark.filterwarnings("ignore")
def test_resumed_on_other_data_an_epoch_begins_and_the_log_says_so(image_shards, tmp_path, caplog):
    fit(image_shards, tmp_path / "run", 2)
    images = [(f"{index}", np.full((32, 32, 3), index, np.uint8), "x") for index in range(9)]
    write_images(tmp_path / "others", "x", images)
    after = fit(tmp_path / "others", tmp_path / "run", 5, resume=tmp_path / "run" / "step=2.ckpt")
    assert sorted(chain.from_iterable(after)) == sorted(key for key, _, _ in images)
    assert "training data changed since the checkpoint" in caplog.text
