"""The precision of fp32 on GPUs: what is asked for holds for convolutions too, and what is stored as fp32 never is TF32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.backends.cudnn
from torch import Tensor

from ldm.latents import decode, image_encoder, samples
from ldm.latents.check import compare
from ldm.latents.decode import decode_latent_shards
from ldm.latents.export import export_latents
from ldm.machine import set_fp32_precision
from ldm.models.autoencoder import load_autoencoder
from ldm.models.text_encoder import TextEncoder
from ldm.training import encoders
from ldm.training.encoders import FrozenEncoders


def precision() -> tuple[str, bool]:
    """Of products; whether convolutions are TF32."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


FULL, TF32 = ("highest", False), ("high", True)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    products, convolutions = precision()
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.mark.parametrize("asked, expected", [("highest", FULL), ("high", TF32), ("medium", ("medium", True))])
def test_convolutions_have_the_precision_of_products(asked: str, expected: tuple[str, bool]) -> None:
    set_fp32_precision(asked)
    assert precision() == expected
    # torch's newer settings, which its kernels read, follow
    found = [torch._C._get_fp32_precision_getter("cuda", operation) for operation in ("matmul", "conv")]
    assert [kind == "tf32" for kind in found] == [expected[1]] * 2


def test_latents_are_encoded_and_decoded_in_full_fp32(
    image_shards: Path, latents: tuple[Path, Path], tiny_text_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process whose fp32 is TF32 otherwise: an export, its decoding, its check, and encoding of training images."""
    seen: list[tuple[str, bool]] = []

    def recording(module: object, name: str) -> None:
        function = getattr(module, name)

        def recorded(*arguments: object) -> object:
            seen.append(precision())
            return function(*arguments)

        monkeypatch.setattr(module, name, recorded)

    def assert_full(what: str) -> None:
        assert {*seen} == {FULL}, what
        assert precision() == TF32
        seen.clear()

    autoencoder, out = latents[0], tmp_path / "latents"
    recording(image_encoder, "encode")
    recording(samples, "decode")
    recording(decode, "decode")
    recording(encoders, "encode")
    set_fp32_precision("high")
    export_latents(autoencoder, image_shards, out, tiny_text_encoder)
    assert_full("export")
    decode_latent_shards(out, tmp_path / "decoded", autoencoder)
    assert_full("decode")
    compare(out, autoencoder)
    assert_full("check")
    online = FrozenEncoders(load_autoencoder(autoencoder), TextEncoder.load(tiny_text_encoder), (4, 8, 8), "")
    images: Tensor = torch.from_numpy(np.zeros((1, 3, 16, 16), np.uint8))
    online.encode({"image": images, "caption": ["a ring"]})
    assert_full("online")
