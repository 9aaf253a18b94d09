"""Sets of images and what metrics need of each: features by every network, its caption, its size.

Images pass in batches, each of one size, and are forgotten but for a few thumbnails: memory grows by the features alone.
Several processes share the batches; what a batch holds does not depend on how many they are, so that the results do not either.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from ldm.data.buckets import MAX_UPSCALE, Buckets, Size
from ldm.data.decode import decode_pixels
from ldm.data.image_dataset import ImageDataset
from ldm.data.pack.sources import GeneratedSource, is_generated
from ldm.data.quarantine import BadSample, Quarantine
from ldm.errors import LdmError, UsageError
from ldm.evaluation.features import FeatureNetwork
from ldm.files import read_bytes
from ldm.images import MAX_IMAGE_BYTES, DecodeError, is_image
from ldm.latents.compute import Process
from ldm.machine import full_fp32
from ldm.models.autoencoder import pixels_to_images
from ldm.pipeline import LatentDiffusionPipeline
from ldm.terminal import printable

SHOWN = 16  # images that are kept of a set
ALONE = Process(0, 1, 0, 1)
OnProgress = Callable[[int, int], None]
Embed = Callable[[Sequence[str]], dict[str, Tensor]]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class FixedSizes(Buckets):
    """Buckets of given sizes, in the place of a table of bases; an image is enlarged as far as its bucket takes. Of buckets
    that crop an image equally the first gets it."""

    sizes: tuple[Size, ...] = ()
    bases: tuple[int, ...] = (1,)
    step: int = 1
    max_upscale: float = MAX_UPSCALE

    @cached_property
    def tiers(self) -> tuple[tuple[Size, ...], ...]:
        return (self.sizes,)


@dataclass(frozen=True)
class Scored:
    """One image: its size, its caption (None: not known), features by each network (D,), and perhaps its pixels, uint8 (3, H,
    W)."""

    size: Size
    caption: str | None
    features: list[np.ndarray]
    pixels: np.ndarray | None


@dataclass(frozen=True)
class ImageSet:
    """N images, by what is known of them.

    Attributes:
        features: by each network, (N, D) float32 on the CPU.
        captions: None of an image whose caption is not known.
        sizes: (height, width).
        shown: some of the images, by their number.
        samples: numbers in the data set, of images of shards.
    """

    features: list[Tensor]
    captions: list[str | None]
    sizes: list[Size]
    shown: dict[int, Image.Image]
    samples: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, images: Sequence[Scored]) -> ImageSet:
        by_network = zip(*(image.features for image in images), strict=True)
        shown = {
            number: Image.fromarray(image.pixels.transpose(1, 2, 0))
            for number, image in enumerate(images)
            if image.pixels is not None
        }
        features = [torch.from_numpy(np.stack(of_network)) for of_network in by_network]
        return cls(features, [image.caption for image in images], [image.size for image in images], shown)

    def __len__(self) -> int:
        return len(self.sizes)

    def part(self, start: int, end: int) -> ImageSet:
        """Its images from number ``start`` to before ``end``."""
        shown = {number - start: image for number, image in self.shown.items() if start <= number < end}
        return ImageSet(
            [of[start:end] for of in self.features],
            self.captions[start:end],
            self.sizes[start:end],
            shown,
            self.samples[start:end],
        )

    def without_captions(self) -> ImageSet:
        """The same, for images that were not generated from captions."""
        return replace(self, captions=[None] * len(self))

    @property
    def different_sizes(self) -> tuple[Size, ...]:
        """Its sizes, the most frequent first."""
        return tuple(size for size, _ in Counter(self.sizes).most_common())


@contextmanager
def several_processes(process: Process) -> Iterator[None]:
    """Within it processes that torchrun started can exchange results. Raises UsageError where another launcher did."""
    if process.world_size == 1 or dist.is_initialized():
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        raise UsageError("the processes do not know one another; start them by torchrun, or a single one")
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def shared_work(
    items: Sequence[Item], work: Callable[[Item], Result], process: Process, done: Callable[[Item], None] = lambda item: None
) -> list[Result]:
    """The result of each item, in their order; each process computes its share, and all get all of them.

    All work equally often, since networks whose weights are sharded need all processes: in the last round, one for which no
    item is left repeats the last.
    """
    own = []
    for first in range(0, len(items), process.world_size):
        item = items[min(first + process.rank, len(items) - 1)]
        own.append(work(item))
        done(item)
    if process.world_size == 1:
        return own
    found: list[Any] = [None] * process.world_size
    dist.all_gather_object(found, own)
    return [found[number % process.world_size][number // process.world_size] for number in range(len(items))]


class Scorer:
    """Computes what metrics need of images, by all networks at once.

    Attributes:
        networks: feature networks, on one device.
        process: which of several processes this is.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], process: Process = ALONE, batch_size: int = 32) -> None:
        self.networks, self.process, self.batch_size = networks, process, batch_size
        self.device = next((p.device for network in networks for p in network.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def score(self, pixels: Tensor, captions: Sequence[str | None], numbers: Sequence[int]) -> list[Scored]:
        """Images of one size, uint8 (B, 3, H, W), of these ``numbers``: the first :data:`SHOWN` are kept."""
        images, found = pixels_to_images(pixels.to(self.device)), []
        for network in self.networks:
            # of any training, whatever its precision
            with full_fp32(), torch.autocast(self.device.type, enabled=False):
                features = network(images).cpu()
            if not features.isfinite().all():
                raise LdmError(f"the feature network {network.description} gives features that are not finite; take another")
            found.append(features.numpy())
        size = (pixels.shape[2], pixels.shape[3])
        return [
            Scored(size, captions[row], [of[row] for of in found], pixels[row].cpu().numpy().copy() if number < SHOWN else None)
            for row, number in enumerate(numbers)
        ]

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> list[Tensor | None]:
        """Features of texts by each network, (N, D) on the CPU; None of one that takes none. Equal texts are embedded once."""
        different = [*dict.fromkeys(texts)]
        place = {text: number for number, text in enumerate(different)}
        which = [place[text] for text in texts]
        batches = self._batches(different)
        found: list[Tensor | None] = []
        for network in self.networks:
            if not network.takes_texts:
                found.append(None)
                continue
            vectors = shared_work(
                batches, lambda batch, network=network: network.embed_texts(batch).cpu().numpy(), self.process
            )
            found.append(torch.from_numpy(np.concatenate(vectors))[which])
        return found

    def real_images(
        self,
        dataset: ImageDataset,
        samples: Sequence[int],
        on_progress: OnProgress | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> ImageSet:
        """Images of shards, cropped and resized to the data set's buckets, and then changed, uint8 (B, 3, H, W) to the same;
        those that cannot be used are left out.

        Raises LdmError where they are too many.
        """
        batches = self._batches(range(len(samples)))
        count = Count(len(samples), self.process, on_progress)

        def work(batch: Sequence[int]) -> list[Scored | BadSample]:
            read = {number: dataset.attempt(samples[number]) for number in batch}
            good = {number: sample for number, sample in read.items() if not isinstance(sample, BadSample)}
            scored: dict[int, Scored] = {}
            for numbers in _of_one_size({number: sample["image"].shape for number, sample in good.items()}):
                alike = dataset.collate([good[number] for number in numbers])
                pixels = alike["image"] if change is None else change(alike["image"])
                scored |= zip(numbers, self.score(pixels, alike["caption"], numbers), strict=True)
            return [sample if isinstance(sample, BadSample) else scored[number] for number, sample in read.items()]

        quarantine = Quarantine(len(samples), adjustable=False, quiet=self.process.rank > 0)
        images: list[Scored] = []
        used: list[int] = []
        found = (one for batch in shared_work(batches, work, self.process, count) for one in batch)
        for sample, each in zip(samples, found, strict=True):
            bad = isinstance(each, BadSample)
            quarantine.add([[each] if bad else []])
            images += [] if bad else [each]
            used += [] if bad else [sample]
        return replace(ImageSet.of(images), samples=used)

    def generated_images(
        self,
        pipeline: LatentDiffusionPipeline,
        captions: Sequence[str],
        sizes: Sequence[Size],
        seed: int,
        on_progress: OnProgress | None = None,
        embed: Embed | None = None,
        **settings: Any,
    ) -> ImageSet:
        """An image of each caption, which starts from noise of seed ``seed + number``.

        Captions are cut where the text encoders take no more, as in training. Pixels have 8 bits, as in a PNG.

        Args:
            on_progress: called on every process, equally often: after each of its batches.
            embed: in the place of the pipeline's text encoders, as :func:`embeds_of` has it.
            settings: of the pipeline (``num_inference_steps``, ``guidance_scale``, ``guidance``, …).
        """
        alike = _of_one_size(dict(enumerate(sizes)))
        batches = [batch for numbers in alike for batch in self._batches(numbers)]
        count = Count(len(captions), self.process, on_progress)

        def work(numbers: Sequence[int]) -> list[Scored]:
            height, width = sizes[numbers[0]]
            texts = [captions[number] for number in numbers]
            (images,) = pipeline(
                **(embeds_of(pipeline, texts) if embed is None else embed(texts)),
                generator=[torch.Generator().manual_seed(seed + number) for number in numbers],
                height=height,
                width=width,
                output_type="pt",
                return_dict=False,
                **settings,
            )
            return self.score((images.float() * 255).round().byte(), texts, numbers)

        found = shared_work(batches, work, self.process, count)
        in_order = sorted(
            zip((n for batch in batches for n in batch), (one for batch in found for one in batch), strict=True),
            key=itemgetter(0),
        )
        return ImageSet.of([one for _, one in in_order])

    def image_files(self, files: Sequence[tuple[Path, str | None]], on_progress: OnProgress | None = None) -> ImageSet:
        """Image files with their captions, in their order. Raises LdmError, naming the file, for one that cannot be read."""
        count = Count(len(files), self.process, on_progress)

        def work(batch: Sequence[int]) -> list[Scored]:
            read = {number: _read(files[number][0]) for number in batch}
            scored: dict[int, Scored] = {}
            for numbers in _of_one_size({number: pixels.shape for number, pixels in read.items()}):
                pixels = torch.from_numpy(np.stack([read[number] for number in numbers])).permute(0, 3, 1, 2)
                captions = [files[number][1] for number in numbers]
                scored |= zip(numbers, self.score(pixels, captions, numbers), strict=True)
            return [scored[number] for number in batch]

        found = shared_work(self._batches(range(len(files))), work, self.process, count)
        return ImageSet.of([one for batch in found for one in batch])

    def _batches(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]


def embeds_of(pipeline: LatentDiffusionPipeline, texts: Sequence[str]) -> dict[str, Tensor]:
    """What a pipeline takes in the place of these prompts, which are cut where its text encoders take no more."""
    tokens = [encoder.tokenize(texts, cut=True) for encoder in pipeline.text_encoders]
    condition = pipeline.embed([[*ids] for ids in zip(*tokens, strict=True)])
    return {"prompt_embeds": condition.embeddings, "prompt_attention_mask": condition.mask}


class Count:
    """Progress of one process, which stands for all of them; called with each batch that is done."""

    def __init__(self, total: int, process: Process, on_progress: OnProgress | None):
        self.total, self.done, self.process, self.on_progress = total, 0, process, on_progress

    def __call__(self, batch: Sequence) -> None:
        self.done = min(self.done + len(batch) * self.process.world_size, self.total)
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)


def _of_one_size(sizes: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """The numbers of images by size; those of one size in their order."""
    order = sorted(sizes, key=lambda number: (*sizes[number], number))
    return [[*numbers] for _, numbers in groupby(order, key=lambda number: sizes[number])]


def _read(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, upright, in sRGB."""
    try:
        return decode_pixels(read_bytes(path, MAX_IMAGE_BYTES, "give a folder of images"))
    except DecodeError as error:
        raise LdmError(f"{path} {error}; remove it or save it again") from None


def open_shards(folder: str, need_captions: bool) -> ImageDataset:
    """Real images with their captions. Raises UsageError for shards without captions, where they are needed."""
    dataset = ImageDataset(folder, require_captions=need_captions)
    if need_captions and dataset.sources[0].manifest.captioned is False:
        raise UsageError(f"{folder} has no captions, and the model generates from captions; give shards with captions")
    return dataset


def open_folder(folder: str | Path) -> list[tuple[Path, str | None]]:
    """The images of a folder, in the order of their names, and their captions: of ``ldm sample`` those of its ``run.json``,
    else what a text file of the same name says, None where there is none.

    Raises UsageError for a folder without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give a folder of images")
    if is_generated(folder):
        items = [*GeneratedSource(folder).items()]
        if missing := next((item for item in items if item.problem), None):
            raise UsageError(f"{folder}: {printable(missing.key)} {missing.problem}")
        if items:
            return [(folder / item.key, (item.captions or (None,))[0]) for item in items]
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path.name))
    if not paths:
        raise UsageError(f"{folder} holds no images; give a folder of PNG, JPEG or WebP files")
    return [(path, _caption(path.with_suffix(".txt"))) for path in paths]


def _caption(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return read_bytes(path, 2**20).decode("utf-8-sig").strip() or None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8; save it as UTF-8") from None
