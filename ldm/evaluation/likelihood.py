"""How likely images of shards are under a pipeline, and which of them seem to have a wrong caption.

Of each image, all in nats:

- **latent**: ln p of its latents, one sample of the autoencoder's posterior as in training, by the probability-flow ODE.
- **image**: a lower bound of ln P of its 8-bit pixels through the autoencoder, E_q[ln p(x | z) + ln p(z) − ln q(z | x)] (Kingma
  & Welling 2014, arXiv 1312.6114). The decoder's distribution is normal with one variance for all pixels, the most likely one
  for the images measured (Rybkin et al. 2021, arXiv 2006.13202), and pixels are spread evenly over their 1/255 (Theis et al.
  2016, arXiv 1511.01844); it stays a bound.
- **ddpm**: DDPM's variational bound of ln p of the same latents, for variance-preserving models.
- **captions**: the bound −½∫‖ε̂ − ε‖² d ln SNR (Kingma et al. 2021, arXiv 2107.00630) under its own caption and under others,
  with the same noise for all (Li et al. 2023, arXiv 2303.16203): the empty one, which stands for every caption where the model
  was trained with caption dropout, and some of other images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data.manifest import IMAGE_SHARDS
from ldm.data.quarantine import BadSample, Quarantine
from ldm.data.sources import ShardSource, open_source
from ldm.diffusion.conditioning import Condition, denoise, encode_condition, micro_conditions, takes_sizes
from ldm.diffusion.likelihood import (
    SOLVERS,
    FlowLikelihood,
    check_solver,
    ddpm_bound,
    evidence_levels,
    rademacher,
    squared_error,
    time_range,
)
from ldm.diffusion.path import VariancePreserving
from ldm.diffusion.sampler import Denoiser
from ldm.errors import LdmError, UsageError
from ldm.evaluation.image_sets import ALONE, Count, FixedSizes, shared_work
from ldm.latents.compute import Process
from ldm.latents.images import CaptionedImages
from ldm.models.autoencoder import LatentNormalizer, decode, encode, has_posterior, in_float32, pixels_to_images
from ldm.models.pixels import PixelAutoencoder
from ldm.pipeline import LatentDiffusionPipeline

MEASURES = ("latent", "image", "ddpm", "captions")
BIN = 2 / 255  # between neighbouring values of a pixel, in [−1, 1]
# between which the noise hides what a caption tells, neither nothing nor all of it
LOW, HIGH = -6.0, 4.0
CAPTIONS = ("own caption", "empty caption", "other captions")
CHECKED = 8  # images that are measured again, with more steps
GUESS = 100  # evaluations of dopri5, before there has been any


@dataclass(frozen=True)
class LikelihoodSettings:
    """How likelihoods are measured.

    Attributes:
        measures: which of :data:`MEASURES`.
        count: the first so many images.
        seed: of latents, probes and noise; image n has a generator of ``seed + n``.
        solver, tolerance, steps: of :class:`ldm.diffusion.likelihood.FlowLikelihood`.
        probes: of Hutchinson's estimate, for each image.
        ddpm_steps: terms of DDPM's sum that are evaluated.
        levels: of noise, at which captions are compared.
        others: captions of other images, with which an image's own is compared, beside the empty one.
        batch_size: images at once.
    """

    measures: tuple[str, ...] = MEASURES
    count: int = 256
    seed: int = 0
    solver: str = "dopri5"
    tolerance: float = 1e-4
    steps: int = 50
    probes: int = 1
    ddpm_steps: int = 50
    levels: int = 8
    others: int = 3
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be."""
        for name in ("count", "probes", "ddpm_steps", "levels", "others", "batch_size"):
            if not 1 <= (value := getattr(self, name)) <= 10**7:
                raise UsageError(f"{name.replace('_', ' ')} is {value}; give 1 to {10**7:,}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"the seed is {self.seed}; give 0 to {2**32 - 1}")
        if unknown := [name for name in self.measures if name not in MEASURES]:
            raise UsageError(f"{unknown[0]!r} cannot be measured; choose from: {', '.join(MEASURES)}")
        if "image" in self.measures and "latent" not in self.measures:
            raise UsageError("image is computed from latent; measure both")
        check_solver(self.solver, self.tolerance, self.steps)

    def forward_passes(self) -> float:
        """Of the denoiser for an image, where a backward pass counts as two of them; of dopri5 as many as it often takes."""
        fixed = SOLVERS[self.solver]
        flow = (GUESS if fixed is None else fixed * self.steps) * (1 + 2 * self.probes)
        costs = {"latent": flow, "image": 0, "ddpm": self.ddpm_steps + 1, "captions": self.levels * (2 + self.others)}
        return sum(costs[name] for name in self.measures)


@dataclass(frozen=True)
class ImageLikelihood:
    """Of one image, in nats; None of what was not measured.

    Attributes:
        number: of the image in the shards.
        values: C·h·w of its latents, and 3·H·W of its pixels.
        latent, error: ln p of its normalised latents, and the standard error by its probes.
        density: ln p of its latents as the decoder takes them, less ln q of their posterior.
        squares: Σ(x − x̂)² over the pixels, with the variance of their spread; 0 where the latents are pixels.
        ddpm: the bound of ln p of its normalised latents.
        own, others: the bound under its caption and under other captions, less what they have in common.
        compared: those captions, the empty one first.
    """

    number: int
    key: str
    caption: str
    values: tuple[int, int]
    latent: float | None = None
    error: float | None = None
    density: float | None = None
    squares: float | None = None
    ddpm: float | None = None
    own: float | None = None
    others: tuple[float, ...] = ()
    compared: tuple[str, ...] = ()

    @property
    def margin(self) -> float:
        """By how many nats the image is likelier under its own caption than under the likeliest of the others."""
        assert self.own is not None
        return self.own - max(self.others)


class Measured(NamedTuple):
    """Images of one size that were measured together.

    Attributes:
        noise_errors: (levels, :data:`CAPTIONS`), sums over the images; None where captions were not compared.
        evaluations, solver_error: as in :class:`Likelihoods`; None where they were not measured.
    """

    images: list[ImageLikelihood]
    noise_errors: Tensor | None = None
    evaluations: int | None = None
    solver_error: float | None = None


@dataclass(frozen=True)
class Likelihoods:
    """The images of a set, and how they were measured.

    Attributes:
        solver_error: by how many bits per dimension a stricter solver differs, at most over a few images; None where no ODE was
            solved.
        evaluations: of the denoiser for the ODE of a batch, on average.
        errors: ‖ε̂ − ε‖² per dimension by ln SNR, the highest first: under the own, the empty and other captions.
    """

    images: list[ImageLikelihood]
    settings: LikelihoodSettings
    solver_error: float | None
    evaluations: float | None
    errors: dict[float, tuple[float, ...]]

    @property
    def checked(self) -> int:
        """Images over which ``solver_error`` is the largest."""
        return min(CHECKED, self.settings.batch_size, len(self.images))

    @property
    def decoder_std(self) -> float | None:
        """Standard deviation of the decoder's distribution, in [−1, 1]; None where there is none."""
        known = [(one.squares, one.values[1]) for one in self.images if one.squares]
        return math.sqrt(sum(squares for squares, _ in known) / sum(values for _, values in known)) if known else None

    def bits(self, image: ImageLikelihood, measure: str) -> float:
        """Bits per dimension of an image: of its latents, or for ``image`` of its pixels."""
        latents, pixels = image.values
        nats, dimensions = (self.image_nats(image), pixels) if measure == "image" else (getattr(image, measure), latents)
        return -nats / (dimensions * math.log(2))

    def image_nats(self, image: ImageLikelihood) -> float:
        """The lower bound of ln P of its pixels."""
        assert image.density is not None and image.squares is not None
        pixels = image.values[1]
        if not image.squares:
            return image.density
        variance = (self.decoder_std or 1.0) ** 2
        density = -pixels / 2 * math.log(2 * math.pi * variance) - image.squares / (2 * variance)
        return density + pixels * math.log(BIN) + image.density

    def suspects(self, count: int) -> list[ImageLikelihood]:
        """The images that are likelier under another caption than under their own, the worst first."""
        wrong = [image for image in self.images if image.margin < 0]
        return sorted(wrong, key=lambda image: (image.margin, image.number))[:count]

    def summary(self) -> dict[str, float]:
        """Means over the images with their standard errors, in bits per dimension."""
        found: dict[str, float] = {"images": len(self.images)}
        for measure in self.settings.measures:
            if measure == "captions":
                margins = np.array([image.margin for image in self.images])
                found |= {"caption_margin_nats": float(margins.mean()), "likelier_under_own": float((margins > 0).mean())}
                continue
            bits = np.array([self.bits(image, measure) for image in self.images])
            error = float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else math.nan
            found |= {f"{measure}_bits_per_dim": float(bits.mean()), f"{measure}_standard_error": error}
        errors = [(image.error, image.values[0]) for image in self.images if image.error is not None]
        if errors and self.settings.probes > 1:
            squares = sum((error / (dimensions * math.log(2))) ** 2 for error, dimensions in errors)
            found["probes_standard_error"] = math.sqrt(squares) / len(errors)
        extra = {"solver_error": self.solver_error, "evaluations": self.evaluations, "decoder_std": self.decoder_std}
        return found | {name: value for name, value in extra.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        images = [{name: value for name, value in asdict(image).items() if value is not None} for image in self.images]
        errors = [{"log_snr": level} | dict(zip(CAPTIONS, values, strict=True)) for level, values in self.errors.items()]
        return {"settings": asdict(self.settings), "metrics": self.summary(), "noise_errors": errors, "images": images}


def inapplicable(pipeline: LatentDiffusionPipeline) -> dict[str, str]:
    """The measures that a pipeline does not have, and why."""
    found = {}
    if not (has_posterior(pipeline.vae) or isinstance(pipeline.vae, PixelAutoencoder)):
        found["image"] = f"its {type(pipeline.vae).__name__} gives an image one latent, not a distribution of them"
    if not isinstance(pipeline.diffusion.path, VariancePreserving):
        found["ddpm"] = f"it follows {type(pipeline.diffusion.path).__name__}, not a variance-preserving path of discrete steps"
    if pipeline.is_unconditional:
        found["captions"] = "it is unconditional"
    return found


class LikelihoodEvaluator:
    """Measures the images of shards under a pipeline."""

    def __init__(
        self,
        pipeline: LatentDiffusionPipeline,
        shards: str | ShardSource,
        settings: LikelihoodSettings,
        process: Process = ALONE,
    ):
        """``process``: which of several processes, which share the batches, this is.

        Raises UsageError for a measure that the pipeline does not have, shards without captions where it takes some, or with
        nothing to compare one with."""
        for name, reason in inapplicable(pipeline).items():
            if name in settings.measures:
                raise UsageError(f"{name} cannot be measured of this pipeline: {reason}; leave it out")
        source = open_source(shards, IMAGE_SHARDS) if isinstance(shards, str) else shards
        if not pipeline.is_unconditional and source.manifest.captioned is False:  # not counted by all writers
            raise UsageError(f"{source.spec} has no captions, which the model was trained on; pack them with the images")
        self.pipeline, self.settings, self.source, self.process = pipeline, settings, source, process
        self.normalizer = LatentNormalizer.of(pipeline.vae)
        pipeline.transformer.eval().requires_grad_(False)
        pipeline.vae.requires_grad_(False)
        sizes = FixedSizes(sizes=tuple(pipeline.trained_sizes))
        captions = "none" if pipeline.is_unconditional else "first"
        self.dataset = CaptionedImages(source, None, pipeline.vae_scale_factor, captions, sizes)
        self.flow = FlowLikelihood(*pipeline.diffusion, settings.solver, settings.tolerance, settings.steps)
        self.captions: list[str] = []
        self.is_solver_checked = False
        path, prediction = pipeline.diffusion
        self.levels, self.width = evidence_levels(path, prediction, settings.levels, LOW, HIGH)

    @torch.no_grad()
    def measure(
        self,
        on_progress: Callable[[int, int], None] | None = None,
        on_estimate: Callable[[float], None] | None = None,
    ) -> Likelihoods:
        """
        Args:
            on_progress: called with (images done, images).
            on_estimate: called before the work with how many seconds it will take, by one evaluation of the denoiser.

        Raises:
            LdmError: where too many images cannot be used, or a likelihood is not finite.
        """
        settings, total = self.settings, min(self.settings.count, len(self.dataset))
        if "captions" in settings.measures:
            self.captions = [*dict.fromkeys(text for row in range(total) for text in self.dataset.captions_of(row)[:1])]
            if len(self.captions) < 2:
                raise UsageError(f"{self.source.spec} has one caption for all of its images; there is none to compare it with")
        quarantine = Quarantine(total, adjustable=False)

        def work(rows: Sequence[int]) -> tuple[list[list[BadSample]], list[Measured]]:
            nonlocal on_estimate
            bad, groups = self._of_one_size(rows)
            quarantine.add(bad)
            if groups and on_estimate is not None:
                on_estimate(self._seconds(groups[0]) * total / len(groups[0]) / self.process.world_size)
                on_estimate = None
            return bad, [self._measure(samples) for samples in groups]

        batches = [range(total)[start : start + settings.batch_size] for start in range(0, total, settings.batch_size)]
        found = shared_work(batches, work, self.process, Count(total, self.process, on_progress))
        if self.process.world_size > 1:  # each has counted its own
            Quarantine(total, adjustable=False, quiet=True).add([row for bad, _ in found for row in bad])
        measured = [group for _, groups in found for group in groups]
        images = [image for group in measured for image in group.images]
        if not images:
            raise LdmError(f"{self.source.spec} holds no image that can be used; `ldm shards check --deep` names what is wrong")
        solver_errors = [group.solver_error for group in measured if group.solver_error is not None]
        evaluations = [group.evaluations for group in measured if group.evaluations is not None]
        return Likelihoods(
            sorted(images, key=lambda image: image.number),
            settings,
            solver_errors[0] if solver_errors else None,
            float(np.mean(evaluations)) if evaluations else None,
            self._by_level([group.noise_errors for group in measured if group.noise_errors is not None], images),
        )

    def _by_level(self, errors: Sequence[Tensor], images: Sequence[ImageLikelihood]) -> dict[float, tuple[float, ...]]:
        """``errors`` of :class:`Likelihoods`, by the sums of groups of images."""
        if not errors:
            return {}
        path, dimensions = self.pipeline.diffusion.path, sum(image.values[0] for image in images)
        snr = [float(2 * (path.alpha(t) / path.sigma(t)).log()) for t in self.levels[:, None]]
        return dict(zip(snr, map(tuple, (sum(errors[1:], errors[0]) / dimensions).tolist()), strict=True))

    def _of_one_size(self, rows: Sequence[int]) -> tuple[list[list[BadSample]], list[list[dict[str, Any]]]]:
        """The bad samples of these rows, of each one or none; and the others with their ``number``, those of one size
        together."""
        read = [(row, self.dataset.attempt(row)) for row in rows]
        good: list[dict[str, Any]]
        good = [sample | {"number": row} for row, sample in read if not isinstance(sample, BadSample)]
        good.sort(key=lambda sample: (sample["image"].shape, sample["number"]))
        groups = [[*alike] for _, alike in groupby(good, key=lambda sample: sample["image"].shape)]
        return [[sample] if isinstance(sample, BadSample) else [] for _, sample in read], groups

    def _seconds(self, samples: Sequence[Mapping[str, Any]]) -> float:
        """How long all measures of these images will take, by one evaluation of the denoiser."""
        x0 = self._latents(samples, self._generators(samples))[0]
        denoiser = self._denoiser(samples, [sample["captions"][0] for sample in samples])
        _, end = time_range(*self.pipeline.diffusion)
        t = torch.full((len(x0),), 0.5 * end, device=x0.device)
        network_time = self.pipeline.diffusion.path.network_time(t)
        denoiser(x0, network_time, t)
        began = time.monotonic()
        denoiser(x0, network_time, t).sum().item()
        return (time.monotonic() - began) * self.settings.forward_passes()

    def _measure(self, samples: Sequence[Mapping[str, Any]]) -> Measured:
        generators, measures = self._generators(samples), self.settings.measures
        x0, density, squares = self._latents(samples, generators)
        texts = [sample["captions"][0] for sample in samples]
        found = [
            ImageLikelihood(sample["number"], sample["key"], text, (x0[0].numel(), sample["image"].size))
            for sample, text in zip(samples, texts, strict=True)
        ]
        denoiser, measured = self._denoiser(samples, texts), Measured(found)
        if "latent" in measures:
            measured = self._flow(found, samples, denoiser, x0, rademacher(x0.shape, generators, self.settings.probes))
        if "image" in measures:
            shift = float(self.normalizer.std.double().log().sum()) * x0[0, 0].numel()
            found = [
                replace(one, density=(one.latent or 0.0) - shift + more, squares=square)
                for one, more, square in zip(measured.images, density.tolist(), squares.tolist(), strict=True)
            ]
            measured = measured._replace(images=found)
        if "ddpm" in measures:
            path, prediction = self.pipeline.diffusion
            assert isinstance(path, VariancePreserving)
            bound = ddpm_bound(path, prediction, denoiser, x0, generators, self.settings.ddpm_steps)
            found = [replace(one, ddpm=nats) for one, nats in zip(measured.images, bound.tolist(), strict=True)]
            measured = measured._replace(images=found)
        if "captions" in measures:
            found, noise_errors = self._compare(measured.images, samples, denoiser, x0, generators)
            measured = measured._replace(images=found, noise_errors=noise_errors)
        return measured

    def _generators(self, samples: Sequence[Mapping[str, Any]]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.settings.seed + sample["number"]) for sample in samples]

    def _latents(
        self, samples: Sequence[Mapping[str, Any]], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised latents (B, C, h, w), sampled; −ln q of their posterior, and the pixels' squared errors, (B,) float64."""
        vae = self.pipeline.vae
        images = pixels_to_images(torch.from_numpy(np.stack([sample["image"] for sample in samples])).to(vae.device))
        if isinstance(vae, PixelAutoencoder):
            if "image" in self.settings.measures:  # a density of bytes needs them spread
                spread = [torch.rand(images.shape[1:], generator=generator) - 0.5 for generator in generators]
                images = images + BIN * torch.stack(spread).to(images)
            bins = torch.full((len(images),), images[0].numel() * math.log(BIN), dtype=torch.float64)
            return self.normalizer.normalize(images), bins, torch.zeros_like(bins)
        posterior = in_float32(encode(vae, images.to(vae.dtype)))
        if posterior.deterministic:
            z = posterior.mode()
            nothing = torch.zeros(len(z), dtype=torch.float64)
            return self.normalizer.normalize(z), nothing, nothing
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=generator) for generator in generators]).to(images)
        z = posterior.mean + posterior.std * noise
        log_q = torch.distributions.Normal(posterior.mean.double(), posterior.std.double()).log_prob(z.double())
        squares = torch.zeros(len(z), dtype=torch.float64)
        if "image" in self.settings.measures:
            apart = (decode(vae, z.to(vae.dtype)).double() - images).square().flatten(1)
            squares = apart.sum(1).cpu() + apart.shape[1] * BIN**2 / 12
        return self.normalizer.normalize(z), -log_q.flatten(1).sum(1).cpu(), squares

    def _denoiser(self, samples: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> Denoiser:
        """The denoiser under these captions, cut where the text encoders take no more, as in training."""
        pipeline = self.pipeline
        tokens = [encoder.tokenize(texts, cut=True) for encoder in pipeline.text_encoders]
        condition: Condition = pipeline.embed([[*ids] for ids in zip(*tokens, strict=True)])
        if takes_sizes(pipeline.transformer):
            original, crop = (torch.tensor([sample[name] for sample in samples]) for name in ("original_size", "crop"))
            sizes = micro_conditions(original, crop, samples[0]["image"].shape[1:])
            condition = condition._replace(sizes=sizes.to(condition.mask.device))
        encoded = encode_condition(pipeline.transformer, condition)
        return lambda scaled, network_time, t: denoise(pipeline.transformer, scaled, network_time, encoded).float()

    def _flow(
        self,
        found: Sequence[ImageLikelihood],
        samples: Sequence[Mapping[str, Any]],
        denoiser: Denoiser,
        x0: Tensor,
        probes: Tensor,
    ) -> Measured:
        result, solver_error = self.flow(denoiser, x0, probes), None
        if not self.is_solver_checked:  # once in each process; that of the first images counts
            self.is_solver_checked = True
            few, flow = slice(CHECKED), self.flow
            stricter = replace(flow, tolerance=max(flow.tolerance / 10, 1e-9), steps=min(2 * flow.steps, 100_000))
            denoiser = self._denoiser(samples[few], [one.caption for one in found[few]])
            again = stricter(denoiser, x0[few], probes[:, few])
            solver_error = float((again.nats - result.nats[few]).abs().max()) / (x0[0].numel() * math.log(2))
        pairs = zip(found, result.nats.tolist(), result.standard_error.tolist(), strict=True)
        images = [replace(one, latent=nats, error=None if math.isnan(error) else error) for one, nats, error in pairs]
        return Measured(images, None, result.evaluations, solver_error)

    def _compare(
        self,
        found: Sequence[ImageLikelihood],
        samples: Sequence[Mapping[str, Any]],
        denoiser: Denoiser,
        x0: Tensor,
        generators: Sequence[torch.Generator],
    ) -> tuple[list[ImageLikelihood], Tensor]:
        """Each with its evidence under its own and under other captions, by the same noise at the same levels; and
        ``noise_errors`` of :class:`Measured`."""
        path, prediction = self.pipeline.diffusion
        compared = [self._others(one, generator) for one, generator in zip(found, generators, strict=True)]
        denoisers = [denoiser, *(self._denoiser(samples, texts) for texts in zip(*compared, strict=True))]
        evidence = torch.zeros(len(denoisers), len(x0), dtype=torch.float64)
        noise_errors = []
        for time_ in self.levels:
            t = time_.expand(len(x0))
            snr = (path.alpha(t) / path.sigma(t)).square()
            eps = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(x0)
            errors = torch.stack([snr * squared_error(path, prediction, each, x0, eps, t.to(x0)).cpu() for each in denoisers])
            evidence -= errors / 2 * self.width
            noise_errors.append(torch.stack([errors[0].sum(), errors[1].sum(), errors[2:].mean(0).sum()]))
        images = [
            replace(one, own=nats[0], others=tuple(nats[1:]), compared=tuple(texts))
            for one, nats, texts in zip(found, evidence.T.tolist(), compared, strict=True)
        ]
        return images, torch.stack(noise_errors)

    def _others(self, image: ImageLikelihood, generator: torch.Generator) -> list[str]:
        """The empty caption, and others of the set at random."""
        rest = [text for text in self.captions if text != image.caption]
        order = torch.randperm(len(rest), generator=generator)[: self.settings.others]
        return ["", *(rest[number] for number in order.tolist())]
