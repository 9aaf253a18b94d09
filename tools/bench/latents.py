"""Speed of reading latents for training: our loader against webdataset with .npy files, and litdata.

    python tools/bench/latents.py [--quick] [--samples N] [--rounds R]

All store the same in float16: latents of 4 x 32 x 32, the posterior's mean and standard deviation, and 4 to 16 text embeddings
of width 384. All deliver them in random order, as the same batch of 64 in the training process: mean, std and padded text in
float32, and the mask. Ours goes through ShardDataModule. webdataset has one .npy for mean and std together and one for the
text, in tars of as many samples as ours, read by its own decoder; litdata (where it is installed) has its own chunks of
tensors. Every round times every loader once, in turn, with 0 and with 2 workers, after a round that is not timed, fills the
page cache and compares batches with what was written. The clock starts once every worker has delivered twice, and runs for at
least a second. Ends with `ratio NAME MEDIAN MIN MAX`: our samples per second over the peer's in the same round.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

from ldm.data.datamodule import ShardDataModule
from ldm.data.latent_schema import Chunk, LatentInfo, TextInfo, write_null_text
from ldm.data.manifest import LATENT_SHARDS, Manifest
from ldm.data.writer import ShardWriter
from ldm.machine import machine_info

common.quieten()  # in the spawned workers, too
BATCH, LATENT, TOKENS, WIDTH = 64, (4, 32, 32), 16, 384
PER_SHARD, PER_CHUNK = 512, 64
OPTIONAL = ("litdata",)
Batches = Generator[dict[str, Tensor], None, None]
INFO = LatentInfo(
    autoencoder="0" * 64,
    text_encoders=(TextInfo("noise", "0" * 64, WIDTH, TOKENS, 0),),
    latent_shapes=(LATENT,),
    resolution=256,
    posterior="gaussian",
    flips=False,
    captions="first",
    dtype="float16",
    precision="fp32",
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
    source="0" * 64,
    source_shards="noise",
    versions={},
)


def sample(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (2, C, h, w), and text (L, D) of an image, float16."""
    rng = np.random.default_rng(number)
    latent = rng.normal(size=(2, *LATENT))
    latent[1] = np.abs(latent[1])
    return latent.astype(np.float16), rng.normal(size=(rng.integers(4, TOKENS + 1), WIDTH)).astype(np.float16)


def tensors(number: int) -> dict[str, Tensor]:
    """For litdata; a function of the module, because its workers are spawned."""
    latent, text = map(torch.from_numpy, sample(number))
    return {"latent": latent, "text": text}


def write(folder: Path, count: int, peers: list[str]) -> None:
    """The same samples in every layout that is compared."""
    from webdataset.writer import TarWriter

    ours, tars, entries = folder / "ours", folder / "webdataset", []
    for made in (ours, tars):
        made.mkdir()
    for shard, first in enumerate(range(0, count, PER_SHARD)):
        with ShardWriter(ours, "latents", first_index=shard) as writer, TarWriter(str(tars / f"{shard:05d}.tar")) as tar:
            for start in range(first, first + PER_SHARD, PER_CHUNK):
                numbers = range(start, start + PER_CHUNK)
                latents, texts = zip(*map(sample, numbers), strict=True)
                keys, (mean, std) = [f"{number:09d}" for number in numbers], np.stack(latents, axis=1)
                sizes, crops = np.full((PER_CHUNK, 2), 256), np.tile([0, 0, 256, 256], (PER_CHUNK, 1))
                chunk = Chunk(keys, [["noise"]] * PER_CHUNK, {"mean": mean, "std": std}, [[*texts]], sizes, crops)
                writer.write(f"{start:09d}", chunk.members())
                for key, latent, text in zip(keys, latents, texts, strict=True):
                    tar.write({"__key__": key, "latent.npy": latent, "text.npy": text})
        entries.append(replace(writer.entries[0], samples=PER_SHARD))
    Manifest(LATENT_SHARDS, tuple(entries), INFO.as_extra()).save(ours)
    write_null_text(ours, [np.zeros((1, WIDTH), np.float16)])
    if "litdata" in peers:
        from litdata import optimize  # pyright: ignore[reportMissingImports]  optional

        optimize(tensors, list(range(count)), str(folder / "litdata"), chunk_bytes="16MB", num_workers=1, verbose=False)


def collated(latents: list[np.ndarray], texts: list[np.ndarray]) -> dict[str, Tensor]:
    """Collate single samples of the peers in the stored dtype, like ours, so that workers send no more bytes."""
    lengths = torch.tensor([len(text) for text in texts])
    padded = np.zeros((len(texts), max(map(len, texts)), WIDTH), np.float16)
    for place, text in zip(padded, texts, strict=True):
        place[: len(text)] = text
    mean, std = torch.from_numpy(np.stack(latents)).unbind(1)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    return {"mean": mean, "std": std, "text": torch.from_numpy(padded), "text_mask": mask}


def pairs_collated(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
    """For webdataset."""
    return collated(*map(list, zip(*samples, strict=True)))


def dicts_collated(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """For litdata; a function of the module, because its workers are spawned."""
    return collated(*([sample[name].numpy() for sample in samples] for name in ("latent", "text")))


def ours(folder: Path, workers: int) -> Batches:
    """Latent shards, as a training run reads them."""
    data = ShardDataModule(str(folder / "ours"), str(folder / "ours"), BATCH, workers=workers)
    data.setup("fit")
    yield from data.train_dataloader()


def webdataset(folder: Path, workers: int) -> Batches:
    """Tars of .npy files, as webdataset's own examples read them."""
    from webdataset.compat import WebDataset, WebLoader

    urls = [str(path) for path in sorted((folder / "webdataset").glob("*.tar"))]
    dataset: Any = WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(1000, initial=100)
    dataset = dataset.decode().to_tuple("latent.npy", "text.npy").batched(BATCH, pairs_collated, partial=False).repeat()
    yield from WebLoader(dataset, batch_size=None, num_workers=workers)


def litdata(folder: Path, workers: int) -> Batches:
    """Its own chunks, one pass after another by the same workers."""
    from litdata import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]  optional

    dataset = StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=True)
    how = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": dicts_collated, "drop_last": True}
    loader = StreamingDataLoader(dataset, batch_size=BATCH, **how)
    while True:
        yield from loader


LOADERS = {loader.__name__: loader for loader in (ours, webdataset, litdata)}


def to_float32(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conversion of a batch in the training step."""
    return {name: batch[name].float() for name in ("mean", "std", "text")} | {"text_mask": batch["text_mask"]}


def compare(batch: dict[str, Tensor], known: dict[bytes, int]) -> None:
    """Compare a batch with what was written; ``known``: sample numbers by the bytes of the mean's first row."""
    assert batch["mean"].shape == batch["std"].shape == (BATCH, *LATENT) and batch["text_mask"].dtype == torch.int64
    assert {batch[name].dtype for name in ("mean", "std", "text")} == {torch.float32}
    for row, mean in enumerate(batch["mean"]):
        latent, text = sample(known[mean[0, 0].half().numpy().tobytes()])
        assert np.array_equal(mean, latent[0]) and np.array_equal(batch["std"][row], latent[1])
        mask = batch["text_mask"][row].bool()
        assert np.array_equal(batch["text"][row][mask], text) and not batch["text"][row][~mask].any()
        assert mask.sum() == len(text)


def rate(loader: Callable[[Path, int], Batches], folder: Path, workers: int, known: dict[bytes, int] | None = None) -> float:
    """Samples per second once every worker has delivered twice, since the last spawned one starts seconds after the first."""
    iterator = map(to_float32, batches := loader(folder, workers))
    for _ in range(1 + 2 * workers):
        batch = next(iterator)
        if known is not None:
            compare(batch, known)
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < 1:
        next(iterator)
        count += BATCH
    batches.close()
    return count / seconds


def main() -> None:
    """Measure, and print the ratios."""
    parser = common.bench_parser(__doc__, "fewer samples and rounds, no optional peer: under 50 s")
    parser.add_argument("--samples", type=int, default=10240, help=f"whole shards of {PER_SHARD}")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    count, rounds = (2048, 1) if options.quick else (options.samples // PER_SHARD * PER_SHARD, options.rounds)
    peers = [] if options.quick else [name for name in OPTIONAL if importlib.util.find_spec(name)]
    print(machine_info())
    print(f"{count} samples, {rounds} rounds; not measured: {', '.join(set(OPTIONAL) - set(peers)) or 'none'}")
    loaders = {name: loader for name, loader in LOADERS.items() if name in peers or name not in OPTIONAL}
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, count, peers)
        size = sum(path.stat().st_size for path in (folder / "ours").iterdir())
        print(f"{size / 1e6:.0f} MB, {size / count / 1e3:.1f} KB per sample")
        known = {sample(number)[0][0, 0, 0].tobytes(): number for number in range(count)}
        for workers in (0, 2):
            # the training process gets the cores that no worker uses; more OpenMP threads would compete with the workers
            torch.set_num_threads(max((os.cpu_count() or 1) - workers, 1))
            for turn in range(rounds + 1):
                rates = {name: rate(loader, folder, workers, None if turn else known) for name, loader in loaders.items()}
                if turn == 0:
                    continue  # fills caches
                print(f"{workers} workers:", {name: round(value) for name, value in rates.items()}, flush=True)
                for name in rates.keys() - {"ours"}:
                    ratios.setdefault(f"{name}_{workers}workers", []).append(rates["ours"] / rates[name])
    common.print_ratios(ratios)


if __name__ == "__main__":
    main()
