"""One DataModule for both stages: image shards or latent shards, as the folder's manifest says. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from ldm.data.images import ImageDataset
from ldm.data.latents import LatentDataset
from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.plan import Plan


class PlannedBatches:
    """A batch sampler that deals out a plan, epoch after epoch, without end."""

    def __init__(self, plan: Plan, rank: int = 0):
        self.plan, self.rank = plan, rank

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.batches(self.rank)


class ShardDataModule(LightningDataModule):
    """Training batches without end (the trainer counts steps), and a fixed validation set."""

    def __init__(
        self,
        train: str,
        validation: str,
        batch_size: int = 16,
        validation_samples: int = 256,
        image_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ):
        """
        Args:
            train: folder of image shards (stage one) or latent shards (stage two).
            validation: folder of the same kind.
            batch_size: samples per step and process.
            validation_samples: how many of the validation samples to use; the first ones, always the same.
            image_size: fit pictures to this side in pixels; needed where the shards hold pictures of several sizes.
            workers: loader processes; 0 reads in the training process.
            seed: of the order.
        """
        super().__init__()
        self.train, self.validation = Path(train), Path(validation)
        self.batch_size, self.validation_samples = batch_size, validation_samples
        self.image_size, self.workers, self.seed = image_size, workers, seed

    def _dataset(self, folder: Path) -> Dataset:
        if Manifest.load(folder).format == LATENT_SHARDS:
            return LatentDataset(folder)
        return ImageDataset(folder, self.image_size)

    def setup(self, stage: str) -> None:
        self.validation_set = self._dataset(self.validation)
        if stage == "fit":
            self.train_set = self._dataset(self.train)

    def _loader(self, dataset: Dataset, collate: object, **how: object) -> DataLoader:
        return DataLoader(
            dataset,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            **how,
        )

    def train_dataloader(self) -> DataLoader:
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        plan = Plan(len(self.train_set), self.batch_size, self.seed, world_size)
        return self._loader(self.train_set, self.train_set.collate, batch_sampler=PlannedBatches(plan, rank))

    def val_dataloader(self) -> DataLoader:
        # every process validates on the same samples, so that no figure depends on how many there are
        few = Subset(self.validation_set, range(min(self.validation_samples, len(self.validation_set))))
        return self._loader(few, self.validation_set.collate, batch_size=self.batch_size)
