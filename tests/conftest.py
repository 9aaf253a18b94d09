"""Tiny real things that several tests need. Nothing here reaches for the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

import pytest
import torch

from ldm.data.shapes import generate
from ldm.data.writer import write_images
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.dit import DiT
from ldm.models.text import TextEncoder


@pytest.fixture(scope="session")
def minilm():
    """The packaged text encoder."""
    return TextEncoder.load("minilm")


@pytest.fixture
def tiny_autoencoder():
    """Two levels, pictures of 16 pixels, untrained, its posterior widened so that means and deviations both count."""
    torch.manual_seed(0)
    config = AutoencoderConfig(widths=[8, 16], norm_groups=4, layers_per_block=1, mid_attention=False, sample_size=16)
    return config.build().eval()


@pytest.fixture
def tiny_dit():
    """A DiT with random weights everywhere, so that every input matters to its output."""
    torch.manual_seed(0)
    return randomise(DiT(sample_size=8, width=32, num_layers=2, num_heads=2, text_width=16)).eval()


@pytest.fixture
def randomised():
    """The function that makes a fresh network so."""
    return randomise


def randomise(network):
    """Replace the zeros of a fresh network by random weights of its own scale."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) / max(parameter.shape[-1], 4) ** 0.5)
    return network


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory):
    """Ten captioned shapes of 32 pixels in three shards."""
    folder = tmp_path_factory.mktemp("shards") / "images"
    write_images(folder, "shapes", generate(10, 32, seed=0), samples_per_shard=4, extra={"image_size": 32})
    return folder
