"""Functions that make data for several tests, and a manifest's entries."""

import io
import tarfile
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKLFlux2, AutoencoderTiny
from PIL import Image

from ldm.data.latent_schema import LatentInfo, TextInfo
from ldm.data.manifest import IMAGE_SHARDS, Manifest, ShardEntry
from ldm.data.writer import ShardWriter, encode_png, write_images
from ldm.files import sha256_file
from ldm.models.pixels import PixelAutoencoder

INFO = LatentInfo(
    autoencoder="a" * 64,
    text_encoders=(TextInfo("minilm", "t" * 64, 6, 5, 0), TextInfo("other", "u" * 64, 5, 5, 0)),
    latent_shapes=((4, 2, 2),),
    resolution=None,
    posterior="gaussian",
    flips=True,
    captions="all",
    dtype="float32",
    precision="fp32",
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
    source="s" * 64,
    source_shards="shards",
    versions={},
)


def encoded(image, format="PNG", **options):
    """The bytes of an image, or of an array's image."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_numbered(folder, counts, bad=()):
    """Shards of so many images, keys 00, 01, ...; those numbered ``bad`` are none."""
    folder.mkdir(exist_ok=True)
    entries, numbers = [], iter(range(sum(counts)))
    for shard, count in enumerate(counts):
        with ShardWriter(folder, "x", samples_per_shard=None, first_index=shard) as writer:
            for number in islice(numbers, count):
                image = b"no image" if number in bad else encode_png(Image.new("RGB", (4, 4), (number, 0, 0)))
                writer.write(f"{number:02d}", {"png": image})
        entries += writer.entries or [_empty(folder / f"x-{shard:05d}.tar")]
    Manifest(IMAGE_SHARDS, tuple(entries)).save(folder)
    return folder


def write_photographs(folder, sizes):
    """Shards of three smooth images each, of these sizes (width, height)."""
    random = np.random.default_rng(0)

    def photograph(size):
        return Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)

    write_images(folder, "x", [(f"{n:02d}", photograph(size), f"number {n}") for n, size in enumerate(sizes)], 3)
    return folder


def _empty(path):
    path.write_bytes(bytes(10240))
    return ShardEntry(path.name, 0, 10240, sha256_file(path))


def contents(folder):
    """Every file's bytes, by its path in the folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a, b):
    """Whether two batches are equal."""
    assert a.keys() == b.keys()
    arrays = (torch.Tensor, np.ndarray)
    return all(np.array_equal(a[name], b[name]) if isinstance(a[name], arrays) else a[name] == b[name] for name in a)


def yaml_bomb(levels: int, ways: int) -> str:
    """Aliases of aliases: ``ways`` to the power of ``levels`` values."""
    lines = ["a0: &a0 [x, x]"]
    return "\n".join(lines + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * ways)}]" for n in range(1, levels)])


def _flux2():
    torch.manual_seed(0)
    kinds: dict[str, Any] = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes: dict[str, Any] = {
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }
    return AutoencoderKLFlux2(**kinds, **sizes, layers_per_block=1, latent_channels=4, sample_size=32).eval()


def _dc():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        f"{end}_{name}": value
        for end in ("encoder", "decoder")
        for name, value in {
            "block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
            "block_out_channels": [8, 8, 16],
            "layers_per_block": [1, 1, 1],
            "qkv_multiscales": [[], [], [5]],
        }.items()
    }
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, **sizes).eval()


def _tiny():
    torch.manual_seed(0)
    widths: dict[str, Any] = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()


# one of each class but AutoencoderKL, untrained
AUTOENCODERS = {"flux2": _flux2, "dc": _dc, "tiny": _tiny, "pixels": PixelAutoencoder}
