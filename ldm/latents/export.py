"""Image shards -> latent shards: one latent shard for each image shard, each whole or not there.

Decoding, encoding and writing overlap: threads take batch after batch from bytes to latents, in the order of the shards, while
this one puts finished chunks into the tar. Everything about a shard's bytes is decided by the shard and the request alone, so
one process or many, interrupted or not, give the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ldm.data.decode import DecodeError
from ldm.data.latent_schema import Chunk, LatentInfo, write_null_text
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest, ShardEntry
from ldm.data.moments import Moments
from ldm.data.parallel_map import parallel_map
from ldm.data.quarantine import QUARANTINE_NAME, BadSample, Quarantine
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, write_json
from ldm.latents.claims import Claims
from ldm.latents.compute import Dtype, Precision, Process, single_threaded, versions
from ldm.latents.image_encoder import LatentEncoder
from ldm.latents.images import CaptionedImages
from ldm.latents.text_encoders import Embedded, TextEncoders, embeddings_of
from ldm.models.autoencoder import autoencoder_hash, downsampling_factor, load_autoencoder, pixels_to_images

CHUNK_SAMPLES = 256
# batches made ahead of the one that is written, for each thread: little memory, and no shard is claimed long before its turn
AHEAD = 2


class Job(NamedTuple):
    """What one thread does at a time: embed the captions of a window of a shard's samples, or encode some of its images.

    Attributes:
        shard, window: where it belongs.
        chunk: of the shard, which the images go into; None: captions.
        rows: numbers of the samples.
    """

    shard: int
    window: int
    chunk: int | None
    rows: Sequence[int]


class Encoded(NamedTuple):
    """What became of images: the good samples with their latents (B, C, h, w), and for each tried the record of a bad one."""

    samples: list[dict[str, Any]]
    latents: dict[str, np.ndarray]
    tried: list[list[BadSample]]


class Exporter:
    """The work of one process on an export."""

    def __init__(
        self,
        out: Path,
        dataset: CaptionedImages,
        encoder: LatentEncoder,
        texts: TextEncoders,
        batch_size: int,
        flip: bool,
        quarantine: Quarantine,
        threads: int,
    ):
        self.out, self.dataset, self.encoder, self.texts = out, dataset, encoder, texts
        self.batch_size, self.flip, self.quarantine, self.threads = batch_size, flip, quarantine, threads

    def run(self, claims: Claims, on_progress: Callable[[int, int], None]) -> None:
        """Make every shard that this process can claim."""
        source = self.dataset.sources[0]
        with closing(parallel_map(self.work, self.jobs(claims), self.threads, AHEAD)) as results:
            for number, of_shard in groupby(results, key=lambda pair: pair[0].shard):
                missing = set(claims.missing())
                done = sum(entry.samples for n, entry in enumerate(source.manifest.shards) if n not in missing)
                record = self.write_shard(number, of_shard, lambda samples, done=done: on_progress(done + samples, len(self)))
                claims.finish(number, record)

    def __len__(self) -> int:
        return len(self.dataset)

    def jobs(self, claims: Claims) -> Iterator[Job]:
        """Of all the shards that can be claimed, each claimed when its first job is asked for."""
        while (shard := claims.take()) is not None:
            for left in self.out.glob(f".{self._name(shard)}.*.tmp"):  # of a process that was killed
                left.unlink()
            samples = range(int(self.dataset.starts[shard]), int(self.dataset.starts[shard + 1]))
            chunk = 0
            for window, start in enumerate(range(0, max(len(samples), 1), CHUNK_SAMPLES)):
                rows = samples[start : start + CHUNK_SAMPLES]
                yield Job(shard, window, None, rows)
                for group in self.dataset.alike(rows):
                    for few in range(0, len(group), self.batch_size):
                        yield Job(shard, window, chunk, group[few : few + self.batch_size])
                    chunk += 1

    @staticmethod
    def _name(shard: int) -> str:
        return f"latents-{shard:05d}.tar"

    def work(self, job: Job) -> list[dict[str, Embedded]] | Encoded:
        """Called in threads."""
        return self.embed(job.rows) if job.chunk is None else self.encode(job.rows)

    def embed(self, rows: Sequence[int]) -> list[dict[str, Embedded]]:
        """For each text encoder what it makes of the captions of these samples."""
        return self.texts.lookup(caption for row in rows for caption in self.dataset.captions_of(row))

    def encode(self, rows: Sequence[int]) -> Encoded:
        """Samples of one size from bytes to latents."""
        attempts = [self.dataset.attempt(row) for row in rows]
        tried = [[sample] if isinstance(sample, BadSample) else [] for sample in attempts]
        good = [sample for sample in attempts if not isinstance(sample, BadSample)]
        if not good:
            return Encoded([], {}, tried)
        images = pixels_to_images(torch.from_numpy(np.stack([sample.pop("image") for sample in good])))
        latents = self.encoder(images)
        if self.flip:
            latents |= {f"{name}_flip": values for name, values in self.encoder(images.flip(-1)).items()}
        for values in latents.values():
            finite = np.isfinite(values).all((1, 2, 3))
            if not finite.all():
                shard = self.dataset.bad(rows[0], DecodeError("")).shard
                raise LdmError(
                    f"{shard}: the latents of {good[int(finite.argmin())]['key']} are not finite; is the autoencoder whole? "
                    "Or give --precision fp32 and --dtype float32"
                )
        return Encoded(good, latents, tried)

    def write_shard(self, number: int, results: Iterator[tuple[Job, Any]], on_samples: Callable[[int], None]) -> dict[str, Any]:
        """Write the latents of one shard; returns what the manifest will need of it."""
        bad: list[BadSample] = []
        cut = np.zeros(len(self.texts.encoders), np.int64)
        shapes: dict[tuple[int, ...], int] = {}
        moments: list[Moments] = []
        tried = 0
        with ShardWriter(self.out, "latents", samples_per_shard=None, first_index=number) as writer:
            for _, of_window in groupby(results, key=lambda pair: pair[0].window):
                _, embedded = next(of_window)
                for name, of_chunk in groupby(of_window, key=lambda pair: pair[0].chunk):
                    parts = []
                    for _, encoded in of_chunk:
                        self.quarantine.add(encoded.tried)
                        bad += [sample for none_or_one in encoded.tried for sample in none_or_one]
                        tried += len(encoded.tried)
                        on_samples(tried)
                        parts += [encoded] if encoded.samples else []
                    if not parts:
                        continue
                    chunk, its_cut = self._chunk(parts, embedded)
                    writer.write(f"{name:08d}", chunk.members())
                    moments.append(chunk.moments())
                    shape = chunk.latents["mean"].shape
                    shapes[shape[1:]] = shapes.get(shape[1:], 0) + shape[0]
                    cut += its_cut
        entry = replace(writer.entries[0], samples=sum(shapes.values())) if writer.entries else None
        record = {
            "entry": entry and vars(entry),
            "bad": bad,
            "cut": cut.tolist(),
            "shapes": [[*shape, count] for shape, count in shapes.items()],
        }
        if moments:
            total = Moments.merge(moments)
            record["moments"] = {"count": total.count, "mean": total.mean.tolist(), "squares": total.squares.tolist()}
        return record

    def _chunk(self, parts: list[Encoded], embedded: list[dict[str, Embedded]]) -> tuple[Chunk, list[int]]:
        """Images and captions together; and for each text encoder how many of the captions it cut."""
        samples = [sample for part in parts for sample in part.samples]
        texts, cut = embeddings_of([caption for sample in samples for caption in sample["captions"]], embedded)
        for sample in samples:
            for known, encoder in zip(embedded, self.texts.encoders, strict=True):
                if not all(np.isfinite(known[caption].text).all() for caption in sample["captions"]):
                    raise LdmError(
                        f"{self.dataset.sources[0].spec}: the embedding of {sample['key']}'s caption by {encoder.name} is not "
                        "finite; give --dtype float32 and --precision fp32"
                    )
        chunk = Chunk(
            keys=[sample["key"] for sample in samples],
            captions=[sample["captions"] for sample in samples],
            latents={name: np.concatenate([part.latents[name] for part in parts]) for name in parts[0].latents},
            texts=texts,
            original_size=np.array([sample["original_size"] for sample in samples]),
            crop=np.array([sample["crop"] for sample in samples]),
        )
        return chunk, cut


def export_latents(
    autoencoder_path: str | Path,
    shards: str | Path,
    out: str | Path,
    text_encoder: str | Sequence[str] = "minilm",
    batch_size: int = 64,
    dtype: Dtype = "float16",
    image_size: int | None = None,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    precision: Precision = "fp32",
    mode: bool = False,
    flip: bool = False,
    captions: Literal["first", "all"] = "first",
    max_bad_share: float = 0.01,
    keep_statistics: bool = False,
    threads: int | None = None,
) -> Manifest:
    """Encode every image and caption once. Run again after an interruption, it goes on from its last whole shard.

    Any number of processes may be given the same request at once, by torchrun, SLURM or hand: they share the shards out, and
    each returns when all are done.

    Args:
        autoencoder_path: a directory of ``AutoencoderKL.save_pretrained``.
        shards: folder of image shards; every sample needs a caption.
        out: a new folder, or one that an interrupted export of the same things left.
        text_encoder: see :meth:`ldm.models.text_encoder.TextEncoder.load`; one or several.
        batch_size: images per call of the autoencoder.
        dtype: of what is stored.
        image_size: fit images to this side; None: as they are, each less what is no multiple of the autoencoder's factor.
        device: None: this process's own GPU, or the CPU.
        on_progress: called with (samples done, samples).
        precision: that the networks compute in.
        mode: store the posterior's mode alone.
        flip: store the latents of mirrored images, too.
        captions: store the first of an image's captions, or all.
        max_bad_share: samples that cannot be used to bear, as a share of all.
        keep_statistics: write mean and standard deviation into the config of the autoencoder's directory, too.
        threads: None: as many as this process has CPU cores.

    Raises:
        UsageError: for folders or settings that do not serve.
        LdmError: for too many samples that cannot be used, latents that are not finite, or a folder that cannot be written.
    """
    for name, value in (("batch-size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; give 1 or more")
    process, out = Process.from_environment(), Path(out)
    device = process.device() if device is None else torch.device(device)
    source = open_source(shards, IMAGE_SHARDS)
    if not source.manifest.extra.get("captioned", True):
        raise UsageError(f"{source.spec} has no captions; stage two needs one for every image")
    autoencoder = load_autoencoder(autoencoder_path, device)
    with single_threaded():
        encoder = LatentEncoder(autoencoder, precision, dtype, mode)
        texts = TextEncoders.load([text_encoder] if isinstance(text_encoder, str) else text_encoder, device, dtype, precision)
        dataset = CaptionedImages(source, image_size, downsampling_factor(autoencoder), captions)
        info = LatentInfo(
            autoencoder=autoencoder_hash(autoencoder),
            text_encoders=texts.info([0] * len(texts.encoders)),
            latent_shapes=(),
            resolution=image_size,
            posterior="mode" if mode else "gaussian",
            flips=flip,
            captions=captions,
            dtype=dtype,
            precision=precision,
            latents_mean=(),
            latents_std=(),
            source=source.manifest.hash,
            source_shards=source.spec,
            versions=versions(),
        )
        # all that shapes the bytes; the same shards may lie elsewhere by the next run
        measured = {"latent_shapes", "latents_mean", "latents_std", "source_shards"}
        request = {name: value for name, value in info.as_extra().items() if name not in measured}
        request = json.loads(json.dumps(request | {"batch_size": batch_size, "device": device.type}))  # as it is read back
        # however many come in a row: a whole shard may be broken, and all of them count
        quarantine = Quarantine(len(dataset), max_bad_share, max_in_a_row=len(dataset), config="--")
        exporter = Exporter(out, dataset, encoder, texts, batch_size, flip, quarantine, threads or process.cores)
        claims = None
        try:
            claims = Claims(out, request, len(source.manifest.shards), process.rank, process.world_size)
            while not claims.is_done:
                if claims.missing():
                    exporter.run(claims, on_progress or (lambda done, total: None))
                if claims.missing():
                    claims.wait()  # for what others hold; should one of them die, its shard is free
                else:
                    _finish(out, claims, request, info, texts, len(dataset), max_bad_share)
        except OSError as error:
            if claims is None or not claims.is_done:  # otherwise another process finished, and took away what it needed
                raise LdmError(
                    f"{out} cannot be written ({error.strerror or error}); see to that and give the same command again, it "
                    "goes on"
                ) from error
        finally:
            if claims is not None:
                claims.release()
    manifest = Manifest.load(out, LATENT_SHARDS)
    if keep_statistics:
        config = Path(autoencoder_path) / "config.json"
        write_json(config, read_json(config) | {name: manifest.extra[name] for name in ("latents_mean", "latents_std")})
    return manifest


def _finish(
    out: Path,
    claims: Claims,
    request: dict[str, Any],
    info: LatentInfo,
    texts: TextEncoders,
    samples: int,
    max_bad_share: float,
) -> None:
    """Put together what is on record of the shards, and write the manifest; one process does so."""
    with claims.alone():
        if claims.is_done:
            return
        records = claims.records()
        # a shard that was lost since is made again
        entries = [ShardEntry(**record["entry"]) if record["entry"] else None for record in records]
        lost = [number for number, entry in enumerate(entries) if entry and not _stands(out / entry.name, entry)]
        for number in lost:
            claims.forget(number)
        if lost:
            return
        for left in out.glob(".*.tmp"):  # of a process that was killed; nobody else writes now
            left.unlink()
        # what is left out, in the order of the shards; each was said in the log when it was found
        (out / QUARANTINE_NAME).unlink(missing_ok=True)
        quarantine = Quarantine(samples, max_bad_share, samples, out / QUARANTINE_NAME, config="--", quiet=True)
        for record in records:
            quarantine.add([BadSample(*bad)] for bad in record["bad"])
        entries = tuple(filter(None, entries))
        if not entries:
            raise LdmError(f"{out}: no sample could be used; {out / QUARANTINE_NAME} says why")
        Manifest(LATENT_SHARDS, entries).check_cheap(out)  # and no other tar
        shapes: dict[tuple[int, ...], int] = {}
        for *shape, count in (shape for record in records for shape in record["shapes"]):
            shapes[tuple(shape)] = shapes.get(tuple(shape), 0) + count
        moments = Moments.merge(
            Moments(found["count"], np.array(found["mean"]), np.array(found["squares"]))
            for record in records
            if (found := record.get("moments"))
        )
        info = replace(
            info,
            text_encoders=texts.info(np.sum([record["cut"] for record in records], axis=0).tolist()),
            latent_shapes=tuple(sorted(shapes, key=shapes.__getitem__, reverse=True)),
            latents_mean=tuple(moments.mean.tolist()),
            latents_std=tuple(moments.std.tolist()),
        )
        write_null_text(out, texts.null())
        Manifest(LATENT_SHARDS, entries, info.as_extra() | {"quarantined": len(quarantine), "request": request}).save(out)


def _stands(path: Path, entry: ShardEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes
