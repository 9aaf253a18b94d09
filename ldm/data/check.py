"""Verify that a shard folder holds what its manifest says, and index tars that came without a manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.decode import IMAGE_EXTENSIONS, DecodeError, decode_pixels
from ldm.data.image_sizes import holds_sizes, image_sizes, sizes_of
from ldm.data.latent_schema import (
    EXPORT_AGAIN,
    NULL_TEXT_NAME,
    LatentInfo,
    LatentShard,
    Metadata,
    StoredTensor,
    latent_info,
    read_null_text,
    text_name,
)
from ldm.data.manifest import (
    IMAGE_SHARDS,
    LATENT_SHARDS,
    MANIFEST_NAME,
    MAX_SHARD_BYTES,
    SIZES_NAME,
    Manifest,
    Problem,
    ShardEntry,
    require_finished_pack,
    tar_paths,
)
from ldm.data.remote import fetch
from ldm.data.shards import EXTENSIONS, KeyDot, ShardReader, Unread, unread_images
from ldm.data.sources import ShardSource, open_source, remote_files
from ldm.errors import LdmError, UsageError
from ldm.files import atomic_folder, parse_json, require_folder, require_new_folder, require_output_file, sha256_file
from ldm.terminal import printable


@dataclass(frozen=True)
class Checked:
    """The result for one shard: how many samples are good, and its problems."""

    entry: ShardEntry
    good: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Indexed:
    """What one tar holds: its entry, the sizes of its images (N, 2), how many samples have a caption, how many cannot be used,
    and images in no sample."""

    entry: ShardEntry
    sizes: np.ndarray
    captioned: int
    unusable: int
    unread: tuple[Unread, ...]


def index_folder(
    folder: str | os.PathLike, on_progress: Callable[[int, int], None] | None = None, key_dot: KeyDot = "first"
) -> Manifest:
    """Make the manifest of image shards from elsewhere (img2dataset, ...); the caller saves it. Nothing is rewritten.

    ``extra`` tells how many samples have a caption, and how many cannot be used because they lack an image or have a duplicate
    key: the manifest counts those, and readers skip them. Where images are in no sample, because of their names or formats, it
    tells how many, and names some. ``key_dot``: see :mod:`ldm.data.shards`. ``on_progress(shards_done, shards)``.

    Raises :class:`UsageError` where there is no tar, and :class:`LdmError` where a shard is damaged or has no sample.
    """
    folder = require_folder(folder, "a folder of .tar shards")
    require_finished_pack(folder)
    paths = tar_paths(folder)
    if not paths:
        others = f" (it holds {', '.join(map(printable, names[:3]))})" if (names := compressed_tars(folder)) else ""
        raise UsageError(
            f"{folder} holds no .tar shard{others}; unpack compressed ones, or make shards of a folder of images with "
            "`ldm shards pack`"
        )
    return _manifest_of((index_shard(path, key_dot) for path in paths), len(paths), on_progress, key_dot)


def index_here(
    folder: str | os.PathLike, on_progress: Callable[[int, int], None] | None = None, key_dot: KeyDot = "first"
) -> tuple[Manifest, Path]:
    """Make the manifest of a folder of tars (:func:`index_folder`) and save it there; whether it can be is checked before."""
    folder = require_folder(folder, "a folder of .tar shards")
    try:
        manifest, sizes = (require_output_file(folder / name) for name in (MANIFEST_NAME, SIZES_NAME))
        if sizes.exists() and not manifest.exists() and not holds_sizes(sizes):  # somebody else wrote it
            raise UsageError(f"{sizes} would be overwritten; move it away")
    except UsageError as error:
        raise UsageError(f"{error}; or give a folder for the manifest: ldm shards index {folder} --out DIR") from None
    manifest = index_folder(folder, on_progress, key_dot)
    return manifest, manifest.save(folder)


def index_elsewhere(
    spec: str,
    out: str | os.PathLike,
    on_progress: Callable[[int, int], None] | None = None,
    key_dot: KeyDot = "first",
) -> tuple[Manifest, Path]:
    """Make the manifest of tars that stay where they are, and save it in the new folder ``out``, to be used like any folder of
    shards: the manifest's ``location`` says where they are.

    Args:
        spec: a local folder, which may be read-only; or tars at a URL (``https://host/train-{000..099}.tar``), each of which is
            downloaded once, one at a time, and not kept. Credentials are not stored.
        out: the new folder. A local location is stored relative to it, so both may move together.
        on_progress, key_dot: as of :func:`index_folder`, whose errors are raised.
    """
    out = require_new_folder(out, "the manifest")
    if "://" not in spec:
        manifest = index_folder(spec, on_progress, key_dot)
        location = os.path.relpath(os.path.realpath(spec), os.path.realpath(out))
        manifest = replace(manifest, extra=manifest.extra | {"location": location})
        with atomic_folder(out) as folder:
            manifest.save(folder)
        return manifest, out / MANIFEST_NAME
    location, files = remote_files(spec)
    with atomic_folder(out) as folder:

        def indexed(name: str, url: str) -> Indexed:
            path = folder / name
            fetch(url, MAX_SHARD_BYTES, partial(_store, path))
            found = index_shard(path, key_dot)
            path.unlink()
            return found

        manifest = _manifest_of(starmap(indexed, files), len(files), on_progress, key_dot, {"location": location})
        manifest.save(folder)
    return manifest, out / MANIFEST_NAME


def compressed_tars(folder: str | os.PathLike) -> list[str]:
    """Files of a folder that are shards of other names or compressed, which are not read."""
    names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted(name for name in names if _OTHER_TARS.search(name) and not name.endswith(".tar"))


_OTHER_TARS = re.compile(r"\.(tar|tgz|tbz2|txz|tar\.\w{1,4})$", re.IGNORECASE)
_NAMED = 3


def _manifest_of(
    indexed: Iterable[Indexed],
    total: int,
    on_progress: Callable[[int, int], None] | None,
    key_dot: KeyDot,
    extra: dict[str, Any] | None = None,
) -> Manifest:
    """The manifest of so many shards."""
    entries, sizes, captioned, unusable, unread, such_as = [], [], 0, 0, 0, []
    for done, shard in enumerate(indexed, start=1):
        entries.append(shard.entry)
        sizes.append(shard.sizes)
        captioned += shard.captioned
        unusable += shard.unusable
        for images in shard.unread:
            unread += len(images.names)
            such_as = (such_as + [f"{shard.entry.name}: {name} ({images.what})" for name in images.shown])[:_NAMED]
        if on_progress is not None:
            on_progress(done, total)
    counts: dict[str, Any] = {"captioned": captioned, "unusable": unusable}
    counts |= {"unread_images": unread, "unread_such_as": such_as} if unread else {}
    counts |= {"key_dot": key_dot} if key_dot != "first" else {}
    return Manifest(IMAGE_SHARDS, tuple(entries), {"source": "index"} | (extra or {}) | counts, np.concatenate(sizes))


def _store(path: Path, chunks: Iterator[bytes]) -> None:
    with open(path, "wb") as file:
        file.writelines(chunks)


def index_shard(path: Path, key_dot: KeyDot = "first") -> Indexed:
    """What one tar holds. Raises as :func:`index_folder` does."""
    with ShardReader(path, key_dot=key_dot) as reader:
        if reader.damage:
            raise LdmError(f"{path} {reader.damage} after {len(reader)} samples; restore it")
        captioned = images = 0
        for index in range(len(reader)):
            try:
                files = reader.spans(index)
            except DecodeError:
                continue
            if "safetensors" in files:
                raise UsageError(f"{path} holds latents, not images; run `ldm latents export` again for their manifest")
            if not files.keys().isdisjoint(IMAGE_EXTENSIONS):
                images += 1
                captioned += _has_caption(reader, index)  # a caption without an image is none of a sample
        unread = tuple(unread_images(path, key_dot))
        if not images:
            told = f", and {unread[0]}; {unread[0].fix}" if unread else ""
            raise LdmError(f"{path} holds no image; each sample needs one of .{', .'.join(IMAGE_EXTENSIONS)}{told}")
        entry = ShardEntry(path.name, len(reader), path.stat().st_size, sha256_file(path))
        return Indexed(entry, sizes_of(reader), captioned, len(reader) - images, unread)


def _has_caption(reader: ShardReader, index: int) -> bool:
    try:
        return bool(reader.text(index).captions)
    except DecodeError:
        return False


def check_folder(
    folder: str | os.PathLike, deep: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> tuple[list[Problem], list[Checked]]:
    """Compare a shard folder with its manifest: the problems of the folder, and the result for every shard.

    Names, sizes, hashes and counts, wherever the manifest says that the shards are: remote ones are downloaded to the cache.
    For image shards also that every image is in a sample, for latents that each chunk has the tensors that the manifest
    promises. ``deep``: also decode every sample; for latents, require every value to be finite. The folder is sound where
    neither holds a problem. ``folder`` may be a pattern or URL, as in training. ``on_progress(samples_done, samples)``.
    Raises as :func:`open_source` does, and :class:`UsageError` for latents of another schema.
    """
    source = open_source(folder)
    manifest = source.manifest
    info = latent_info(source) if manifest.format == LATENT_SHARDS else None
    cheap, sizes = source.cheap_problems(), None
    if info is not None:
        cheap += _null_text_problems(source, info)
    elif "sizes" in manifest.extra:
        try:
            sizes = image_sizes(source)
        except LdmError as error:
            cheap.append(_problem_of(SIZES_NAME, source, error))
    checked, done = [], 0
    for number, entry in enumerate(manifest.shards):
        problems = tuple(problem for problem in cheap if problem.where == entry.name)
        if problems:
            checked.append(Checked(entry, 0, problems))
        else:
            problems = tuple(_problems_at(source, number, info, deep, None if sizes is None else sizes[done:][: entry.samples]))
            bad = sum(problem.samples for problem in problems)
            checked.append(Checked(entry, max(entry.samples - bad, 0), problems))
        done += entry.samples
        if on_progress is not None:
            on_progress(done, manifest.samples)
    listed = {entry.name for entry in manifest.shards}
    return [problem for problem in cheap if problem.where not in listed], checked


def _problems_at(
    source: ShardSource, number: int, info: LatentInfo | None, deep: bool, sizes: np.ndarray | None
) -> Iterator[Problem]:
    """Problems of a shard that has the right size, or cannot be fetched or read."""
    entry = source.manifest.shards[number]
    try:
        yield from _problems(source.path(number), entry, source.manifest, info, deep, sizes)
    except LdmError as error:
        yield Problem(entry.name, f"cannot be read ({error})", "restore it", entry.samples)


def _problems(
    path: Path, entry: ShardEntry, manifest: Manifest, info: LatentInfo | None, deep: bool, sizes: np.ndarray | None
) -> Iterator[Problem]:
    """Problems of a shard that exists and has the right size; ``info``: for latents; ``sizes``: of its images, (N, 2)."""
    intact = sha256_file(path) == entry.sha256
    if not intact:
        yield Problem(entry.name, "has other bytes than the manifest's sha256", "restore it")
    for unread in unread_images(path, manifest.key_dot) if info is None else ():
        yield Problem(entry.name, str(unread), unread.fix)
    with ShardReader(path, EXTENSIONS if info is None else ("json",), manifest.key_dot) as reader:
        if reader.damage:
            # latents are not read from a damaged shard at all
            yield Problem(entry.name, reader.damage, "restore it", 0 if info is None else entry.samples)
        try:
            # a latent shard's tar samples are chunks, each with a list of the keys in it
            words = () if info is None else (parse_json(chunk.files["json"], "", Metadata) for chunk in reader)
            held = len(reader) if info is None else sum(len(chunk["keys"]) for chunk in words)
        except (KeyError, LdmError):
            yield Problem(entry.name, "has a chunk without its list of keys", "restore it", entry.samples)
            return
        if held != entry.samples:
            what = f"holds {held} samples, the manifest says {entry.samples}"
            yield Problem(entry.name, what, "restore it", max(entry.samples - held, 0))
        if deep and intact and sizes is not None and not np.array_equal(sizes_of(reader), sizes):
            yield Problem(entry.name, f"holds images of other sizes than {SIZES_NAME} says", "run `ldm shards index` again")
        again = "restore the shard, or remove the sample and run `ldm shards index` again"
        for index in range(min(held, entry.samples)) if info is None else ():
            try:
                check_sample(reader, index, bool(manifest.captioned), deep)
            except DecodeError as error:
                yield Problem(f"{entry.name}: {reader.key(index)}", str(error), again, 1)
        if info is not None and not reader.damage:
            yield from _latent_problems(path, held, info, deep, info.shard_shapes.get(entry.name))


def _latent_problems(
    path: Path, samples: int, info: LatentInfo, deep: bool, runs: Sequence[tuple[int, int]] | None
) -> Iterator[Problem]:
    """Problems of the chunks of a complete shard, which has so many samples by its lists of keys, and by the manifest these
    ``runs`` of shapes."""
    try:
        shard = LatentShard(path, samples)
    except DecodeError as error:
        yield Problem(f"{path.name}: a sample", str(error), EXPORT_AGAIN, samples)
        return
    except LdmError as error:
        yield Problem(path.name, f"cannot be read ({error})", EXPORT_AGAIN, samples)
        return
    told = None if runs is None else [place for place, count in runs for _ in range(count)]
    for chunk, (start, end) in enumerate(pairwise(shard.starts)):
        try:
            keys, tensors = shard.metadata(chunk)["keys"], shard.tensors(chunk)
            _check_chunk(tensors, info)
            shape = info.latent_shapes.index(tensors["mean"].shape[1:])
            if told is not None and set(told[start:end]) - {shape}:
                raise DecodeError("is in a chunk of another size than the manifest says")
        except DecodeError as error:
            yield Problem(f"{path.name}: #{start}", str(error), EXPORT_AGAIN, end - start)
            continue
        for row in _not_finite(tensors) if deep else ():
            yield Problem(f"{path.name}: {keys[row]}", "has values that are not finite", EXPORT_AGAIN, 1)
    shard.close()


def _check_chunk(tensors: dict[str, StoredTensor], info: LatentInfo) -> None:
    """Raise :class:`DecodeError` unless a chunk, sound by itself, has just the tensors that the manifest promises."""
    names = ("mean",) if info.posterior == "mode" else ("mean", "std")
    latents = [f"{name}{end}" for name in names for end in (("", "_flip") if info.flips else ("",))]
    texts = {text_name(number): encoder.width for number, encoder in enumerate(info.text_encoders)}
    dtypes = dict.fromkeys([*latents, *texts], np.dtype(info.dtype))
    names = ["original_size", "crop"] + ["caption_name"] * bool(info.caption_names)
    dtypes |= dict.fromkeys(names, np.dtype(np.int32))
    dtypes |= dict.fromkeys(["caption_start", *(f"{text}_start" for text in texts)], np.dtype(np.int64))
    if missing := sorted(dtypes.keys() - tensors.keys()):
        raise DecodeError(f"is in a chunk without {', '.join(missing)}, which the manifest promises")
    if unknown := sorted(tensors.keys() - dtypes.keys()):
        raise DecodeError(f"is in a chunk with {', '.join(unknown)}, which the manifest does not have")
    for name, dtype in dtypes.items():
        if tensors[name].dtype != dtype:
            raise DecodeError(f"is in a chunk with {name} in {tensors[name].dtype}, the manifest says {dtype}")
    if (shape := tensors["mean"].shape[1:]) not in info.latent_shapes:
        told = " or ".join(map(_by, info.latent_shapes))
        raise DecodeError(f"is in a chunk with latents of {_by(shape)}, the manifest says {told}")
    if info.caption_names and not np.isin(tensors["caption_name"][:], range(len(info.caption_names))).all():
        raise DecodeError("is in a chunk with captions of other names than the manifest says")
    for name, width in texts.items():
        if (found := tensors[name].shape[1:]) != (width,):
            raise DecodeError(f"is in a chunk with {name} of width {_by(found)}, the manifest says {width}")


def _not_finite(tensors: dict[str, StoredTensor]) -> list[int]:
    """The rows of a chunk that have a value in a latent, or in the embedding of a caption, that is not finite."""
    bad = np.zeros(len(tensors["mean"]), bool)
    for name, values in tensors.items():
        if name.startswith(("mean", "std")):
            bad |= ~np.isfinite(values).all((1, 2, 3))
        elif name.startswith("text") and not name.endswith("_start"):
            tokens = np.flatnonzero(~np.isfinite(values).all(1))
            captions = np.searchsorted(tensors[f"{name}_start"], tokens, side="right") - 1
            bad[np.searchsorted(tensors["caption_start"], captions, side="right") - 1] = True
    return np.flatnonzero(bad).tolist()


def _null_text_problems(source: ShardSource, info: LatentInfo) -> Iterator[Problem]:
    """Problems of the encoded empty caption, the null condition, which every text encoder needs."""
    for number in range(len(info.text_encoders)):
        try:
            read_null_text(source, number)
        except LdmError as error:
            yield _problem_of(NULL_TEXT_NAME, source, error)
            return


def _problem_of(name: str, source: ShardSource, error: LdmError) -> Problem:
    """What was wrong with a file beside the manifest."""
    what, _, fix = str(error).removeprefix(f"{name} of {source.spec} ").rpartition("; ")
    return Problem(name, what, fix)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def check_sample(reader: ShardReader, index: int, captioned: bool, deep: bool = True) -> None:
    """Look for what training needs of a sample; ``deep``: also decode it. Raises :class:`DecodeError` where that fails."""
    if reader.spans(index).keys().isdisjoint(IMAGE_EXTENSIONS):
        raise DecodeError("has no image")
    if deep:
        sample = reader[index]
        if not sample.captions and captioned:
            raise DecodeError("has no caption")
        decode_pixels(sample.image or b"")
