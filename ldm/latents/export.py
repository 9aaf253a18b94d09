"""Image shards -> latent shards, one for each, complete or absent.

Decoding, encoding and writing overlap: threads turn batches of image bytes into latents, in the order of the shards, while the
main thread writes finished chunks into the tar. A shard's bytes depend on the image shard and the settings alone, so any number
of processes and interruptions gives the same files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

import numpy as np
import torch

from ldm.data.buckets import TOO_LONG, TOO_SMALL, Buckets, require_fits
from ldm.data.latent_schema import LatentInfo, write_null_text
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest, ShardEntry, relative_path
from ldm.data.parallel_map import parallel_map
from ldm.data.quarantine import QUARANTINE_NAME, BadSample, Quarantine
from ldm.data.sources import open_source
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, require_output_file, write_json
from ldm.latents import chunks
from ldm.latents.chunks import LatentSample, Record, Summary
from ldm.latents.claims import POLL_SECONDS, Claims, require_place
from ldm.latents.compute import Dtype, Precision, Process, single_threaded, versions
from ldm.latents.image_encoder import LatentEncoder
from ldm.latents.images import CaptionedImages, Captions
from ldm.latents.text_encoders import Embedded, TextEncoders
from ldm.machine import full_fp32
from ldm.models.autoencoder import (
    IDENTITY,
    autoencoder_folder,
    autoencoder_hash,
    downsampling_factor,
    has_posterior,
    load_autoencoder,
)
from ldm.models.text_encoder import TextChoice

# batches prepared ahead per thread: little memory, and shards are claimed shortly before they are written
AHEAD = 2


class ShardRecord(Record):
    """What the manifest needs of a finished shard: its entry, if it holds a latent, the images that could not be used, and how
    many were enlarged."""

    entry: ShardEntry | None
    bad: list[BadSample]
    enlarged: NotRequired[int]


class Job(NamedTuple):
    """A thread's unit of work: embed the captions of a window of a shard's samples, or encode some of its images.

    Attributes:
        shard, window: of the samples.
        chunk: the chunk of the shard that the images belong to; None: embed captions.
        rows: numbers of the samples.
    """

    shard: int
    window: int
    chunk: int | None
    rows: Sequence[int]


class Encoded(NamedTuple):
    """The result of encoding images: the good samples, a list for each image, with its :class:`BadSample` or empty, and how
    many were enlarged."""

    samples: list[LatentSample]
    tried: list[list[BadSample]]
    enlarged: int = 0


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
        """Write every shard that this process can claim."""
        source, total = self.dataset.sources[0], len(self.dataset)
        with closing(parallel_map(self.work, self.jobs(claims), self.threads, AHEAD)) as results:
            for number, of_shard in groupby(results, key=lambda pair: pair[0].shard):
                missing = set(claims.missing())
                done = sum(entry.samples for n, entry in enumerate(source.manifest.shards) if n not in missing)
                record = self.write_shard(number, of_shard, lambda samples, done=done: on_progress(done + samples, total))
                claims.finish(number, record)

    def jobs(self, claims: Claims) -> Iterator[Job]:
        """The jobs of all shards that can be claimed; each shard is claimed when its first job is asked for."""
        while (shard := claims.take()) is not None:
            for left in self.out.glob(f".latents-{shard:05d}.tar.*.tmp"):  # of a process that was killed
                left.unlink()
            samples = range(int(self.dataset.starts[shard]), int(self.dataset.starts[shard + 1]))
            chunk = 0
            for window, (rows, groups) in enumerate(self.dataset.windows(samples, chunks.CHUNK_SAMPLES)):
                yield Job(shard, window, None, rows)
                for group in groups:
                    for first in range(0, len(group), self.batch_size):
                        yield Job(shard, window, chunk, group[first : first + self.batch_size])
                    chunk += 1

    def work(self, job: Job) -> list[dict[str, Embedded]] | Encoded:
        """Called in threads."""
        if job.chunk is None:
            return self.texts.lookup(caption for row in job.rows for caption in self.dataset.captions_of(row))
        return self.encode(job.rows)

    def encode(self, rows: Sequence[int]) -> Encoded:
        """Decode and encode samples of one size."""
        attempts = [self.dataset.attempt(row) for row in rows]
        tried = [[sample] if isinstance(sample, BadSample) else [] for sample in attempts]
        good = [sample for sample in attempts if not isinstance(sample, BadSample)]
        if not good:
            return Encoded([], tried)
        latents = self.encoder([sample["image"] for sample in good], self.flip)
        for values in latents.values():
            finite = np.isfinite(values).all((1, 2, 3))
            if not finite.all():
                raise LdmError(
                    f"{self.dataset.name_of(rows[0])[0]}: the latents of {good[int(finite.argmin())]['key']} are not finite; "
                    "check the autoencoder, or compute in fp32 and store float32"
                )
        samples = [
            LatentSample(
                latents={name: values[row] for name, values in latents.items()},
                **{name: sample[name] for name in ("key", "captions", "original_size", "crop", "caption_names")},
            )
            for row, sample in enumerate(good)
        ]
        enlarged = sum(sample["image"].shape[1] > sample["crop"][2] for sample in good)
        return Encoded(samples, tried, enlarged)

    def write_shard(self, number: int, results: Iterator[tuple[Job, Any]], on_samples: Callable[[int], None]) -> dict[str, Any]:
        """Write the latents of one shard; returns its record for the manifest."""
        bad: list[BadSample] = []
        summary, tried, enlarged = Summary(self.texts), 0, 0
        with ShardWriter(self.out, "latents", samples_per_shard=None, first_index=number) as writer:
            for _, of_window in groupby(results, key=lambda pair: pair[0].window):
                _, embedded = next(of_window)
                for chunk, of_chunk in groupby(of_window, key=lambda pair: pair[0].chunk):
                    samples = []
                    for _, encoded in of_chunk:
                        self.quarantine.add(encoded.tried)
                        bad += chain.from_iterable(encoded.tried)
                        tried += len(encoded.tried)
                        enlarged += encoded.enlarged
                        on_samples(tried)
                        samples += encoded.samples
                    if samples:
                        made = summary.chunk(samples, embedded, self.dataset.sources[0].spec)
                        writer.write(f"{chunk:08d}", made.members())
        entry = vars(replace(writer.entries[0], samples=summary.samples)) if writer.entries else None
        return {"entry": entry, "bad": bad, "enlarged": enlarged} | summary.as_record()

    def finish(self, claims: Claims, info: LatentInfo, request: dict[str, Any]) -> None:
        """Write the manifest from the records of all shards; one process does so."""
        out = self.out
        with claims.exclusive():
            if claims.is_done:
                return
            records: list[ShardRecord] = claims.records(ShardRecord)
            # a shard that was lost since is written again
            entries = [record["entry"] for record in records]
            for number, entry in enumerate(entries):
                if entry and not ((path := out / entry.name).is_file() and path.stat().st_size == entry.bytes):
                    claims.forget(number)
            if claims.missing():
                return
            for left in out.glob(".*.tmp"):  # of a process that was killed; nobody else writes now
                left.unlink()
            # in the order of the shards; each was logged when it was found
            (out / QUARANTINE_NAME).unlink(missing_ok=True)
            limits = self.quarantine
            quarantine = Quarantine(limits.samples, limits.max_share, limits.samples, out / QUARANTINE_NAME, quiet=True)
            summary = Summary(self.texts)
            for record in records:
                quarantine.add([bad] for bad in record["bad"])
                summary.add_record(record)
            entries = tuple(filter(None, entries))
            if not entries:
                raise LdmError(f"{out}: no sample could be used; {out / QUARANTINE_NAME} says why")
            Manifest(LATENT_SHARDS, entries).check_cheap(out)  # and no other tar
            null_text = write_null_text(out, self.texts.null())
            shapes = {record["entry"].name: record["shapes"] for record in records if record["entry"]}
            extra = replace(summary.complete(info, out, shapes), null_text=null_text).as_extra()
            if info.buckets is not None:
                extra["enlarged"] = sum(record.get("enlarged", 0) for record in records)
                reasons = [bad.reason for record in records for bad in record["bad"]]
                extra["too_small"] = sum(TOO_SMALL in reason for reason in reasons)
                if info.buckets.max_crop is not None:
                    extra["too_long"] = sum(TOO_LONG in reason for reason in reasons)
            Manifest(LATENT_SHARDS, entries, extra | {"quarantined": len(quarantine), "request": request}).save(out)


def _require_fit(dataset: CaptionedImages, max_bad_share: float) -> None:
    """Raise :class:`UsageError` where too many images fit no bucket, as far as that is known before."""
    if dataset.buckets is not None and dataset.known_sizes is not None:
        unfit = (dataset.buckets.assign(dataset.known_sizes) < 0) & (dataset.known_sizes.min(1) > 0)
        require_fits(int(unfit.sum()), len(dataset), dataset.sources[0].spec, max_bad_share)


def export_latents(
    autoencoder_path: str | Path,
    shards: str | Path,
    out: str | Path,
    text_encoder: TextChoice = "minilm",
    batch_size: int = 64,
    dtype: Dtype = "float16",
    image_size: int | None = None,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    precision: Precision = "fp32",
    mode: bool = False,
    flip: bool = False,
    captions: Literal["first", "all"] | list[str] = "first",
    max_bad_share: float = 0.01,
    keep_statistics: bool = False,
    threads: int | None = None,
    buckets: Buckets | None = None,
) -> Manifest:
    """Encode every image and caption once. Called again after an interruption, it resumes after the last complete shard.

    Any number of processes may be given the same settings at once, by torchrun, SLURM or by hand: they share the work, and each
    returns when all shards are done.

    Args:
        autoencoder_path: as :func:`ldm.models.autoencoder.load_autoencoder` takes it.
        shards: folder of image shards; every sample needs a caption.
        out: a new folder, or that of an interrupted export with the same settings.
        text_encoder: see :meth:`ldm.models.text_encoder.TextEncoder.load`; one or several.
        batch_size: images per forward pass of the autoencoder.
        dtype: of the stored tensors.
        image_size: crop and resize images to this side; None: keep each image's size, cropped to a multiple of the
            autoencoder's factor.
        device: None: this process's own GPU, or the CPU.
        on_progress: called with (samples done, samples).
        precision: of the networks' computation.
        mode: store the posterior's mode only, as for an autoencoder without a posterior.
        flip: also store the latents of mirrored images.
        captions: store the first of an image's captions, all, or those of some names
            (:func:`ldm.data.decode.captions_called`).
        max_bad_share: unusable samples tolerated, as a share of all; of images that fit no bucket at least
            :data:`ldm.data.buckets.UNFIT_SHARE`.
        keep_statistics: also write mean and standard deviation into the config of the autoencoder's directory.
        threads: None: as many as this process has CPU cores.
        buckets: crop and resize each image to the size of its bucket; those that are too small for all are left out, and count
            as unusable.

    Raises:
        UsageError: for invalid folders or settings.
        LdmError: for too many unusable samples, latents that are not finite, or a folder that cannot be written.
    """
    for name, value in (("batch_size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    if image_size is not None and buckets is not None:
        raise UsageError("image_size and buckets are two ways to fit images; give one")
    config = Path(autoencoder_path if autoencoder_path == IDENTITY else autoencoder_folder(autoencoder_path)) / "config.json"
    if keep_statistics:
        if autoencoder_path == IDENTITY:
            raise UsageError("keep_statistics writes into the directory of an autoencoder, and identity has none; leave it out")
        if config.parent != Path(autoencoder_path):
            raise UsageError(
                f"keep_statistics would change the pipeline or download {autoencoder_path}, which was trained with its own"
            )
        require_output_file(config)
    process, out = Process.from_environment(), Path(out)
    device = process.device() if device is None else torch.device(device)
    require_place(out)
    source = open_source(shards, IMAGE_SHARDS)
    autoencoder = load_autoencoder(autoencoder_path, device)
    with single_threaded(), full_fp32():
        mode = mode or not has_posterior(autoencoder)
        encoder = LatentEncoder(autoencoder, precision, dtype, mode)
        texts = TextEncoders.load(text_encoder, device, dtype, precision)
        chosen: Captions = "none" if texts.is_unconditional else captions
        if source.manifest.captioned is False and chosen in ("first", "all"):
            raise UsageError(f"{source.spec} has no captions; stage two needs one for every image, or the text encoder none")
        factor = downsampling_factor(autoencoder)
        if buckets is not None:
            buckets.require_multiples(factor, "the autoencoder's factor")
        dataset = CaptionedImages(source, image_size, factor, chosen, buckets)
        _require_fit(dataset, max_bad_share)
        info = LatentInfo(
            autoencoder=autoencoder_hash(autoencoder),
            text_encoders=texts.info([0] * len(texts.encoders), out),
            resolution=image_size,
            buckets=buckets,
            posterior="mode" if mode else "gaussian",
            flips=flip,
            captions="all" if isinstance(chosen, list) else chosen,
            caption_names=tuple(chosen) if isinstance(chosen, list) else (),
            dtype=dtype,
            precision=precision,
            source=source.manifest.hash,
            source_shards=relative_path(source.spec, out),
            versions=versions(),
        )
        # every setting that changes the bytes; shards and text encoders may have moved by the next run
        measured = {"latent_shapes", "shard_shapes", "latents_mean", "latents_std", "source_shards", "null_text", "fingerprint"}
        request = {name: value for name, value in info.as_extra().items() if name not in measured}
        request["text_encoders"] = [text.hash for text in info.text_encoders]
        request = json.loads(json.dumps(request | {"batch_size": batch_size, "device": device.type}))  # as it is read back
        # no limit in a row: a whole shard may be broken
        quarantine = Quarantine(len(dataset), max_bad_share, max_in_a_row=len(dataset))
        exporter = Exporter(out, dataset, encoder, texts, batch_size, flip, quarantine, threads or process.cores)
        claims = None
        try:
            claims = Claims(out, request, len(source.manifest.shards), process.rank, process.world_size)
            while not claims.is_done:
                if claims.missing():
                    exporter.run(claims, on_progress or (lambda done, total: None))
                if claims.missing():
                    time.sleep(POLL_SECONDS)  # for other processes; should one of them die, its shard can be claimed
                else:
                    exporter.finish(claims, info, request)
        except OSError as error:
            if claims is None or not claims.is_done:  # otherwise another process finished, and removed the work folder
                fix = "fix that and run the same command again to resume"
                raise LdmError(f"{out} cannot be written ({error.strerror or error}); {fix}") from error
        finally:
            if claims is not None:
                claims.release()
    manifest = Manifest.load(out, LATENT_SHARDS)
    if keep_statistics:
        write_json(config, read_json(config) | {name: manifest.extra[name] for name in ("latents_mean", "latents_std")})
    return manifest
