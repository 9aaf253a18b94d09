"""One DataModule for both stages: image shards or latent shards, as their manifests say. It knows no model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from ldm.data.buckets import Buckets, require_fits
from ldm.data.image_dataset import Augmentation, Crop, ImageDataset
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import common_info, latent_info, read_null_text
from ldm.data.loader import BatchNoise, ShardLoader, batch_loader, nothing
from ldm.data.manifest import LATENT_SHARDS
from ldm.data.plan import WINDOW, Plan, PlannedSample
from ldm.data.quarantine import QUARANTINE_NAME, Quarantine
from ldm.data.shard_dataset import ShardDataset
from ldm.data.sources import ShardCache, ShardSource, open_source
from ldm.errors import UsageError

GIB = 2**30

log = logging.getLogger(__name__)


@dataclass
class WeightedSource:
    """One of several folders to train on.

    Attributes:
        path: a folder of shards, a pattern of tars (``data/{000..099}.tar``) or a URL (http, https, s3) of either.
        weight: how often its samples are drawn per epoch: 2 is twice, 0.5 every other epoch.
    """

    path: str
    weight: float = 1.0


class ShardDataModule(LightningDataModule):
    """Endless training batches (the trainer counts steps) and a fixed validation set."""

    def __init__(
        self,
        train: str | list[WeightedSource],
        validation: str,
        batch_size: int = 16,
        max_tokens: int | None = None,
        validation_samples: int = 256,
        validation_whole: bool = False,
        image_size: int | None = None,
        crop: Crop = "centre",
        buckets: list[int] | None = None,
        bucket_step: int = 32,
        max_aspect: float = 2.0,
        max_upscale: float = 1.0,
        max_crop: float | None = None,
        flip: float = 0.0,
        caption: Literal["first", "random"] | dict[str, float] = "first",
        caption_dropout: float = 0.0,
        text_encoder: int | list[int] = 0,
        require_captions: bool = True,
        workers: int = 0,
        max_wait_seconds: float = 600.0,
        seed: int = 0,
        shuffle_window: int = WINDOW,
        max_bad_share: float = 0.01,
        max_bad_in_a_row: int = 100,
        cache: str | None = None,
        cache_gib: float = 50.0,
    ):
        """
        Args:
            train: image shards (stage one) or latent shards (stage two): a folder, a pattern of tars, a URL of either, or a
                list of these with weights.
            validation: the same kind.
            batch_size: samples per step and process. Those of a step are of one size.
            max_tokens: tokens per step and process, in the place of ``batch_size``: of each size as many samples as
                have no more. A token is a patch of the denoiser; in stage one, a position of the latents.
            validation_samples: how many validation samples to use: the first ones; of data of several sizes, some of the whole
                set at equal distances.
            validation_whole: validate on whole images, each at its own size as a batch of one, whatever ``image_size`` and
                ``crop`` are in training. Image shards only.
            image_size: resize images to this side in pixels; required where the shards hold several sizes.
            crop: the square taken from a training image: the largest, in the centre or at random along the longer side
                ("random"), then resized to ``image_size``; or a random "window" of ``image_size`` at the image's own
                resolution (smaller images are enlarged). Validation crops the centre. Or, in both, the largest part with
                the proportions of the image's "bucket", one of several sizes, of which a batch has one; images that are too
                small for every bucket are left out.
            buckets: areas of buckets as sides of squares in pixels ([256], or [256, 512]: an image goes to the largest that
                it fills); for the bucket crop.
            bucket_step: all sides of buckets are multiples of it.
            max_aspect: longer over shorter side of a bucket, at most.
            max_upscale: an image is enlarged by this factor at most; 1: not at all.
            max_crop: leave out images of which more than this share of the area would be cropped off, as 0.3.
            flip: probability of a mirrored training image; for latents, where those of mirrored images were exported.
            caption: which of several captions to train on; or weights by which one is drawn, as ``{short: 0.3, long: 0.7}``.
                A name is that of a field of a sample's ``.json``, ``txt``, or the place of a caption in the list of all, such
                as "0"; of those that a sample lacks, the others are drawn in proportion. For latents, where all were
                exported, or those of these names.
            caption_dropout: share of captions replaced by the empty one, which guidance needs.
            text_encoder: which text encoder's embeddings to train on, by its position in the export, from 0; several in a
                list, for a denoiser with as many ``caption_channels``.
            require_captions: skip images without a caption, in folders where others have one. A module whose
                ``reads_captions`` is False (stage one) needs none, and reads none.
            workers: loader processes, which read the samples and draw the noise of training; 0 does both in the training
                process, while a GPU waits.
            max_wait_seconds: limit for one batch; then the loader counts as stalled and the run ends with the names of the
                shards it was reading. 0: no limit.
            seed: of the order, and of crops, flips and captions.
            shuffle_window: samples permuted together; for remote shards at most what half the cache holds.
            max_bad_share: unusable samples tolerated, as a share of all; more stop the run.
            max_bad_in_a_row: consecutive unusable samples tolerated.
            cache: folder that keeps remote shards (default: $LDM_CACHE or ~/.cache/ldm/shards).
            cache_gib: its limit in GiB.
        """
        super().__init__()
        several = [WeightedSource(str(train))] if isinstance(train, str | Path) else train
        self.train, self.validation = [WeightedSource(**vars(source)) for source in several], validation
        for name, value in (("flip", flip), ("caption_dropout", caption_dropout), ("max_bad_share", max_bad_share)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} is {value}; give 0 to 1")
        if (crop == "bucket") != (buckets is not None):
            fix = "give buckets, for example [256]" if buckets is None else "set crop to bucket"
            raise UsageError(f"crop is {crop} and buckets is {buckets}; {fix}")
        if buckets is not None and image_size is not None:
            raise UsageError(f"image_size is {image_size}, but buckets give images their sizes; leave out image_size")
        self.buckets = None if buckets is None else Buckets(tuple(buckets), bucket_step, max_aspect, max_upscale, max_crop)
        if isinstance(caption, dict) and not (caption and min(caption.values()) >= 0 and sum(caption.values()) > 0):
            raise UsageError(f"caption has the weights {caption}; give numbers of 0 or more, one above 0")
        self.batch_size, self.max_tokens, self.image_size = batch_size, max_tokens, image_size
        self.validation_samples, self.validation_whole = validation_samples, validation_whole
        self.augmentation = Augmentation(crop, flip, caption, caption_dropout, seed)
        self.text_encoders = [text_encoder] if isinstance(text_encoder, int) else [*text_encoder]
        self.require_captions, self.seed, self.shuffle_window = require_captions, seed, shuffle_window
        self.workers, self.max_wait_seconds = workers, max_wait_seconds
        self.max_bad_share, self.max_bad_in_a_row = max_bad_share, max_bad_in_a_row
        self.cache = replace(ShardCache(), max_bytes=int(cache_gib * GIB), **({"folder": Path(cache)} if cache else {}))
        #: of the module that is trained; False: captions are neither read nor required
        self.reads_captions = True
        #: of the module that is trained; True: the original sizes and crops of images are read, too
        self.reads_sizes = False
        #: called about once a second while a batch is awaited; its exception ends the wait
        self.on_wait: Callable[[], None] = nothing
        self.loader: ShardLoader | None = None
        self._counted = 0  # bad samples logged so far

    def sources(self) -> list[ShardSource]:
        """The training sources, opened; all of one kind."""
        return self._open([source.path for source in self.train])

    def _open(self, paths: Sequence[str]) -> list[ShardSource]:
        sources = [open_source(path, cache=self.cache) for path in paths]
        kinds = {source.manifest.format for source in sources}
        if len(kinds) != 1:
            raise UsageError(f"the training data mix image shards and latent shards ({', '.join(paths)}); give one kind")
        return sources

    def _dataset(
        self, sources: list[ShardSource], image_size: int | None, augmentation: Augmentation, buckets: Buckets | None
    ) -> ImageDataset | LatentDataset:
        if sources[0].manifest.format != LATENT_SHARDS:
            captions = self.require_captions, self.reads_captions
            dataset = ImageDataset(sources, image_size, augmentation, *captions, buckets, self.reads_sizes)
            self._require_fits(dataset)
        else:
            self._check_latents(sources, augmentation)
            null_texts = [read_null_text(sources[0], number) for number in self.text_encoders]
            dataset = LatentDataset(sources, augmentation, null_texts, self.text_encoders, self.reads_sizes)
        dataset.max_in_a_row = self.max_bad_in_a_row
        return dataset

    def _require_fits(self, dataset: ImageDataset) -> None:
        """Raise :class:`UsageError` where too many images fit no bucket; log how many are left out."""
        if dataset.groups is None or not (unfit := int((dataset.groups < 0).sum())):
            return
        total, spec = len(dataset), dataset.sources[0].spec
        require_fits(unfit, total, spec, self.max_bad_share)
        log.warning("%d of %d images in %s fit no bucket and are left out (ldm shards show names them)", unfit, total, spec)

    def _check_latents(self, sources: list[ShardSource], augmentation: Augmentation) -> None:
        """Raise :class:`UsageError` where the latents do not match these settings or one another."""
        encoders = common_info(sources).text_encoders
        chosen = self.text_encoders
        if not chosen or len({*chosen}) < len(chosen) or not {*chosen} <= {*range(len(encoders))}:
            names = ", ".join(f"{number}: {encoder.name}" for number, encoder in enumerate(encoders))
            given = ", ".join(map(str, chosen)) or "empty"
            raise UsageError(f"text_encoder is {given}, but {sources[0].spec} was exported with {names}; give one of these")
        for name, value, without in (("crop", augmentation.crop, "centre"), ("validation_whole", self.validation_whole, False)):
            if value != without:
                raise UsageError(
                    f"{name} is {value}, but {sources[0].spec} holds latents, exported without; set it to {without}"
                )
        for source in sources:
            info = latent_info(source)
            for name, value, without, there, option in (
                ("flip", augmentation.flip, 0, info.flips, "--flip"),
                ("caption", augmentation.caption, "first", info.captions == "all", "--captions all"),
            ):
                if isinstance(value, dict) and there:
                    lacking = [name for name in value if name not in info.caption_names]
                    lacking = lacking if info.caption_names else [name for name in value if not name.isdecimal()]
                    there, option = not lacking, f"--captions {' '.join(value)}"
                if value != without and not there:
                    raise UsageError(
                        f"{name} is {value}, but {source.spec} holds latents exported without; "
                        f"set it to {without}, or export them again: ldm latents export {option}"
                    )

    def setup(self, stage: str) -> None:
        """Open the data sets, and refuse folders whose files disagree with their manifests."""
        if self.trainer is not None:
            self.reads_captions = getattr(self.trainer.lightning_module, "reads_captions", self.reads_captions)
            self.reads_sizes = getattr(self.trainer.lightning_module, "reads_sizes", self.reads_sizes)
        size, how, buckets = self.image_size, Augmentation(self.augmentation.crop), self.buckets
        if self.validation_whole:
            size, how, buckets = None, Augmentation(), None
        if isinstance(self.augmentation.caption, dict):
            how = replace(how, caption=self.augmentation.caption)
        self.validation_set = self._dataset(self._open([str(self.validation)]), size, how, buckets)
        self.validation_quarantine = Quarantine(len(self._validated()), self.max_bad_share, self.max_bad_in_a_row)
        if stage == "fit":
            self.train_set = self._dataset(self.sources(), self.image_size, self.augmentation, self.buckets)

    def train_dataloader(self) -> ShardLoader:
        """The loader of this rank; its position is saved in checkpoints."""
        world_size, rank = (self.trainer.world_size if self.trainer else 1), self._rank
        sources = self.train_set.sources
        weights = [source.weight for source in self.train]
        shards = [(s.samples, weight) for source, weight in zip(sources, weights, strict=True) for s in source.manifest.shards]
        sizes, by_shard = zip(*shards, strict=True)
        weighted = None if set(weights) == {1.0} else by_shard
        plan = Plan(sizes, weighted, self.seed, self._window(sources), self.train_set.groups)
        folder = Path(self.trainer.default_root_dir) if self.trainer else None
        quarantine = Quarantine(
            len(self.train_set),  # over the epochs every process meets all of them
            self.max_bad_share,
            self.max_bad_in_a_row,
            folder and folder / (QUARANTINE_NAME if rank == 0 else f"{rank}-{QUARANTINE_NAME}"),
        )
        identity = [[source.manifest.hash, weight] for source, weight in zip(sources, weights, strict=True)]
        # they decide which samples there are, and which wait for others
        buckets = () if self.buckets is None else (self.buckets, self.buckets.max_crop)
        buckets = tuple(each for each in buckets if each is not None)
        self.loader = ShardLoader(
            self.train_set,
            plan,
            self.batch_sizes(self.train_set),
            rank,
            world_size,
            self.workers,
            self._on_gpu,
            quarantine,
            hashlib.sha256(repr((identity, plan.window, *buckets)).encode()).hexdigest(),
            confirm=self.trainer is not None,
            max_wait=self.max_wait_seconds,
            on_wait=lambda: self.on_wait(),
            noise=self._noise(),
        )
        return self.loader

    def batch_sizes(self, dataset: ShardDataset) -> list[int]:
        """Samples per step and process, of each size of the data set.

        Raises :class:`UsageError` where ``max_tokens`` is less than one sample has.
        """
        if self.max_tokens is None:
            return [self.batch_size] * max(len(dataset.group_sizes), 1)
        if not dataset.group_sizes:
            raise UsageError("max_tokens needs the size of the images; set image_size, or leave it out")
        side = getattr(self.trainer.lightning_module if self.trainer else None, "token_side", 1)
        tokens = np.array([(height // side) * (width // side) for height, width in dataset.group_sizes])
        if dataset.groups is not None:  # a size that no sample has limits nothing
            tokens[np.bincount(dataset.groups[dataset.groups >= 0], minlength=len(tokens)) == 0] = 1
        if (most := tokens.max()) > self.max_tokens:
            raise UsageError(f"max_tokens is {self.max_tokens}, but a sample of the largest size has {most}; raise it")
        return (self.max_tokens // tokens).tolist()

    @property
    def mean_batch_size(self) -> float:
        """Samples of a training step and process, on average over all steps."""
        sizes, groups = np.array(self.batch_sizes(self.train_set)), self.train_set.groups
        counts = np.ones(1) if groups is None else np.bincount(groups[groups >= 0], minlength=len(sizes))
        return float(counts.sum() / (counts / sizes).sum())

    def largest_batch(self) -> dict[str, Any] | None:
        """A training batch of the size whose batches need the most memory, on the CPU; None where all samples have one size."""
        groups, counts = self.train_set.groups, self.batch_sizes(self.train_set)
        if groups is None:
            return None
        assert self.loader is not None, "the loader makes the batch"
        pixels = [count * prod(size) for count, size in zip(counts, self.train_set.group_sizes, strict=True)]
        largest = max(np.unique(groups[groups >= 0]).tolist(), key=pixels.__getitem__)
        samples = np.resize(np.flatnonzero(groups == largest), counts[largest])  # repeated where there are too few
        return self.loader.batch([PlannedSample(sample, number) for number, sample in enumerate(samples.tolist())])

    def _validated(self) -> np.ndarray:
        """The numbers of the validation samples used."""
        total = len(self.validation_set)
        few = min(self.validation_samples, total)
        return np.arange(few) if self.validation_set.groups is None else np.arange(few) * total // few

    def _noise(self) -> BatchNoise | None:
        """That of the module that is trained; asked for when its seed is known: after a checkpoint is read."""
        make = getattr(self.trainer.lightning_module if self.trainer else None, "batch_noise", None)
        return make() if make else None

    def _window(self, sources: Sequence[ShardSource]) -> int:
        """The shuffle window; two windows of remote shards must fit the cache, or shards are fetched repeatedly."""
        remote = [source.manifest for source in sources if source.is_remote]
        if not remote:
            return self.shuffle_window
        average = sum(manifest.bytes for manifest in remote) / max(sum(manifest.samples for manifest in remote), 1)
        return max(1, min(self.shuffle_window, int(self.cache.max_bytes / 2 / max(average, 1))))

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """A training batch that reaches its step counts as consumed."""
        if (bad := batch.pop("bad", None)) is not None:  # of validation: the training loader counts its own
            self.validation_quarantine.add(bad)
        if (position := batch.pop("position", None)) is not None:
            assert self.loader is not None and self.trainer is not None
            self.loader.consumed(position)
            if len(self.loader.quarantine) > self._counted:
                self._counted = len(self.loader.quarantine)
                for logger in self.trainer.loggers:
                    logger.log_metrics({"data/quarantined": self._counted}, step=self.trainer.global_step)
        return batch

    def val_dataloader(self) -> DataLoader:
        size = 1 if self.validation_whole else self.batch_sizes(self.validation_set)
        return batch_loader(
            self.validation_set,
            EveryProcess(self.validation_set.batches_of_one_size(self._validated(), size)),
            self.max_wait_seconds,
            self._rank,
            lambda: self.on_wait(),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self._on_gpu,
        )


class EveryProcess(DistributedSampler):
    """The same batches on every process, so that no validation metric depends on their number.

    Lightning would otherwise distribute them by a sampler of its own, unless the trainer was told not to.
    """

    def __init__(self, batches: list[list[int]]):
        super().__init__(batches, 1, 0, shuffle=False)  # pyright: ignore[reportArgumentType]  anything with a length serves
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def datamodule_of(trainer: Trainer) -> ShardDataModule:
    """The trainer's DataModule."""
    return trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  Lightning sets it outside of the class
