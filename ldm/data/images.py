"""Images and captions by sample number, from image shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.decode import DecodeError, decode_image, decode_text
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.shards import ShardReader
from ldm.errors import LdmError


class ImageDataset(Dataset):
    """Random access to the images and captions of a shard folder, in the order of the manifest."""

    def __init__(self, folder: str | Path, image_size: int | None = None):
        """
        Args:
            folder: image shards and their manifest.
            image_size: fit every picture to this side by scaling and cutting the centre; None: they have one size already.
        """
        self.folder, self.image_size = Path(folder), image_size
        self.manifest = Manifest.load(self.folder, IMAGE_SHARDS)
        self.manifest.check_cheap(self.folder)
        self.starts = np.cumsum([0] + [shard.samples for shard in self.manifest.shards])
        self._readers: dict[int, ShardReader] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, object]:
        """``image`` uint8 (3, H, W), ``caption`` (empty where there is none) and ``key``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        if shard not in self._readers:
            self._readers[shard] = ShardReader(self.folder / self.manifest.shards[shard].name)
        reader = self._readers[shard]
        sample = reader[index - int(self.starts[shard])]
        try:
            if sample.image is None:
                raise DecodeError("has no image")
            image = decode_image(sample.image)
            caption = decode_text(sample.caption) if sample.caption is not None else ""
        except DecodeError as error:
            raise LdmError(f"{reader.path}: sample {sample.key} {error}; pack the shards again without it") from error
        if self.image_size is not None and image.size != (self.image_size, self.image_size):
            image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return {"image": np.asarray(image).transpose(2, 0, 1), "caption": caption, "key": sample.key}

    @staticmethod
    def collate(samples: list[dict]) -> dict[str, Tensor | list[str]]:
        """``image`` uint8 (B, 3, H, W), ``caption`` and ``key`` lists of B."""
        sizes = {sample["image"].shape for sample in samples}
        if len(sizes) > 1:
            raise LdmError(f"one batch holds pictures of sizes {sorted(sizes)}; set data.image_size to fit them to one")
        return {
            "image": torch.from_numpy(np.stack([sample["image"] for sample in samples])),
            "caption": [sample["caption"] for sample in samples],
            "key": [sample["key"] for sample in samples],
        }
