"""A page about the likelihood of images: how it is spread, which images are least likely, and suspects of a wrong caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.evaluation.likelihood import CAPTIONS, ImageLikelihood, LikelihoodEvaluator, Likelihoods
from ldm.reporting.grids import captioned_grid
from ldm.reporting.pages import Report
from ldm.terminal import printable

# images in a row, which is as wide as the page; their side in pixels; images in all
COLUMNS, CELL = 5, 150
SHOWN = 2 * COLUMNS
BINS = 40
NO_SUSPECTS = "None: each image is likelier under its own caption than under those that it was compared with."
LABELS = {
    "latent": "latents, bits per dimension",
    "image": "images through the autoencoder, bits per dimension (upper bound)",
    "ddpm": "latents by DDPM's bound, bits per dimension (upper bound)",
}


def metric_rows(found: Likelihoods) -> dict[str, str]:
    """The results in words, for a table."""
    summary, rows = found.summary(), {"images": f"{len(found.images):,}"}
    for measure in found.settings.measures:
        if measure in LABELS:
            mean, error = summary[f"{measure}_bits_per_dim"], summary[f"{measure}_standard_error"]
            rows[LABELS[measure]] = f"{mean:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")
    names = {
        "probes_standard_error": ("of these by the probes, bits per dimension", "± {:.5f}"),
        "solver_error": (f"largest error of the solver over {found.checked} images, bits per dimension", "{:.5f}"),
        "evaluations": ("evaluations of the denoiser for the ODE", "{:.0f}"),
        "decoder_std": ("standard deviation of the decoder's distribution, in [−1, 1]", "{:.4f}"),
        "caption_margin_nats": ("own caption against the likeliest other, nats on average", "{:.2f}"),
        "likelier_under_own": ("images likelier under their own caption", "{:.1%}"),
    }
    return rows | {label: form.format(summary[name]) for name, (label, form) in names.items() if name in summary}


def save_page(found: Likelihoods, evaluator: LikelihoodEvaluator, path: str | Path, model: str, suspects: int) -> None:
    """Write the page.

    Args:
        model: name of the pipeline.
        suspects: images that are listed.
    """
    report = Report("Likelihood", f"{model} on {evaluator.source.spec}")
    report.table("Results", ("metric", "value"), [*metric_rows(found).items()])
    for measure in found.settings.measures:
        if measure in LABELS:
            bits = np.array([found.bits(image, measure) for image in found.images])
            low, high = float(bits.min()), float(bits.max())
            low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
            name = f"mean {bits.mean():.3f}, from {bits.min():.3f} to {bits.max():.3f}"
            title = LABELS[measure][0].upper() + LABELS[measure][1:]
            report.bars(title, {name: np.histogram(bits, BINS, (low, high))[0]}, low, high)
    if "captions" in found.settings.measures:
        _captions(report, found, evaluator, suspects)
    measure = next((name for name in ("latent", "ddpm") if name in found.settings.measures), None)
    if measure is not None:
        order = sorted(found.images, key=lambda image: found.bits(image, measure))
        for title, few in (("Least likely images", order[::-1][:SHOWN]), ("Most likely images", order[:SHOWN])):
            texts = [f"{found.bits(image, measure):.3f} bits: {image.caption}" for image in few]
            note = "Under their own captions. Plain images are likely, busy ones are not, whatever the captions say."
            report.image(title, _grid(evaluator, few, texts), note)
    report.save(path)


def _captions(report: Report, found: Likelihoods, evaluator: LikelihoodEvaluator, suspects: int) -> None:
    few = found.suspects(suspects)
    if few:
        shown = few[: 4 * COLUMNS]
        texts = [f"{image.margin:+.1f} nats. {image.caption}" for image in shown]
        note = (
            "Images that are likelier under the empty caption, or one of "
            f"{len(few[0].others) - 1} of other images, than under their own, the worst first, and by how many nats."
        )
        report.image("Suspects of a wrong caption", _grid(evaluator, shown, texts), note)
        rows = []
        for image in few:
            best = max(range(len(image.others)), key=lambda number: image.others[number])
            shard, key = evaluator.dataset.name_of(image.number)
            name = printable(f"{Path(shard).name}: {key}")
            rows.append((name, image.caption, round(image.margin, 2), image.compared[best] or "the empty one"))
        columns = ("image", "caption", "nats above the likeliest other", "the likeliest other")
        report.table("The suspects by name", columns, rows)
    else:
        report.text("Suspects of a wrong caption", NO_SUSPECTS)
    margins = np.array([image.margin for image in found.images])
    low, high = min(float(margins.min()), 0.0), max(float(margins.max()), 0.1)
    name = f"{(margins > 0).mean():.1%} of the images are likelier under their own caption"
    report.bars("Own caption against the likeliest other, nats", {name: np.histogram(margins, BINS, (low, high))[0]}, low, high)
    levels = [*found.errors]
    series = {name: (levels, [found.errors[level][side] for level in levels]) for side, name in enumerate(CAPTIONS)}
    report.curve("What captions tell, by the level of noise", series, "ln SNR", "squared error of the noise per dimension")


def _grid(evaluator: LikelihoodEvaluator, images: Sequence[ImageLikelihood], texts: Sequence[str]) -> Image.Image:
    """Images as they are measured."""
    shown = [Image.fromarray(evaluator.dataset[image.number]["image"].transpose(1, 2, 0)) for image in images]
    return captioned_grid(shown, [printable(text) for text in texts], columns=COLUMNS, cell=CELL)
