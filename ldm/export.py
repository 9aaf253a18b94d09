"""Image shards -> latent shards: one latent shard for each image shard, each whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ldm.data.images import ImageDataset
from ldm.data.latents import LatentDataset, LatentInfo, read_texts, write_chunk, write_null_text
from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest, ShardEntry
from ldm.data.quarantine import QUARANTINE_NAME, BadSample, Quarantine
from ldm.data.sources import folder_source, open_source
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, require_new_folder, write_json
from ldm.models.autoencoder import autoencoder_hash, load_autoencoder, pixels_to_images
from ldm.models.text import TextEncoder

# says what an unfinished export was asked for; its absence with a manifest says that it is finished
UNFINISHED_NAME = "unfinished.json"
CHUNK_SAMPLES = 256


class CaptionCache:
    """Embeddings by caption: data sets repeat captions, and the text encoder costs more than the lookup."""

    def __init__(self, encoder: TextEncoder, dtype: str, capacity: int = 20_000):
        self.encoder, self.dtype, self.capacity = encoder, dtype, capacity
        self.known: dict[str, np.ndarray] = {}

    def __call__(self, captions: list[str]) -> list[np.ndarray]:
        """(L_i, D) per caption, unpadded."""
        missing = self._make_room(captions)
        # by length, so that little is computed on padding
        missing.sort(key=len)
        for start in range(0, len(missing), 64):
            few = missing[start : start + 64]
            embeddings, mask = self.encoder.encode(few)
            for caption, embedding, length in zip(few, embeddings, mask.sum(1).tolist(), strict=True):
                self.known[caption] = embedding[:length].cpu().numpy().astype(self.dtype)
        return [self.known[caption] for caption in captions]

    def remember(self, captions: list[str], texts: list[np.ndarray]) -> None:
        """Take over what a call gave before an interruption: an embedding's last bit depends on its batch, so the calls
        that follow must find the same captions missing for the same bytes to come out."""
        self._make_room(captions)
        self.known.update(zip(captions, texts, strict=True))

    def _make_room(self, captions: list[str]) -> list[str]:
        """The captions to encode, each once."""
        missing = list(dict.fromkeys(caption for caption in captions if caption not in self.known))
        if len(self.known) + len(missing) > self.capacity:
            self.known.clear()
            missing = list(dict.fromkeys(captions))
        return missing


def export_latents(
    autoencoder_path: str | Path,
    shards: str | Path,
    out: str | Path,
    text_encoder: str = "minilm",
    batch_size: int = 64,
    dtype: str = "float16",
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Encode every picture and caption once. Run again after an interruption, it goes on from its last whole shard.

    Args:
        autoencoder_path: a directory of ``AutoencoderKL.save_pretrained``.
        shards: folder of image shards; every sample needs a caption.
        out: a new folder, or one that an interrupted export of the same things left.
        text_encoder: see :meth:`ldm.models.text.TextEncoder.load`.
        batch_size: pictures per call of the autoencoder.
        dtype: of what is stored: float16 or float32.
        image_size: fit pictures to this side; needed where the shards hold several sizes.
        on_progress: called with (samples done, samples).

    Raises:
        UsageError: for folders that do not serve.
        LdmError: for a broken shard, a sample without a caption, or latents that are not finite.
    """
    if batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}; give 1 or more")
    out = Path(out)
    source = open_source(shards, IMAGE_SHARDS)
    dataset = ImageDataset(source, image_size)
    autoencoder = load_autoencoder(autoencoder_path).to(device)
    encoder = TextEncoder.load(text_encoder, device)
    request = {
        "autoencoder": autoencoder_hash(autoencoder),
        "text_encoder": encoder.name,
        "text_encoder_hash": encoder.hash,
        "source": source.manifest.hash,
        "dtype": dtype,
        "image_size": image_size,
    }
    _claim(out, request)
    captions = CaptionCache(encoder, dtype)
    write_null_text(out, captions([""])[0])
    entries: list[ShardEntry] = []
    # made anew from the records of the finished shards where an export goes on
    (out / QUARANTINE_NAME).unlink(missing_ok=True)
    quarantine = Quarantine(len(dataset), file=out / QUARANTINE_NAME, config=None)
    done = 0
    for number, shard in enumerate(source.manifest.shards):
        record = out / f".latents-{number:05d}.json"
        if record.is_file():
            finished = read_json(record)
            quarantine.add(tried for bad in finished["bad"] for tried in ([BadSample(*bad)], []))
            if finished["entry"]:
                entries.append(entry := ShardEntry(**finished["entry"]))
                for words, texts in read_texts(out / entry.name, entry.samples):
                    captions.remember(words, texts)
        else:
            tried: list[list[BadSample]] = []
            samples = range(int(dataset.starts[number]), int(dataset.starts[number + 1]))
            # the latents of a chunk of a shard's samples, one chunk at a time
            with ShardWriter(out, "latents", samples_per_shard=len(samples), first_index=number) as writer:
                for chunk, start in enumerate(range(0, len(samples), CHUNK_SAMPLES)):
                    few = samples[start : start + CHUNK_SAMPLES]
                    tried += _write_samples(writer, f"{chunk:08d}", dataset, few, autoencoder, captions, batch_size, dtype)
                    if on_progress is not None:
                        on_progress(done + start + len(few), len(dataset))
            quarantine.add(tried)
            bad = [sample for none_or_one in tried for sample in none_or_one]
            entry = replace(writer.entries[0], samples=len(samples) - len(bad)) if writer.entries else None
            write_json(record, {"entry": entry and entry.__dict__, "bad": bad})
            entries += [entry] if entry else []
        done += shard.samples
        if on_progress is not None:
            on_progress(done, len(dataset))
    return _finish(out, entries, request, encoder.width, quarantine)


def _claim(out: Path, request: dict) -> None:
    """Make ``out`` ours, or find in it the same export unfinished."""
    unfinished = out / UNFINISHED_NAME
    if unfinished.is_file():
        if read_json(unfinished) != request:
            raise UsageError(f"{out} holds an unfinished export of other things ({unfinished}); give a new --out")
        return
    require_new_folder(out, "latent shards")
    out.mkdir(parents=True, exist_ok=True)
    write_json(unfinished, request)


def _write_samples(
    writer: ShardWriter,
    name: str,
    dataset: ImageDataset,
    indices: range,
    autoencoder: AutoencoderKL,
    captions: CaptionCache,
    batch_size: int,
    dtype: str,
) -> list[list[BadSample]]:
    """Encode and append one chunk; returns for every sample the record of why it cannot be used, or nothing."""
    means, stds, keys, texts, tried = [], [], [], [], []
    for start in range(0, len(indices), batch_size):
        attempts = [dataset.attempt(index) for index in indices[start : start + batch_size]]
        tried += [[sample] if isinstance(sample, BadSample) else [] for sample in attempts]
        good = [sample for sample in attempts if not isinstance(sample, BadSample)]
        if not good:
            continue
        batch = dataset.collate(good)
        for key, caption in zip(batch["key"], batch["caption"], strict=True):
            if not caption:
                raise LdmError(f"{dataset.sources[0].spec}: sample {key} has no caption; stage two needs one for every picture")
        with torch.inference_mode():
            posterior = autoencoder.encode(pixels_to_images(batch["image"].to(autoencoder.device))).latent_dist
        if not (torch.isfinite(posterior.mean).all() and torch.isfinite(posterior.std).all()):
            where = f"{dataset.sources[0].spec}: latents near sample {batch['key'][0]}"
            raise LdmError(f"{where} are not finite; is the autoencoder whole?")
        means.append(posterior.mean.float().cpu().numpy().astype(dtype))
        stds.append(posterior.std.float().cpu().numpy().astype(dtype))
        keys += batch["key"]
        texts += batch["caption"]
    if keys:
        write_chunk(writer, name, np.concatenate(means), np.concatenate(stds), captions(texts), keys, texts)
    return tried


def _finish(out: Path, entries: list[ShardEntry], request: dict, text_width: int, quarantine: Quarantine) -> Manifest:
    """Measure the whole set and write the manifest."""
    draft = Manifest(LATENT_SHARDS, tuple(entries))
    # the manifest is written last: where it stands, the export is whole
    dataset = LatentDataset(folder_source(out, draft))
    mean, std = latent_statistics(dataset)
    shape = dataset[0]["mean"].shape
    info = LatentInfo(
        autoencoder=request["autoencoder"],
        text_encoder=request["text_encoder"],
        text_encoder_hash=request["text_encoder_hash"],
        text_width=text_width,
        latent_shape=tuple(shape),
        dtype=request["dtype"],
        latents_mean=tuple(mean.tolist()),
        latents_std=tuple(std.tolist()),
        source=request["source"],
    )
    manifest = replace(draft, extra=info.as_extra() | {"quarantined": len(quarantine)})
    manifest.save(out)
    for leftover in (out / UNFINISHED_NAME, *out.glob(".latents-*.json")):
        leftover.unlink()
    return manifest


def latent_statistics(dataset: LatentDataset) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel mean and standard deviation of latents *drawn* from the posteriors, (C,) float64 each.

    Exact over the set: E[z] = E[mean]; Var[z] = E[mean²] + E[std²] − E[z]². Two passes, so that nothing cancels.
    """
    count, total = 0, 0.0
    for mean, _ in dataset.chunked():
        total = total + mean.sum((0, 2, 3))
        count += mean.size // mean.shape[1]
    average = total / count
    spread = 0.0
    for mean, std in dataset.chunked():
        spread = spread + ((mean - average[:, None, None]) ** 2 + std**2).sum((0, 2, 3))
    return average, np.sqrt(spread / count)
