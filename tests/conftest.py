"""Tiny models and data that several tests share. Nothing here uses the network."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported
# Before torch is imported, and for every process that a test starts: tiny models gain nothing from threads, which slow
# down processes that run beside one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from string import ascii_lowercase, digits

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

from ldm.cli import main
from ldm.data.buckets import Buckets
from ldm.data.writer import write_images
from ldm.diffusion.path import RectifiedFlow
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.scheduler import diffusion_config, make_scheduler, samplers_for
from ldm.latents.export import export_latents
from ldm.models.autoencoder import AutoencoderConfig, set_latent_statistics
from ldm.models.dit import DiT
from ldm.models.text_encoder import TextEncoder, minilm_folder
from ldm.pipeline import LatentDiffusionPipeline
from ldm.shapes.scenes import generate
from tests.tiny import SIZE, TinyRuns


@pytest.fixture(scope="session")
def minilm():
    """The packaged text encoder."""
    return TextEncoder.load("minilm")


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory):
    """Directory of a text encoder of width 8 with a token per letter, for tests that need no particular one."""
    folder = tmp_path_factory.mktemp("text")
    letters = [*ascii_lowercase, *digits]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokens), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_autoencoder():
    """Untrained, two levels, for images of 16 pixels."""
    return build_autoencoder(seed=0)


def build_autoencoder(seed):
    torch.manual_seed(seed)
    config = AutoencoderConfig(
        block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=1, mid_block_add_attention=False, sample_size=16
    )
    return config.build().eval()


@pytest.fixture
def tiny_dit():
    """A DiT with random weights everywhere, so that its output depends on every input."""
    torch.manual_seed(0)
    return randomise(DiT(sample_size=8, width=32, num_layers=2, num_attention_heads=2, caption_channels=16)).eval()


@pytest.fixture
def randomised():
    """The function that does the same to any network."""
    return randomise


def randomise(network):
    """Add random weights of their usual scale, so that no weight of a new network stays zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) / max(parameter.shape[-1], 4) ** 0.5)
    return network


@pytest.fixture
def restored_signals():
    """A run that was asked to stop ignores signals while its process ends; here other tests follow."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def short_words():
    """A random text encoder of width 32 that takes 24 tokens of MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokenizer.model_max_length = 24
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return TextEncoder(tokenizer, BertModel(config).eval(), "short")


@pytest.fixture(scope="session")
def make_pipeline(minilm):
    """Makes pipelines for images of 16 pixels, random everywhere but in their words."""

    def make(path=None, prediction=None, sampler=None, words=minilm, seed=0, sample_size=8):
        path, prediction = path or RectifiedFlow(), prediction or Velocity()
        autoencoder = build_autoencoder(seed)
        set_latent_statistics(autoencoder, [0.1, -0.1, 0.0, 0.2], [0.5, 0.6, 0.7, 0.8])
        dit = DiT(sample_size=sample_size, width=32, num_layers=2, num_attention_heads=2, caption_channels=words.width)
        with torch.no_grad():  # small steps away from zero keep the images unsaturated
            for parameter in dit.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        scheduler = make_scheduler(sampler or samplers_for(path, prediction)[0], path, prediction)
        parts = (autoencoder, words.model, words.tokenizer, dit.eval(), scheduler)
        made = LatentDiffusionPipeline(*parts, diffusion=diffusion_config(path, prediction))
        made.set_progress_bar_config(disable=True)
        return made

    return make


@pytest.fixture
def pipeline(make_pipeline):
    """A pipeline for one test, which may change it."""
    return make_pipeline()


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory):
    """Ten captioned shapes of 32 pixels in three shards."""
    folder = tmp_path_factory.mktemp("shards") / "images"
    write_images(folder, "shapes", generate(10, 32, seed=0), samples_per_shard=4, extra={"image_size": 32})
    return folder


@pytest.fixture(scope="session")
def latents(image_shards, tiny_text_encoder, tmp_path_factory) -> tuple[Path, Path]:
    """An untrained autoencoder and the latents made with it: (16, 16) each, of ten shapes, their texts of width 8."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    AutoencoderConfig([8, 16], 4, 1, 4, False, 32).build().save_pretrained(folder / "autoencoder")
    export_latents(folder / "autoencoder", image_shards, folder / "latents", tiny_text_encoder)
    return folder / "autoencoder", folder / "latents"


@pytest.fixture(scope="session")
def three_sizes(latents, tiny_text_encoder, tmp_path_factory) -> Path:
    """Latents by the same autoencoder of nine shapes: 4 of (20, 12), 3 of (16, 16) and 2 of (12, 20)."""
    folder, sizes = tmp_path_factory.mktemp("three"), [(48, 32), 32, (32, 48), (48, 32), 32, (48, 32), 32, (32, 48), (48, 32)]
    write_images(folder / "shards", "shapes", generate(9, sizes, seed=0))
    export_latents(latents[0], folder / "shards", folder / "latents", tiny_text_encoder, buckets=Buckets((32,), 8, 2.0))
    return folder / "latents"


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, tiny_text_encoder: str) -> TinyRuns:
    folder = tmp_path_factory.mktemp("tiny")
    images = generate(24, SIZE, seed=0)
    write_images(folder / "shards", "shapes", images, samples_per_shard=10, extra={"image_size": SIZE})
    AutoencoderConfig([8, 16], 4, 1, 4, False, SIZE).build().save_pretrained(folder / "autoencoder")
    export = ["latents", "export", "--autoencoder", f"{folder}/autoencoder", "--shards", f"{folder}/shards"]
    main([*export, "--out", f"{folder}/latents", "--text-encoder", tiny_text_encoder])
    return TinyRuns(folder)
