"""Speed of loading images: our loader against raw webdataset + Pillow, torchvision's ImageFolder, litdata and streaming.

    python tools/bench/data.py [--quick] [--images N] [--rounds R]

All read the same JPEGs and deliver the same batch: float32 (32, 3, 256, 256) in [−1, 1], normalisation included. Every round
times every loader once, in turn, with 0 and with 2 workers, after one pass that is not timed, fills the page cache and starts
the workers. litdata and mosaicml-streaming are measured where they are installed. Ends with `ratio NAME MEDIAN MIN MAX`: our
images per second over the peer's in the same round.
"""

from __future__ import annotations

import importlib.util
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from mixing import mixing
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import center_crop, resize

from ldm.data.image_dataset import ImageDataset
from ldm.data.loader import ShardLoader
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.plan import Plan
from ldm.data.writer import ShardWriter
from ldm.machine import machine_info
from ldm.models.autoencoder import pixels_to_images

common.quieten()  # in the spawned workers, too
BATCH, SIZE = 32, 256
OPTIONAL = ("litdata", "streaming")
Batches = Generator[Tensor, None, None]


def jpegs(count: int, size: int, quality: int = 90) -> Iterator[bytes]:
    """Images with the spectrum of photographs (amplitude falls with frequency) and edges, as expensive to decode."""
    rng = np.random.default_rng(size)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])  # (S, S/2 + 1)
    frequency[0, 0] = 1
    for _ in range(count):
        planes = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, size, size))) / frequency**1.4, s=(size, size))
        planes = np.stack([planes[0] + planes[1] / 4, planes[0], planes[0] + planes[2] / 4])  # mostly grey, like photographs
        x, y = rng.integers(0, size // 2, 2)
        planes[:, y : y + size // 3, x : x + size // 3] += rng.normal(size=(3, 1, 1)) * planes.std()
        pixels = np.clip(128 + 50 * planes / planes.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        yield buffer.getvalue()


def jpeg_of(folder: str, number: int) -> dict[str, Any]:
    """For litdata, which stores JPEG files unchanged and decodes them itself."""
    from PIL import JpegImagePlugin

    return {"image": JpegImagePlugin.JpegImageFile(f"{folder}/{number:09d}.jpg")}


def write(folder: Path, images: list[bytes], peers: list[str]) -> None:
    """The same files in every layout that is compared."""
    shards, plain = folder / "shards", folder / "folder" / "class"
    for made in (shards, plain):
        made.mkdir(parents=True)
    with ShardWriter(shards, "images", 128) as writer:
        for number, image in enumerate(images):
            writer.write(f"{number:09d}", {"jpg": image, "txt": b"a caption"})
            (plain / f"{number:09d}.jpg").write_bytes(image)
    Manifest(IMAGE_SHARDS, tuple(writer.entries), {"captioned": len(images)}).save(shards)
    if "litdata" in peers:
        import litdata  # pyright: ignore[reportMissingImports]  optional

        how = {"chunk_bytes": "8MB", "num_workers": 1, "verbose": False}
        litdata.optimize(partial(jpeg_of, str(plain)), list(range(len(images))), str(folder / "litdata"), **how)
    if "streaming" in peers:
        from streaming import MDSWriter  # pyright: ignore[reportMissingImports]  optional

        with MDSWriter(out=str(folder / "mds"), columns={"image": "jpeg"}, size_limit="8MB") as writer:
            for image in images:
                writer.write({"image": Image.open(io.BytesIO(image))})


def peers_transform() -> transforms.Compose:
    """The usual transform of training scripts, from a Pillow image to a tensor."""
    return transforms.Compose(
        [transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    )


def ours(folder: Path, workers: int) -> Batches:
    """Image shards in the order of a plan; bytes are converted to floats by batch, as in the training step."""
    dataset = ImageDataset(folder / "shards", SIZE)
    plan = Plan(tuple(shard.samples for shard in dataset.sources[0].manifest.shards))
    for batch in ShardLoader(dataset, plan, BATCH, workers=workers):
        yield pixels_to_images(batch["image"])


def webdataset(folder: Path, workers: int) -> Batches:
    """The same tars, as webdataset's own examples read them."""
    from webdataset.compat import WebDataset, WebLoader

    urls, transform = [str(path) for path in sorted((folder / "shards").glob("*.tar"))], peers_transform()
    dataset: Any = (
        WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(1000, initial=100).decode("pil").to_tuple("jpg")
    )
    dataset = dataset.map_tuple(transform).batched(BATCH, partial=False).repeat(2)
    for (images,) in WebLoader(dataset, batch_size=None, num_workers=workers):
        yield images


def imagefolder(folder: Path, workers: int) -> Batches:
    """Single files."""
    dataset = ImageFolder(str(folder / "folder"), peers_transform())
    for images, _ in DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers):
        yield images


def resized(sample: dict[str, Any]) -> Tensor:
    """litdata's uint8 image, resized; a function of the module, because its workers are spawned."""
    return center_crop(resize(sample["image"], [SIZE], antialias=True), [SIZE])


def litdata(folder: Path, workers: int) -> Batches:
    """Its own chunks, which hold the JPEG files and give uint8 tensors."""
    from litdata import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]  optional

    dataset = StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=True, transform=resized)
    for images in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True):
        yield images.float().div_(127.5).sub_(1)


def normalised(samples: list[dict[str, Any]]) -> Tensor:
    """streaming's Pillow images as a batch; a function of the module, because its workers are spawned."""
    transform = peers_transform()
    return torch.stack([transform(sample["image"]) for sample in samples])


def streaming(folder: Path, workers: int) -> Batches:
    """mosaicml-streaming's own shards, which hold the JPEG files and give Pillow images."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]  optional

    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    yield from DataLoader(dataset, BATCH, drop_last=True, num_workers=workers, collate_fn=normalised)


LOADERS = {loader.__name__: loader for loader in (ours, webdataset, imagefolder, litdata, streaming)}


def rate(loader: Callable[[Path, int], Batches], folder: Path, workers: int, batches: int) -> float:
    """Images per second once every worker has delivered twice, since the last spawned one starts seconds after the first.

    ``batches`` in all: three quarters of a pass, so that no worker has run out of shards while it is timed.
    """
    iterator = loader(folder, workers)
    first = next(iterator)
    for _ in range(2 * workers):
        next(iterator)
    assert first.dtype == torch.float32 and first.shape == (BATCH, 3, SIZE, SIZE), (first.dtype, first.shape)
    assert -1 <= first.min() < -0.5 < 0.5 < first.max() <= 1
    timed = batches - 1 - 2 * workers
    began = time.perf_counter()
    for _ in range(timed):
        next(iterator)
    seconds = time.perf_counter() - began
    iterator.close()
    return timed * BATCH / seconds


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "fewer images and rounds, no optional peer: under 50 s")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    count, rounds = (384, 1) if options.quick else (options.images, options.rounds)
    sizes = (256,) if options.quick else (256, 512)
    peers = [] if options.quick else [name for name in OPTIONAL if importlib.util.find_spec(name)]
    print(machine_info())
    print(f"{count} images, {rounds} rounds; not measured: {', '.join(set(OPTIONAL) - set(peers)) or 'none'}")
    found = mixing(Plan((1000,) * 100), BATCH)
    print("mixing of 100 shards of 1000:", {name: round(value, 4) for name, value in found.items()})
    loaders = {name: loader for name, loader in LOADERS.items() if name in peers or name not in OPTIONAL}
    ratios: dict[str, list[float]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            images = list(jpegs(count, size))
            print(f"{size} px JPEG -> {SIZE}: {statistics.mean(map(len, images)) / 1024:.0f} KiB each")
            write(folder, images, peers)
            for workers in (0, 2):
                # the training process gets the cores that no worker uses; more OpenMP threads would compete with the workers
                torch.set_num_threads(max((os.cpu_count() or 1) - workers, 1))
                for turn in range(rounds + 1):
                    rates = {name: rate(loader, folder, workers, count // BATCH * 3 // 4) for name, loader in loaders.items()}
                    if turn == 0:
                        continue  # fills caches
                    print(f"{size} px, {workers} workers:", {name: round(value) for name, value in rates.items()}, flush=True)
                    for name in rates.keys() - {"ours"}:
                        ratios.setdefault(f"{name}_{size}px_{workers}workers", []).append(rates["ours"] / rates[name])
    common.print_ratios(ratios)


if __name__ == "__main__":
    main()
