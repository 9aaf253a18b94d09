"""The files that an image is made from, by their hashes: settings say what they were, not where on a machine they lay."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UsageError
from ldm.files import atomic_file, sha256_file
from ldm.inference.metadata import model_hash
from ldm.inference.settings import INPUTS, LISTS, GenerationSettings, is_reference, split_lora
from ldm.models.adapter_file import adapter_path
from ldm.models.learned_token import token_path
from ldm.pipeline import image_of, read_input

FOLDER = "inputs"  # beside the images, with copies of their inputs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # that a copy keeps


def reference(data: bytes) -> str:
    """How settings name a file of this content: ``sha256:`` and 64 hex digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Inputs:
    """The input files that a user has given. A file is read again when it is used, and refused if it has changed since.

    Attributes:
        any_base: adapters may be of another base of the same architecture.
    """

    def __init__(self, any_base: bool = False) -> None:
        self.any_base = any_base
        self._paths: dict[str, Path] = {}
        self._add = functools.cache(self._hash)

    def add(self, name: str, path: str) -> str:
        """The reference of a file that the user gives for a setting, or of the pipeline directory for ``weak``.

        Raises:
            UsageError: for a path that cannot be read, or a reference of a file that was not given.
        """
        return self._add(name, path)

    def _hash(self, name: str, path: str) -> str:
        if is_reference(path):
            if path not in self._paths:
                raise UsageError(f"{name} is the file of {path}; give its path")
            return path
        if name == "weak":
            index = Path(path) / "model_index.json"
            if not index.is_file():
                raise UsageError(f"weak {path} is not a pipeline directory (no model_index.json); ldm denoiser fit makes one")
            found = f"sha256:{model_hash(path)}"
        elif name in LISTS:
            path = str(adapter_path(path) if name == "lora" else token_path(path))
            found = f"sha256:{sha256_file(Path(path))}"
        else:
            found = reference(read_input(path))
        self._paths[found] = Path(path)
        return found

    def named(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings with references in the place of paths. Raises UsageError as :meth:`add` does."""
        paths = {name: value for name in INPUTS if (value := getattr(settings, name)) is not None}
        given: dict[str, Any] = {name: self.add(name, path) for name, path in paths.items()}
        if settings.lora:
            adapters = [(self.add("lora", path), weight) for path, weight in settings.adapters()]
            if len({*dict(adapters)}) < len(adapters):
                raise UsageError("the same adapter is given twice as lora; give it once, with its weight")
            given["lora"] = tuple(f"{found}={weight!r}" for found, weight in adapters)
        if settings.embedding:
            tokens = [self.add("embedding", path) for path in settings.embedding]
            given["embedding"] = tuple(dict.fromkeys(tokens))
            if len(given["embedding"]) < len(tokens):
                raise UsageError("the same token is given twice as embedding; give it once")
        return dataclasses.replace(settings, **given) if given else settings

    def read(self, found: str) -> bytes:
        """The bytes of a file. Raises UsageError where it has changed since :meth:`add`."""
        data = read_input(self._paths[found])
        self._require_same(reference(data), found)
        return data

    def image(self, found: str, background: tuple[int, int, int] | None = None) -> Image.Image:
        """The image of a file, as :func:`ldm.pipeline.image_of` gives it. Raises UsageError as :meth:`read` does."""
        return image_of(self.read(found), self._paths[found], background)

    def model(self, found: str) -> Path:
        """The directory of a pipeline. Raises UsageError where it has changed since :meth:`add`."""
        self._require_same(f"sha256:{model_hash(self._paths[found])}", found)
        return self._paths[found]

    def file(self, found: str) -> Path:
        """The file of an adapter or of a token. Raises UsageError where it has changed since :meth:`add`."""
        self._require_same(f"sha256:{sha256_file(self._paths[found])}", found)
        return self._paths[found]

    def _require_same(self, now: str, found: str) -> None:
        if now != found:
            raise UsageError(f"{self._paths[found]} has changed since this run began; run it again")

    def restore(self, png: str | Path, stored: GenerationSettings, given: dict[str, Any]) -> dict[str, Any]:
        """The inputs of an image that is generated again, as references: those that the user gives, which must be the same
        files, else copies in the folder ``inputs`` beside the image. A path inside the image is never followed.

        Args:
            png: the image, whose settings are ``stored``.
            given: paths by the names of settings; an adapter without a weight has that of the image.

        Raises:
            UsageError: an input is missing, or is another file.
        """
        restored: dict[str, Any] = {}
        if stored.lora:
            before = dict(stored.adapters())
            mine = {self.add("lora", path): weight for path, weight in map(split_lora, given.get("lora") or ())}
            if before.keys() != mine.keys():
                raise UsageError(
                    f"{png} was generated with --lora of {', '.join(before)}; give the files of these adapters again, by --lora"
                )
            restored["lora"] = [f"{found}={before[found] if weight is None else weight!r}" for found, weight in mine.items()]
        if stored.embedding:
            tokens = {self.add("embedding", path) for path in given.get("embedding") or ()}
            if tokens != {*stored.embedding}:
                raise UsageError(
                    f"{png} was generated with --embedding of {', '.join(stored.embedding)}; give the files of these tokens "
                    "again, by --embedding"
                )
            restored["embedding"] = [*stored.embedding]
        for name in INPUTS:
            before, option = getattr(stored, name), f"--{name}"
            if before is None:
                continue
            known = is_reference(before)
            path = given.get(name) or (known and _copy(Path(png).parent, before)) or None
            if path is None:
                raise UsageError(f"{png} was generated with {option} of {before}; give that again, by {option}")
            restored[name] = self.add(name, str(path))
            if known and restored[name] != before:
                raise UsageError(
                    f"{path} is {restored[name]}, but {png} was generated with {option} of {before}; give that one, or write "
                    "its settings yourself"
                )
        return restored

    def copy(self, folder: Path, settings: GenerationSettings) -> None:
        """Copy the images that settings name to ``inputs`` in ``folder``, for :meth:`restore`."""
        for found in filter(None, (settings.image, settings.mask)):
            suffix = self._paths[found].suffix.lower()
            target = folder / FOLDER / (found.removeprefix("sha256:") + (suffix if suffix in SUFFIXES else ""))
            if not target.exists():
                data = self.read(found)
                with atomic_file(target) as file:
                    file.write(data)


def has_copy(folder: Path, found: str) -> bool:
    """Whether ``folder`` holds a copy of the file of a reference."""
    return is_reference(found) and _copy(folder, found) is not None


def _copy(folder: Path, found: str) -> Path | None:
    copies = (folder / FOLDER).glob(found.removeprefix("sha256:") + "*")
    return next((path for path in copies if path.is_file()), None)
