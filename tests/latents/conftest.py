"""What several tests of latents share: an autoencoder, an export, and a manifest that needs neither."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from ldm.data.manifest import Manifest, relative_path
from ldm.latents.export import export_latents
from ldm.models.autoencoder import AutoencoderConfig
from tests.samples import INFO


@pytest.fixture(scope="session")
def autoencoder_once(tmp_path_factory):
    """Its folder; the posterior is wide and uneven, so that the standard deviations matter."""
    torch.manual_seed(0)
    network = AutoencoderConfig(
        block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=1, mid_block_add_attention=False, sample_size=16
    ).build()
    quant_conv = network.quant_conv
    assert quant_conv is not None and quant_conv.bias is not None
    with torch.no_grad():
        quant_conv.weight[4:] = quant_conv.weight[:4] / 2
        quant_conv.bias[4:] = torch.tensor([-1.0, 0.0, -2.0, -0.5])
    folder = tmp_path_factory.mktemp("autoencoder")
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def autoencoder(autoencoder_once, tmp_path):
    """A copy, which a test may change."""
    return shutil.copytree(autoencoder_once, tmp_path / "autoencoder")


@pytest.fixture(scope="session")
def exported_once(autoencoder_once, tiny_text_encoder, image_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    export_latents(autoencoder_once, image_shards, folder, tiny_text_encoder, flip=True)
    return folder


@pytest.fixture
def exported(exported_once, image_shards, tmp_path):
    """Ten latents of images and of their mirror images in three shards."""
    folder = shutil.copytree(exported_once, tmp_path / "latents")
    manifest = Manifest.load(folder)
    replace(manifest, extra=manifest.extra | {"source_shards": relative_path(image_shards, folder)}).save(folder)
    return folder


@pytest.fixture
def make_info():
    """The function that makes a :class:`LatentInfo` without an export."""
    return partial(replace, INFO, text_encoders=(), latent_shapes=((4, 4, 4),), flips=False, dtype="float16")
