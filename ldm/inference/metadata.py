"""What an image was drawn with, inside its PNG: for other programs to read, for us to draw it again, marked as generated."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from diffusers import SchedulerMixin
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.diffusion.scheduler import SAMPLERS
from ldm.errors import UsageError
from ldm.files import atomic_file, read_json, sha256_file, sha256_folder
from ldm.inference.settings import GenerationSettings
from ldm.machine import cpu_name
from ldm.pipeline import LatentDiffusionPipeline

CHUNK = "ldm"
MAX_CHUNK = 1 << 20  # characters
MAX_VALUE = 500  # characters of one entry of the provenance
# weights, configs, and the vocabularies that tokenizers keep beside them; not a model card, which says nothing of the images
MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model")
# as A1111 writes them; it has none for DDPM
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler-ancestral": "Euler a",
    "heun": "Heun",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
}
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <xmp:CreatorTool>{tool}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


@dataclass(frozen=True)
class Provenance:
    """What an image was drawn with, beside its settings.

    Attributes:
        model: name of the pipeline's directory.
        model_hash: hex sha256 of its weights, configs and vocabularies; A1111's "Model hash" is the first 10 digits.
        scheduler: the name that :func:`ldm.diffusion.scheduler.make_scheduler` knows it by; its class where it has none.
        sampler: the scheduler's class.
        dtype: of the denoiser's weights: ``float32``.
        device: ``cpu`` or ``cuda``, and which: ``cpu (Intel Xeon)``.
        ldm, torch, diffusers: versions.
        tiled: the autoencoder decoded in tiles.
        width, height: of the image in pixels; :func:`save_png` fills them in.
    """

    model: str
    model_hash: str
    scheduler: str
    sampler: str
    dtype: str
    device: str
    ldm: str
    torch: str
    diffusers: str
    tiled: bool = False
    width: int | None = None
    height: int | None = None

    @classmethod
    def from_json(cls, content: Any, where: str) -> Provenance:
        """The provenance of ``dataclasses.asdict``.

        Raises:
            UsageError: for anything else; names the entry and ``where``.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(content, dict) or sorted(content) != sorted(names):
            raise UsageError(f"{where}: its provenance is not of {', '.join(names)}; give the settings yourself")
        for name, value in content.items():
            if name in ("width", "height"):
                right = value is None or (type(value) is int and 0 < value < 2**31)
            elif name == "tiled":
                right = isinstance(value, bool)
            else:
                right = isinstance(value, str) and len(value) <= MAX_VALUE
            if not right or (name == "model_hash" and not re.fullmatch("[0-9a-f]{64}", value)):
                raise UsageError(f"{where}: {name} of its provenance is broken; give the settings yourself")
        return cls(**content)


def provenance_of(pipeline: LatentDiffusionPipeline, model_path: str | os.PathLike) -> Provenance:
    """What ``pipeline``, opened from ``model_path``, draws with as it stands: call it again for another scheduler.

    The model's files are hashed the first time and when they have changed.
    """
    scheduler, device = pipeline.scheduler, pipeline._execution_device
    which = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return Provenance(
        model=Path(model_path).resolve().name,
        model_hash=model_hash(model_path),
        scheduler=scheduler_name(scheduler),
        sampler=type(scheduler).__name__,
        dtype=str(pipeline.transformer.dtype).removeprefix("torch."),
        device=f"{device.type} ({which})",
        tiled=pipeline.vae.use_tiling,
        **{package: version(package) for package in ("ldm", "torch", "diffusers")},
    )


def scheduler_name(scheduler: SchedulerMixin) -> str:
    """The name that makes this scheduler; its class where none does."""
    fitting = [
        (len(apart), name)
        for named in SAMPLERS.values()
        for name, (kind, apart) in named.items()
        if type(scheduler) is kind and apart.items() <= dict(scheduler.config).items()
    ]
    return max(fitting, default=(0, type(scheduler).__name__))[1]


def model_hash(path: str | os.PathLike) -> str:
    """Hex sha256 of a pipeline directory: its index and the files of its parts, whatever else lies beside them."""
    path = Path(path).resolve()
    stamps = [(file, file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
    return _model_hash(path, tuple((file, stamp.st_size, stamp.st_mtime_ns) for file, stamp in stamps))


@functools.lru_cache(maxsize=16)
def _model_hash(path: Path, stamps: tuple[tuple[Path, int, int], ...]) -> str:
    index = path / "model_index.json"
    digest = hashlib.sha256(sha256_file(index).encode())
    for part in sorted(part for part in read_json(index) if (path / part).is_dir()):
        digest.update(f"\n{part} {sha256_folder(path / part, MODEL_FILES)}".encode())
    return digest.hexdigest()


def save_png(
    image: Image.Image, path: str | os.PathLike, settings: GenerationSettings, provenance: Provenance, metadata: bool = True
) -> None:
    """Write an image, atomically, as :func:`encode_png` makes it.

    Args:
        metadata: False writes the pixels alone.

    Raises:
        OSError: when it cannot be written.
    """
    data = encode_png(image, settings, provenance, metadata)
    with atomic_file(path) as file:
        file.write(data)


def encode_png(image: Image.Image, settings: GenerationSettings, provenance: Provenance, metadata: bool = True) -> bytes:
    """An image as PNG with what it was drawn with inside.

    Its chunks are ``parameters``, the text that A1111 writes and that it, ComfyUI and image sites read; ``ldm``, JSON with
    the settings and the provenance, which :func:`read_png` reads; and an XMP packet with IPTC's digital source type.
    """
    chunks = PngInfo()
    if metadata:
        provenance = dataclasses.replace(provenance, width=image.width, height=image.height)
        # in ASCII, so that whatever a prompt holds comes back as it was
        content = json.dumps({"settings": settings.to_json(), "provenance": dataclasses.asdict(provenance)})
        chunks.add_text("parameters", a1111_parameters(settings, provenance))
        chunks.add_text(CHUNK, content)
        chunks.add_itxt("XML:com.adobe.xmp", _xmp(settings, provenance))
    plain = image.copy()
    plain.info = {}  # Pillow writes some of what an image was read with
    buffer = io.BytesIO()
    plain.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_png(path: str | os.PathLike) -> tuple[GenerationSettings, Provenance]:
    """What an image was drawn with, as :func:`save_png` left it; the file may come from anyone.

    Raises:
        UsageError: for a file that is no whole PNG, or without settings that can be drawn.
    """
    text = _chunk(path)
    if text is None:
        raise UsageError(
            f"{path} holds no settings of ldm (drawn by another program, or with --no-metadata); give the settings yourself"
        )
    try:
        if len(text) > MAX_CHUNK:
            raise ValueError(f"{len(text)} characters")
        content = json.loads(text, parse_constant=_refuse, parse_int=_bounded)
        if not isinstance(content, dict) or sorted(content) != ["provenance", "settings"]:
            raise ValueError("not settings and provenance")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: its ldm chunk is broken ({error}); give the settings yourself") from None
    try:
        return (
            GenerationSettings.from_json(content["settings"], str(path)),
            Provenance.from_json(content["provenance"], str(path)),
        )
    except UsageError as error:
        line = str(error)  # which may quote what the file holds
        raise UsageError(line if len(line) <= MAX_VALUE else f"{line[:MAX_VALUE]}…; give the settings yourself") from None


def a1111_parameters(settings: GenerationSettings, provenance: Provenance) -> str:
    """The text of A1111's ``parameters`` chunk: the prompt, the negative prompt, and a line of ``name: value`` pairs.

    The negative prompt's line stands even where it is empty: ComfyUI reads nothing without it. Half surrogate pairs, which
    no text chunk can hold, become question marks.
    """
    pairs = {
        "Steps": settings.steps,
        "Sampler": A1111_SAMPLERS.get(provenance.scheduler, provenance.scheduler),
        "CFG scale": settings.guidance,
        "Seed": settings.seed,
        "Size": f"{provenance.width}x{provenance.height}",
        "Model hash": provenance.model_hash[:10],
        "Model": provenance.model,
        "Denoising strength": settings.strength,
        "Eta DDIM": settings.eta,
        "Version": f"ldm {provenance.ldm}",
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None)
    text = f"{settings.prompt}\nNegative prompt: {settings.negative}\n{line}"
    return text.encode("utf-8", "replace").decode()


def _quoted(value: str | int | float) -> str:
    """A value as A1111 writes it: a JSON string where its separators would be taken for the line's."""
    text = f"{value:.15g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\r\n]', text) else text


def _xmp(settings: GenerationSettings, provenance: Provenance) -> str:
    """The mark of generated media; where a mask kept a part of a given image, that of a composite."""
    source_type = "compositeWithTrainedAlgorithmicMedia" if settings.mask else "trainedAlgorithmicMedia"
    return XMP.format(tool=escape(f"ldm {provenance.ldm}"), source_type=SOURCE_TYPES + source_type)


def _chunk(path: str | os.PathLike) -> str | None:
    """Our chunk of a PNG that is whole; no pixel is decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(CHUNK)
            image.verify()
    except Image.UnidentifiedImageError:
        raise UsageError(f"{path} is not a whole PNG; give an image as ldm sample wrote it") from None
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give an image that ldm sample drew") from None
    # broken bytes raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError and more from Pillow
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} cannot be read ({reason}); give a whole copy of the image") from None
    return text if isinstance(text, str) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _bounded(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
