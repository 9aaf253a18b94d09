"""Export speed: `ldm latents export` against a plain loop like DiT's feature extraction.

    python tools/bench/export.py [--quick] [--rounds R]

Both encode the same JPEGs with the same autoencoder in fp32. The plain loop: ImageFolder, one DataLoader (with 0 and with 2
workers), `encode`, one `.npy` per image. Ours also stores the posterior's standard deviation, hashes and syncs its files, and
computes the statistics of the set. In the first two settings all images share ten captions, like class names, which the loop
ignores. In the setting called text each image has its own caption, and the loop also encodes every batch's captions with the
same text encoder, one `.npy` for each. Images per second are counted from the end of the first batch to that of the last one.
Without --quick also the peak memory of a process that exports many images against that of one that exports a tenth. Ends with
`ratio NAME MEDIAN MIN MAX`: ours over the loop's in a round.
"""

from __future__ import annotations

import io
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.writer import ShardWriter
from ldm.latents.export import export_latents
from ldm.machine import machine_info
from ldm.models.autoencoder import AutoencoderConfig, encode, load_autoencoder
from ldm.models.text_encoder import TextEncoder
from ldm.shapes.scenes import generate

common.quieten()  # in the spawned processes, too
BATCH = 16
CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """Number and side of the images, widths of the autoencoder, and whether each image has its own caption."""

    count: int
    size: int
    widths: tuple[int, ...]
    own_captions: bool = False


SETTINGS = {
    "f4_64px": Setting(1500, 64, (32, 64, 64)),
    "f8_128px": Setting(128, 128, (64, 128, 256, 256)),
    "f4_64px_text": Setting(1000, 64, (32, 64, 64), own_captions=True),
}


def write(folder: Path, setting: Setting) -> None:
    """The same JPEGs as shards and as single files, and an untrained autoencoder."""
    shards, plain = folder / "shards", folder / "plain" / "class"
    for made in (shards, plain):
        made.mkdir(parents=True)
    captions: list[str] = []
    with ShardWriter(shards, "images", 250) as writer:
        for number, sample in enumerate(generate(setting.count, setting.size, seed=0)):
            caption = f"{number:06d}, {sample.caption}" if setting.own_captions else f"class {number % CLASSES}"
            buffer = io.BytesIO()
            Image.fromarray(sample.image).save(buffer, "JPEG", quality=95)
            writer.write(sample.key, {"jpg": buffer.getvalue(), "txt": caption.encode()})
            (plain / f"{sample.key}.jpg").write_bytes(buffer.getvalue())
            captions.append(caption)
    Manifest(IMAGE_SHARDS, tuple(writer.entries), {"captioned": setting.count}).save(shards)
    torch.manual_seed(0)
    AutoencoderConfig([*setting.widths], 4, 2, 16, sample_size=setting.size).build().save_pretrained(folder / "autoencoder")
    if setting.own_captions:
        (folder / "captions.txt").write_text("\n".join(captions))


def ours(folder: Path, out: Path) -> float:
    """Images per second of the command, after the first batch."""
    moments: list[tuple[float, int]] = []
    export_latents(
        folder / "autoencoder",
        folder / "shards",
        out,
        batch_size=BATCH,
        on_progress=lambda done, total: moments.append((time.perf_counter(), done)),
    )
    (began, first), (ended, last) = moments[0], moments[-1]
    return (last - first) / (ended - began)


def loop(folder: Path, out: Path, workers: int) -> float:
    """Images per second of the plain loop, after the first batch."""
    autoencoder = load_autoencoder(folder / "autoencoder")
    file = folder / "captions.txt"
    captions, encoder = (file.read_text().split("\n"), TextEncoder.load("minilm")) if file.is_file() else ([], None)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    loader = DataLoader(ImageFolder(str(folder / "plain"), transform), BATCH, num_workers=workers)
    out.mkdir()
    done, began, first = 0, 0.0, 0
    for images, _ in loader:
        with torch.inference_mode():
            latents = encode(autoencoder, images).sample().numpy()
        if encoder is not None:
            texts, mask = encoder.encode(captions[done : done + len(images)])
            for number, (text, length) in enumerate(zip(texts, mask.sum(1).tolist(), strict=True), start=done):
                np.save(out / f"{number}.text.npy", text[:length].numpy())
        for latent in latents:
            np.save(out / f"{done}.npy", latent)
            done += 1
        if not first:
            began, first = time.perf_counter(), done
    return (done - first) / (time.perf_counter() - began)


def peak(folder: Path, out: Path) -> int:
    """Export in this process; returns its largest resident size in bytes."""
    ours(folder, out)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peaks(counts: tuple[int, int]) -> Iterator[int]:
    """Of exports of so many images, each in a new process."""
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary, multiprocessing.get_context("spawn").Pool(1) as pool:
            write(Path(temporary), replace(SETTINGS["f4_64px"], count=count))
            yield pool.apply(peak, (Path(temporary), Path(temporary) / "latents"))


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "the small autoencoder, few images, two rounds, no memory: under 50 s")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    settings = {"f4_64px": replace(SETTINGS["f4_64px"], count=384)} if options.quick else SETTINGS
    rounds = 2 if options.quick else options.rounds
    print(machine_info())
    ratios: dict[str, list[float]] = {}
    for name, setting in settings.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write(folder, setting)
            for turn in range(rounds):
                rates = {"ours": ours(folder, folder / f"ours{turn}")}
                rates |= {
                    f"loop_{workers}workers": loop(folder, folder / f"loop{workers}{turn}", workers) for workers in (0, 2)
                }
                print(f"{name}, {setting.count} images:", {key: round(rate, 1) for key, rate in rates.items()}, flush=True)
                for key in rates.keys() - {"ours"}:
                    ratios.setdefault(f"{key}_{name}", []).append(rates["ours"] / rates[key])
    if not options.quick:
        few, many = 2000, 20_000
        small, large = (size / 2**20 for size in peaks((few, many)))
        print(f"peak memory: {small:.0f} MiB for {few} images, {large:.0f} MiB for {many}: {large - small:+.1f} MiB")
    common.print_ratios(ratios)


if __name__ == "__main__":
    main()
