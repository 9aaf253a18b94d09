"""The folder of a run: every image's name is settled before any is drawn, so that an interrupted run can go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from ldm.errors import UsageError
from ldm.files import atomic_file, read_json, require_new_folder, write_json
from ldm.inference.gallery import write_gallery
from ldm.inference.metadata import Provenance, save_png
from ldm.inference.settings import GenerationSettings
from ldm.reporting.report import captioned_grid

REQUEST = "run.json"
PREVIEW = "preview.png"
GRID_IMAGES = 64
CELL = 160  # pixels


class OutputFolder:
    """A folder of numbered images and ``run.json``, which says what each of them is, drawn or not."""

    def __init__(self, path: str | Path, planned: Mapping[int, GenerationSettings], provenance: Provenance):
        """Make the folder, or take up the one that holds some of the same images.

        Args:
            planned: every image's number and settings.
            provenance: of the pipeline that they are to be drawn with.

        Raises:
            UsageError: for a folder of other work, or of images that are not among these.
            OSError: when it cannot be written.
        """
        self.path, self.planned = Path(path), planned
        self.names = {number: file_name(number, settings.prompt) for number, settings in planned.items()}
        images = {self.names[number]: settings.to_json() for number, settings in planned.items()}
        model = {"model": provenance.model, "model_hash": provenance.model_hash, "dtype": provenance.dtype}
        if (self.path / REQUEST).is_file():
            self._check(model, images)
        else:
            require_new_folder(self.path, "the images")
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / REQUEST, model | {"images": images})

    def _check(self, model: dict[str, str], images: dict[str, dict]) -> None:
        before, mend = read_json(self.path / REQUEST), "give a new folder, or remove that one first"
        listed = before.get("images") if isinstance(before, dict) else None
        if not isinstance(listed, dict) or not all(isinstance(settings, dict) for settings in listed.values()):
            raise UsageError(f"{self.path / REQUEST} is not of ldm sample; {mend}")
        there = {name: settings for name, settings in listed.items() if (self.path / name).is_file()}
        for name in ("model_hash", "dtype"):
            if there and before.get(name) != model[name]:
                known = f"{before.get('model')} {before.get(name)}"[:80], f"{model['model']} {model[name]}"[:80]
                raise UsageError(f"{self.path} holds images of {known[0]}, not of {known[1]}; {mend}")
        for name, settings in there.items():
            if name not in images:
                raise UsageError(f"{self.path} holds {name} of another request; {mend}")
            for key, value in images[name].items():
                if settings.get(key) != value:
                    drawn, asked = (repr(found)[:60] for found in (settings.get(key), value))
                    raise UsageError(f"{self.path / name} was drawn with {key} {drawn}, not {asked}; {mend}")

    def missing(self) -> list[int]:
        """The numbers that are still to be drawn."""
        return [number for number, name in self.names.items() if not (self.path / name).is_file()]

    def save(self, number: int, image: Image.Image, provenance: Provenance, metadata: bool = True) -> None:
        """Write an image, atomically."""
        save_png(image, self.path / self.names[number], self.planned[number], provenance, metadata)

    def preview(self, images: list[Image.Image], captions: Iterable[str]) -> None:
        """Overwrite ``preview.png``, atomically."""
        grid = captioned_grid(images, list(captions)[: len(images)], columns=len(images), cell=CELL)
        with atomic_file(self.path / PREVIEW) as file:
            grid.save(file, "PNG")

    def finish(self, columns: int | None = None) -> int:
        """Write ``grid.png`` of the first images and ``index.html``; how many stand in the grid."""
        (self.path / PREVIEW).unlink(missing_ok=True)
        numbers = list(self.planned)[:GRID_IMAGES]
        images = [self._small(number) for number in numbers]
        grid = captioned_grid(images, [self.planned[number].prompt for number in numbers], columns, CELL)
        with atomic_file(self.path / "grid.png") as file:
            grid.save(file, "PNG")
        write_gallery(self.path)
        return len(numbers)

    def _small(self, number: int) -> Image.Image:
        with Image.open(self.path / self.names[number]) as image:
            image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            return image.convert("RGB")


def file_name(number: int, prompt: str) -> str:
    """``0003-a-red-ring.png``."""
    words = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60]
    # a file name has at most 255 bytes, and a temporary one is longer
    words = words.encode()[:160].decode(errors="ignore").strip("-")
    return f"{number:04d}-{words}.png" if words else f"{number:04d}.png"
