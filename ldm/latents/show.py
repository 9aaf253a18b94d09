"""An HTML page about latent shards: the manifest, decoded images, statistics of the channels, captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.data.decode import DecodeError
from ldm.data.latent_dataset import LatentDataset
from ldm.data.latent_schema import LatentInfo, latent_info, text_name
from ldm.data.manifest import LATENT_SHARDS
from ldm.data.sources import ShardSource, open_source
from ldm.errors import LdmError, UsageError
from ldm.files import require_output_file
from ldm.latents.image_encoder import load_matching
from ldm.latents.samples import SourceImages, StoredLatent, decode_mean, sample_latents
from ldm.models.autoencoder import images_to_pil
from ldm.models.autoencoder_kinds import Autoencoder
from ldm.reporting.grids import captioned_grid, paired_grid
from ldm.reporting.pages import Report
from ldm.reporting.sizes import add_buckets, add_sizes, marked_crop, worst

# images in a row, which with its label is as wide as the page; their side in pixels; images in all
COLUMNS, CELL = 7, 96
SHOWN = 2 * COLUMNS
# latents of more channels get one image of all channels, and curves instead of a table
FEW_CHANNELS = 16
# vectors sampled from each latent: enough for statistics, and memory does not grow with the size of the images
VECTORS_PER_LATENT = 1024
# counted by an export with buckets
COUNTED = {
    "of these too small for every bucket": "too_small",
    "of these cropped too much in every bucket": "too_long",
    "images enlarged": "enlarged",
}
BINS, REACH = 48, 4.0  # of histograms, from -REACH to REACH standard deviations
TOKEN_BINS = 60


@torch.inference_mode()
def show(
    folder: str | Path,
    out: str | Path,
    autoencoder_path: str | Path | None = None,
    shards: str | Path | None = None,
    samples: int = 256,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a self-contained page about a set of latents.

    Shapes and captions' lengths are counted over the whole set; the statistics of values are those of a sample.

    Args:
        folder: of latent shards.
        out: the page to write, an ``.html`` file.
        autoencoder_path: the autoencoder that encoded the latents, to decode some of them; None: nothing is decoded.
        shards: the image shards they were encoded from; None: where they were at the export, if they are still there.
        samples: latents to sample, evenly spaced over the set.
        on_progress: called with (latents done, latents).

    Raises:
        UsageError: for another autoencoder or other image shards than were exported with.
        LdmError: for a broken shard.
    """
    if samples < 1:
        raise UsageError(f"samples is {samples}; give 1 or more")
    if Path(out).is_dir():
        raise UsageError(f"{out} is a folder; give a file, for example {Path(out) / 'report.html'}")
    require_output_file(out, [folder, autoencoder_path, shards])
    source = open_source(folder, LATENT_SHARDS)
    info = latent_info(source)
    counts = Counts.of(source, info)
    autoencoder = images = None
    if autoencoder_path is not None:
        autoencoder = load_matching(autoencoder_path, source, device)
        images = SourceImages.open(source, autoencoder, shards)
    total = min(samples, source.manifest.samples)
    at = {(2 * n + 1) * total // (2 * min(SHOWN, total)) for n in range(min(SHOWN, total))}
    shown, vectors = [], Vectors(info.latents_mean, info.latents_std)
    for number, stored in enumerate(sample_latents(source, samples)):
        vectors.add(stored)
        shown += [stored] if number in at else []
        if on_progress is not None:
            on_progress(number + 1, total)
    space = Space.of(vectors)
    report = Report("Latents", source.spec)
    _overview(report, source, info, counts)
    _sizes(report, source, info, counts, images)
    _images(report, info, space, shown, autoencoder, images)
    _channels(report, space, shown)
    _statistics(report, info, space)
    _captions(report, info, counts, shown)
    report.save(out)


@dataclass(frozen=True)
class Counts:
    """Counts over the whole set.

    Attributes:
        shapes: images by (C, h, w), the most frequent first.
        lengths: for each text encoder, captions by number of tokens.
        which: the place in ``shapes`` of each image's, (N,).
        original_sizes, crops: as in the schema of latents, (N, 2) and (N, 4).
    """

    shapes: dict[tuple[int, ...], int]
    lengths: list[np.ndarray]
    which: np.ndarray
    original_sizes: np.ndarray
    crops: np.ndarray

    @classmethod
    def of(cls, source: ShardSource, info: LatentInfo) -> Counts:
        shapes: Counter[tuple[int, ...]] = Counter()
        lengths: list[Counter[int]] = [Counter() for _ in info.text_encoders]
        of_chunks, sizes, crops = [], [], []
        try:
            for tensors in LatentDataset(source).chunked():
                of_chunks.append((tensors["mean"].shape[1:], len(tensors["mean"])))
                shapes[of_chunks[-1][0]] += of_chunks[-1][1]
                sizes.append(tensors["original_size"][:])
                crops.append(tensors["crop"][:])
                for number, counter in enumerate(lengths):
                    counter.update(np.diff(tensors[f"{text_name(number)}_start"]).tolist())
        except (DecodeError, KeyError) as error:
            raise LdmError(f"{source.spec}: a sample {error}; `ldm latents check {source.spec}` names it") from None
        places = {shape: place for place, (shape, _) in enumerate(shapes.most_common())}
        return cls(
            dict(shapes.most_common()),
            [np.array([counter[length] for length in range(max(counter, default=0) + 1)]) for counter in lengths],
            np.repeat([places[shape] for shape, _ in of_chunks], [count for _, count in of_chunks]),
            np.concatenate(sizes),
            np.concatenate(crops),
        )

    @property
    def cropped(self) -> np.ndarray:
        """The share of each image's area that was cropped off, (N,): crops are in the centre, but for those by less than the
        autoencoder's factor."""
        top, left, height, width = self.crops.astype(np.float64).T
        return 1 - height * width / ((2 * top + height) * (2 * left + width))


class Vectors:
    """Vectors of C channels, sampled from latents."""

    def __init__(self, mean: Sequence[float] | np.ndarray, std: Sequence[float] | np.ndarray):
        """``mean``, ``std``: per channel over the whole set, (C,)."""
        self.center, deviations = np.array(mean, np.float32), np.array(std, np.float32)
        self.scale = np.where(deviations > 0, deviations, 1)  # constant channels
        self._random = np.random.default_rng(0)
        self._means: list[np.ndarray] = []
        self._stds: list[np.ndarray] = []

    def add(self, stored: StoredLatent) -> None:
        channels = len(self.center)
        mean = stored.latents["mean"].reshape(channels, -1).T  # (h·w, C)
        places = np.linspace(0, len(mean) - 1, min(len(mean), VECTORS_PER_LATENT)).astype(int)
        self._means.append(mean[places])
        if "std" in stored.latents:
            self._stds.append(stored.latents["std"].reshape(channels, -1).T[places])

    @property
    def means(self) -> np.ndarray:
        """Posterior means, not normalised, (P, C)."""
        return np.concatenate(self._means)

    @property
    def stds(self) -> np.ndarray | None:
        """Posterior standard deviations (P, C); None where modes are stored."""
        return np.concatenate(self._stds) if self._stds else None

    def sample(self) -> np.ndarray:
        """Latents sampled from the posteriors and normalised, as in training, (P, C)."""
        values, stds = self.means, self.stds
        if stds is not None:
            values += stds * self._random.standard_normal(values.shape, np.float32)
        return (values - self.center) / self.scale


@dataclass(frozen=True)
class Space:
    """The sampled vectors and their principal axes.

    Attributes:
        vectors: the sample.
        axes: (C, k), the first k = min(3, C) principal axes of the normalised means, as columns.
        deviations: (k,), standard deviations along the axes.
        shares: (k,), shares of the total variance.
    """

    vectors: Vectors
    axes: np.ndarray
    deviations: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, vectors: Vectors) -> Space:
        values = (vectors.means - vectors.center) / vectors.scale
        covariance = np.cov(values, rowvar=False, bias=True).reshape(values.shape[1], -1)
        variances, axes = np.linalg.eigh(covariance.astype(np.float64))
        variances, axes = np.maximum(variances[::-1][:3], 0), axes[:, ::-1][:, :3]
        # eigh leaves the sign of an axis open
        axes = axes * np.where(axes.sum(0) < 0, -1, 1)
        return cls(vectors, axes, np.sqrt(variances), variances / max(np.trace(covariance), 1e-300))

    def normalise(self, latent: np.ndarray) -> np.ndarray:
        """A stored mean (C, h, w), normalised."""
        return (latent - self.vectors.center[:, None, None]) / self.vectors.scale[:, None, None]

    def colours(self, latent: np.ndarray) -> Image.Image:
        """A stored mean (C, h, w) with its principal components as red, green and blue; grey for a single channel."""
        components = self.normalise(latent).transpose(1, 2, 0) @ self.axes  # (h, w, k)
        components = components / np.where(self.deviations > 0, self.deviations, 1)
        if components.shape[2] == 1:
            return _grey(components[..., 0])
        rgb = np.zeros((*components.shape[:2], 3))
        rgb[..., : components.shape[2]] = components
        return Image.fromarray(_bytes(rgb))


def _bytes(values: np.ndarray) -> np.ndarray:
    """−2.5 to 2.5 standard deviations as 0 to 255."""
    return np.clip(np.nan_to_num(values) * (127.5 / 2.5) + 127.5, 0, 255).round().astype(np.uint8)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(_bytes(values))


def _by(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))


def _overview(report: Report, source: ShardSource, info: LatentInfo, counts: Counts) -> None:
    manifest = source.manifest
    report.metrics(
        {
            "images": manifest.samples,
            "channels × height × width" + " (most frequent)" * (len(counts.shapes) > 1): _by(next(iter(counts.shapes))),
            "MB in total": manifest.bytes / 1e6,
            "KB per image": manifest.bytes / 1e3 / manifest.samples,
        }
    )
    rows = [
        ("shards", f"{len(manifest.shards):,}"),
        ("autoencoder", info.autoencoder[:12]),
        ("image shards", f"{info.source[:12]}, exported from {info.source_shards or 'an unknown folder'}"),
        ("images skipped", str(manifest.extra.get("quarantined", "unknown"))),
        *((name, str(manifest.extra[entry])) for name, entry in COUNTED.items() if entry in manifest.extra),
        ("resolution", _resolution(info, counts)),
        ("posterior", "mean and standard deviation" if info.posterior == "gaussian" else "mode only"),
        ("mirrored images", "encoded too" if info.flips else "not encoded"),
        ("captions", "all of each image" if info.captions == "all" else "the first of each image"),
        ("dtype", info.dtype),
        ("precision", info.precision),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.versions.items()) or "unknown"),
    ]
    report.table("Manifest", ("entry", "value"), rows)
    if info.text_encoders:
        rows = [(text.name, text.hash[:12], text.width, text.max_tokens, text.cut) for text in info.text_encoders]
        report.table("Text encoders", ("name", "hash", "width", "token limit", "captions truncated"), rows)


def _resolution(info: LatentInfo, counts: Counts) -> str:
    if info.buckets is None:
        return f"{info.resolution} pixels" if info.resolution else "that of each image"
    how, bases = info.buckets, " and ".join(map(str, info.buckets.bases))
    return (
        f"{len(counts.shapes)} of {len(how.table)} buckets of {bases} pixels, in steps of {how.step}, to {how.max_aspect:g}:1, "
        f"enlarged up to {how.max_upscale:g} times" + ("" if how.max_crop is None else f", cropped up to {how.max_crop:.0%}")
    )


def _sizes(report: Report, source: ShardSource, info: LatentInfo, counts: Counts, images: SourceImages | None) -> None:
    """The sizes of the images, what was cropped off, and the images that lost most."""
    cropped = counts.cropped
    add_sizes(report, counts.original_sizes)
    if len(counts.shapes) > 1 or cropped.any():
        add_buckets(
            report,
            "Sizes" if info.buckets is None else "Buckets",
            [_by(shape) for shape in counts.shapes],
            counts.which,
            cropped,
        )
    if images is None or not (rows := worst(cropped, SHOWN)):
        return
    dataset, marked, names = LatentDataset(source), [], []
    for row in rows:
        shard, key = dataset.name_of(row)
        try:
            image = images.whole(Path(shard).name, key)
        except DecodeError:
            continue
        if image is not None:
            marked.append(marked_crop(image, counts.crops[row].tolist()))
            names.append(f"{key}: {cropped[row]:.0%}")
    if marked:
        note = "The images of which most was cropped off; the frame is what was encoded."
        report.image("Largest crops", captioned_grid(marked, names, columns=COLUMNS, cell=CELL), note)


def _images(
    report: Report,
    info: LatentInfo,
    space: Space,
    shown: Sequence[StoredLatent],
    autoencoder: Autoencoder | None,
    images: SourceImages | None,
) -> None:
    """The original images, the decoded latents, and the principal components of the latents, one above the other."""
    shares = ", ".join(f"{share:.0%}" for share in space.shares)
    note = (
        f"Components: the first {len(space.shares)} principal components of the latents ({shares} of the variance) as red, "
        "green and blue, from −2.5 to 2.5 standard deviations. "
    )
    if len(space.shares) == 1:
        note = "Components: the one channel in grey, from −2.5 to 2.5 standard deviations. "
    if autoencoder is None:
        note += "Give the autoencoder to decode the latents and to compare them with the images."
    elif images is None:
        note += f"The image shards ({info.source_shards or 'unknown'}) are not available; give them to compare with the images."
    rows = []
    for start in range(0, len(shown), COLUMNS):
        few = shown[start : start + COLUMNS]
        components = [space.colours(stored.latents["mean"]) for stored in few]
        if autoencoder is not None:
            decoded = {
                end: [images_to_pil(decode_mean(autoencoder, one.latents[f"mean{end}"]).nan_to_num())[0] for one in few]
                for end in ("", "_flip")
                if f"mean{end}" in few[0].latents
            }
            if images is not None:
                rows.append(("image", [_image(images, *pair) for pair in zip(few, decoded[""], strict=True)]))
            rows.append(("decoded", decoded[""]))
            if "_flip" in decoded:
                rows.append(("decoded, mirrored", decoded["_flip"]))
            sizes = [image.size for image in decoded[""]]
            components = [image.resize(size, Image.Resampling.NEAREST) for image, size in zip(components, sizes, strict=True)]
        rows.append(("components", components))
    report.image("Images and their latents", paired_grid(rows, CELL), note)


def _image(images: SourceImages, stored: StoredLatent, decoded: Image.Image) -> Image.Image:
    """The image of a latent; a white one of the same size where it is missing or broken."""
    try:
        image = images.image(stored)
    except DecodeError:
        image = None
    return Image.new("L", decoded.size, 255) if image is None else images_to_pil(image)[0]


def _channels(report: Report, space: Space, shown: Sequence[StoredLatent]) -> None:
    channels = len(space.vectors.center)
    note = "Normalised; black is −2.5 standard deviations, white 2.5."
    if channels <= FEW_CHANNELS:
        few = [space.normalise(stored.latents["mean"]) for stored in shown[:COLUMNS]]
        rows = [("components", [space.colours(stored.latents["mean"]) for stored in shown[:COLUMNS]])] if channels > 1 else []
        rows += [(f"channel {channel}", [_grey(latent[channel]) for latent in few]) for channel in range(channels)]
        report.image("Channels", paired_grid(rows, CELL), note)
        return
    latent = space.normalise(shown[0].latents["mean"])
    grid = captioned_grid([_grey(channel) for channel in latent], [str(n) for n in range(channels)], columns=16, cell=46)
    report.image("Channels", grid, f"Of {shown[0].key}. {note}")


def _statistics(report: Report, info: LatentInfo, space: Space) -> None:
    means, stds, values = space.vectors.means, space.vectors.stds, space.vectors.sample()
    channels = range(means.shape[1])
    spread = None if stds is None else np.sqrt((stds.astype(np.float64) ** 2).mean(0))  # (C,)
    if len(channels) <= FEW_CHANNELS:
        head = ["channel", "mean", "standard deviation", "minimum (sampled)", "maximum (sampled)"]
        rows = [
            [str(n), info.latents_mean[n], info.latents_std[n], float(means[:, n].min()), float(means[:, n].max())]
            for n in channels
        ]
        if spread is not None:
            head.append("posterior's standard deviation")
            rows = [[*row, float(spread[n])] for n, row in enumerate(rows)]
        report.table("Statistics per channel", head, rows)
    else:
        series = {"mean": (channels, info.latents_mean), "standard deviation": (channels, info.latents_std)}
        if spread is not None:
            series["posterior's standard deviation"] = (channels, spread)
        report.curve("Statistics per channel", series, "channel", "value")
    edges = np.linspace(-REACH, REACH, BINS + 1)
    panels = {}
    for n in channels:
        # + 0: never "-0.00"
        name = f"channel {n}: {round(float(values[:, n].mean()), 2) + 0:.2f} ± {values[:, n].std():.2f}"
        panels[name] = np.histogram(values[:, n], edges)[0] / len(values) * BINS / (2 * REACH)
    x = np.linspace(-REACH, REACH, 81)
    beyond = float((np.abs(values) > REACH).mean())
    note = (
        f"{'Sampled from the posteriors and normalised' if stds is not None else 'Normalised'}, as in training, with mean and "
        f"standard deviation, of {len(values):,} vectors; {beyond:.2%} of the values are beyond ±{REACH:g}. The line is the "
        "standard normal distribution."
    )
    report.bars("Values per channel", panels, -REACH, REACH, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), note)


def _captions(report: Report, info: LatentInfo, counts: Counts, shown: Sequence[StoredLatent]) -> None:
    longest = max((len(lengths) - 1 for lengths in counts.lengths), default=0)
    width = max(-(-longest // TOKEN_BINS), 1)
    bins = max(-(-longest // width), 20)  # a shorter axis would have no marks at whole numbers
    panels = {}
    for text, lengths in zip(info.text_encoders, counts.lengths, strict=True):
        tokens = np.arange(len(lengths))
        padded = np.zeros(bins * width + 1)
        padded[: len(lengths)] = lengths
        average = (lengths * tokens).sum() / max(lengths.sum(), 1)
        name = (
            f"{text.name}: {lengths.sum():,} captions, {average:.1f} tokens on average, most often {lengths.argmax()}, at most "
            f"{len(lengths) - 1}; {text.cut:,} truncated to {text.max_tokens}"
        )
        panels[name] = padded[1:].reshape(bins, width).sum(1)
    if panels:
        report.bars("Tokens per caption", panels, 0.5, bins * width + 0.5)
    rows = [(stored.key, " | ".join(stored.captions)) for stored in shown[:COLUMNS]]
    report.table("Captions of the first images above", ("key", "captions"), rows)
