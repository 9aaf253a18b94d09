"""The output folder of a run. Every image's name is fixed before the first is generated, so that a run can be resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import LdmError, UsageError
from ldm.files import read_json, require_new_folder, require_output_file, require_version, write_json
from ldm.images import open_image
from ldm.inference.gallery import write_gallery
from ldm.inference.generate import GenerationStep, ImageGenerator
from ldm.inference.metadata import Provenance, save_png
from ldm.inference.settings import GenerationSettings
from ldm.progress import Progress
from ldm.reporting.grids import captioned_grid

REQUEST = "run.json"
FORMAT_VERSION = 1  # of run.json
PREVIEW = "preview.png"
GRID_IMAGES = 64
CELL = 160  # pixels


@dataclass
class Request:
    """``run.json``: the settings of each image by its file's name, and the model."""

    images: dict[str, dict[str, Any]]
    model: str
    model_hash: str
    dtype: str


def require_images_folder(path: str | Path) -> bool:
    """Whether the folder holds images of ``ldm sample``; a new or empty one does not. Raises UsageError for any other."""
    if os.path.lexists(Path(path) / REQUEST):
        return True
    require_new_folder(path, "the images", in_place=True)
    return False


class OutputFolder:
    """A folder of numbered images and ``run.json``, which holds the settings of each image, generated or not."""

    def __init__(self, path: str | Path, planned: Mapping[int, GenerationSettings], provenance: Provenance):
        """Create the folder, or resume one that holds some of the same images.

        Args:
            planned: the number and settings of every image.
            provenance: of the pipeline that generates them.

        Raises:
            UsageError: for a folder of other work, or of images that are not among these.
            LdmError: for a folder that a newer ldm wrote.
            OSError: when it cannot be written.
        """
        self.path, self.planned, self.provenance = Path(path), planned, provenance
        self.names = {number: file_name(number, settings.prompt) for number, settings in planned.items()}
        images = {self.names[number]: settings.to_json() for number, settings in planned.items()}
        model = {"model": provenance.model, "model_hash": provenance.model_hash, "dtype": provenance.dtype}
        if require_images_folder(self.path):
            self._check(model, images)
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (*self.names.values(), "grid.png", "index.html", PREVIEW):
            if os.path.lexists(self.path / name) and not (self.path / name).is_file():
                require_output_file(self.path / name)
        write_json(self.path / REQUEST, {"format_version": FORMAT_VERSION} | model | {"images": images})

    def _check(self, model: dict[str, str], images: dict[str, dict]) -> None:
        request, fix = self.path / REQUEST, "give a new folder"
        require_version(
            read_json(request, dict[str, Any]).get("format_version"), FORMAT_VERSION, f"{request}: the list of images"
        )
        before = read_json(request, Request)
        names = {entry.name for entry in self.path.iterdir()}
        existing = {name: settings for name, settings in before.images.items() if name in names}
        for name in ("model_hash", "dtype"):
            if existing and getattr(before, name) != model[name]:
                known = f"{before.model} {getattr(before, name)}"[:80], f"{model['model']} {model[name]}"[:80]
                raise UsageError(f"{self.path} holds images of {known[0]}, not of {known[1]}; {fix}")
        for name, settings in existing.items():
            if name not in images:
                raise UsageError(f"{self.path} holds {name} of another request; {fix}")
            for key, value in images[name].items():
                if settings.get(key) != value:
                    made, asked = (repr(found)[:60] for found in (settings.get(key), value))
                    raise UsageError(f"{self.path / name} was generated with {key} {made}, not {asked}; {fix}")

    def missing(self) -> list[int]:
        """The numbers of the images that are not generated yet."""
        return [number for number, name in self.names.items() if not (self.path / name).is_file()]

    def save(self, number: int, image: Image.Image, provenance: Provenance, metadata: bool = True) -> None:
        """Write an image, atomically."""
        save_png(image, self.path / self.names[number], self.planned[number], provenance, metadata)

    def preview(self, images: list[Image.Image], settings: Sequence[GenerationSettings], metadata: bool = True) -> None:
        """Overwrite ``preview.png``, atomically."""
        settings = settings[: len(images)]
        grid = captioned_grid(images, [one.prompt for one in settings], columns=len(images), cell=CELL)
        save_png(grid, self.path / PREVIEW, settings, self.provenance, metadata)

    def finish(self, columns: int | None = None, metadata: bool = True) -> int:
        """Write ``grid.png`` of the first images, and ``index.html``, and remove what a killed run has left unfinished. Returns
        the number of images in the grid."""
        for left in (self.path / PREVIEW, *self.path.glob(".*.png.*.tmp")):
            left.unlink(missing_ok=True)
        numbers = list(self.planned)[:GRID_IMAGES]
        images = [self._thumbnail(number) for number in numbers]
        grid = captioned_grid(images, [self.planned[number].prompt for number in numbers], columns, CELL)
        save_png(grid, self.path / "grid.png", [self.planned[number] for number in numbers], self.provenance, metadata)
        write_gallery(self.path)
        return len(numbers)

    def _thumbnail(self, number: int) -> Image.Image:
        with open_image(self.path / self.names[number], formats=("PNG",)) as image:
            image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            return image.convert("RGB")


def generate_missing(
    generator: ImageGenerator,
    folder: OutputFolder,
    batch_size: int = 1,
    preview_every: int = 0,
    metadata: bool = True,
) -> int:
    """Generate the images that a folder lacks. Whatever ends it, the images so far stay; call it again for the rest.

    Args:
        batch_size, preview_every: see :meth:`ldm.inference.generate.ImageGenerator.generate`.
        metadata: store the settings and the provenance in each PNG.

    Returns:
        The number of images generated.

    Raises:
        LdmError: when the folder cannot be written.
    """
    missing, done = folder.missing(), 0
    with Progress("generating", len(missing)) as progress:

        def on_step(step: GenerationStep) -> None:
            progress.update(done, None, {"step": step.done, "of": step.total})
            if step.previews:
                folder.preview(step.previews, step.settings, metadata)

        wanted = [folder.planned[number] for number in missing]
        try:
            for made in generator.generate(wanted, batch_size, on_step, preview_every):
                provenance = folder.provenance.of_scheduler(made.prepared.sampler.scheduler, made.prepared.composite)
                folder.save(missing[made.number], made.image, provenance, metadata)
                done += 1
                progress.update(done)
        except OSError as error:
            raise LdmError(
                f"{folder.path} cannot be written ({error.strerror}) after {done} of {len(missing)} images; make room, then "
                "the same command generates the rest"
            ) from error
    return done


def file_name(number: int, prompt: str) -> str:
    """``0003-a-red-ring.png``."""
    words = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60]
    # a file name has at most 255 bytes, and a temporary one is longer
    words = words.encode()[:160].decode(errors="ignore").strip("-")
    return f"{number:04d}-{words}.png" if words else f"{number:04d}.png"
