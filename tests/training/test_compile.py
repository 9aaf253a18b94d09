"""Compiled training, in the order of a run: what is compiled runs compiled in previews, training and validation, by one graph
for each size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.data.writer import write_images
from ldm.errors import UsageError
from ldm.losses.adversarial import GradientPenalty
from ldm.losses.equivariance import Equivariance
from ldm.models.compiling import compile_blocks
from ldm.models.dit import AdaLN, DiT, transformer_blocks
from ldm.shapes.scenes import generate
from ldm.training.adapters import Adapter, AdapterConfig
from ldm.training.autoencoder import PREVIEW_IMAGES, AutoencoderTraining
from ldm.training.base import TrainingModule
from tests.tiny import make_trainer
from tests.training import test_autoencoder as stage_one
from tests.training import test_denoiser as stage_two


class Graphs:
    """A backend of ``torch.compile`` that counts the graphs and their runs, and computes them as they are."""

    def __init__(self) -> None:
        self.made = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def run(*arguments: Tensor) -> Any:
            self.ran += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Of the modules that are compiled from here on; one that cannot be traced whole, as one graph, fails."""
    counted, compiled = Graphs(), nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **options: compiled(module, backend=counted, fullgraph=True, **options)
    )
    torch.compiler.reset()
    yield counted
    torch.compiler.reset()


class Previews(Callback):
    """Generates previews as the command does: before the first step and after each validation."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        with pl_module.average_applied():
            pl_module.preview()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.preview()  # the average is applied


@pytest.mark.parametrize("adaln", ["single", "zero"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_stage_two(latents: tuple[Path, Path], tmp_path: Path, graphs: Graphs, adaln: AdaLN, precision: str) -> None:
    """Captions of all lengths share a graph, and so do all blocks; the last layers have another."""
    sizes: dict[str, Any] = {"sample_size": 16, "patch_size": 4, "width": 32, "num_attention_heads": 2, "caption_channels": 8}
    module, calls = stage_two.make(latents[0], denoiser=DiT(num_layers=3, adaln=adaln, **sizes), compile=True), []
    module.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    stage_two.fit(
        module, latents[1], tmp_path, 6, {"batch_size": 7, "validation_samples": 10},
        precision=precision, callbacks=[Previews()],
    )  # fmt: skip
    assert len(calls) == 3 + 6 + 2 + 3  # preview, training, validation, preview
    assert graphs.ran == (3 + 1) * len(calls)  # the blocks and the last layers
    assert graphs.made == 2 * 4  # previews, training, validation, its last batch


@pytest.mark.parametrize(
    "kind",
    [{}, {"method": "dora"}, {"method": "lokr"}, {"method": "loha"}, {"init": "pissa", "base_precision": "bf16"}],
    ids=str,
)
def test_blocks_with_an_adapter(kind: dict[str, Any], graphs: Graphs, tiny_dit: DiT) -> None:
    adapter = Adapter(AdapterConfig(rank=2, **kind), tiny_dit.train(), "tiny")
    adapter.store_base()
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16), torch.tensor([3.0, 500.0])
    expected = tiny_dit(*inputs).sample
    compile_blocks(tiny_dit, transformer_blocks(tiny_dit), True, torch.device("cpu"))
    for _ in range(2):
        found = tiny_dit(*inputs).sample
        found.square().mean().backward()
        torch.testing.assert_close(found, expected)
    assert graphs.made == 3  # the first block's input needs no gradient; the last layers have another


def test_stage_two_of_three_sizes(latents: tuple[Path, Path], three_sizes: Path, tmp_path: Path, graphs: Graphs) -> None:
    """Each number of tokens has one graph in training and one in validation: that of 5 x 3 is the one of 3 x 5."""
    sizes: dict[str, Any] = {"sample_size": 16, "patch_size": 4, "width": 32, "num_attention_heads": 2, "caption_channels": 8}
    module = stage_two.make(latents[0], denoiser=DiT(num_layers=2, positions="sincos_rope", **sizes), compile=True)
    stage_two.fit(module, three_sizes, tmp_path, 27, {"batch_size": 1}, callbacks=[Previews()])
    assert graphs.made == 2 * (1 + 2 + 2)  # previews, training, validation; of the blocks, and of the last layers


def fit_stage_one(module: AutoencoderTraining, shards: Path, folder: Path, steps: int) -> None:
    torch.manual_seed(1)
    trainer = make_trainer(folder, steps, val_check_interval=steps, precision="bf16-mixed", callbacks=[Previews()])
    trainer.fit(module, ShardDataModule(str(shards), str(shards), batch_size=4, validation_samples=6))


def test_stage_one(image_shards: Path, tmp_path: Path, graphs: Graphs) -> None:
    """The gradient penalty, which takes second derivatives, is not compiled."""
    adversary = stage_one.adversary(0, 0, 1, gradient_penalty=GradientPenalty(1.0, 2))
    fit_stage_one(stage_one.make(adversary=adversary, compile=True), image_shards, tmp_path, 4)
    # the encoder's levels, middle and last norm, and the decoder's; the two middles share graphs
    parts, previews, training, validation = 8, 2 * PREVIEW_IMAGES, 4, 2
    lpips, generator, discriminator = training + validation, training - 1, 2 * training
    assert graphs.ran == parts * (previews + training + validation) + lpips + generator + discriminator
    # previews, training, validation, its last batch; LPIPS is in no preview, and the discriminator in training alone
    assert graphs.made == (parts - 1) * 4 + 3 + 2


def test_stage_one_of_ever_new_sizes(tmp_path: Path, graphs: Graphs) -> None:
    """Where images are scaled at random, all sizes share a graph."""
    write_images(tmp_path / "shards", "shapes", generate(6, 48, seed=0))
    module, sizes = stage_one.make(equivariance=Equivariance(1.0), compile=True), set()
    module.autoencoder.decoder.conv_in.register_forward_pre_hook(lambda _, given: sizes.add(given[0].shape))
    fit_stage_one(module, tmp_path / "shards", tmp_path, 8)
    assert len(sizes) >= 3 + 4  # previews, validation and its last batch, and several in training
    # the encoder's four phases and the decoder's three, LPIPS' two and the discriminator; three more where two sizes that
    # were equal by chance, as batch and channels, differ
    assert graphs.made <= 4 * 4 + 4 * 3 + 2 + 1 + 3


def test_cuda_graphs_need_a_gpu(latents: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CUDA graphs do not run on the device cpu; compile without them"):
        stage_two.fit(stage_two.make(latents[0], compile="cuda_graphs"), latents[1], tmp_path, 1)


def test_cuda_graphs_begin_anew_at_each_call_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next block reads what a block returns, and later calls overwrite it."""
    begun, options = [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(nn.Module, "compile", lambda module, **given: options.append(given["mode"]))
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compile_blocks(network, network, "cuda_graphs", torch.device("cuda"))
    network(network(torch.zeros(1, 2)))
    assert len(begun) == 2 and options == ["reduce-overhead"] * 2
