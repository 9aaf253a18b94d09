"""A run resumes under DDP, FSDP or on one process from a checkpoint of another: the same state, and the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.models.adapter_file import ADAPTER_NAME
from ldm.models.dit import DiT
from ldm.runs.checkpoints.files import load_checkpoint
from ldm.runs.checkpoints.sharded import read_sharded
from ldm.runs.layout import RunFolder, checkpoint_name
from tests.tiny import TinyRuns

from .test_exact_resume import assert_equal, leaves
from .test_many_processes import assert_close, assert_same_metrics, weights
from .warm import DDP, run

FSDP = ["--trainer.devices", "2", "--trainer.strategy", "fsdp"]
STATE = ("state_dict", "optimizer_states", "average", "lr_schedulers", "skipped", "seed", "global_step")


def state(path: Path) -> dict[str, Any]:
    """The training state of a checkpoint of either kind."""
    checkpoint = read_sharded(path) if path.is_dir() else load_checkpoint(path)
    return dict(leaves({name: checkpoint[name] for name in STATE}))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_ddp_then_fsdp_then_one_process(tiny_runs: TinyRuns, tmp_path: Path, stage: str) -> None:
    options = ["--trainer.precision", "32-true", "--checkpoints.every_steps", "1", "--checkpoints.keep_last", "9"]
    if stage == "denoiser":
        options += ["--model.power_averages.sigma_rel", "[0.1]", "--model.freeze", "['text_embed.*', 'blocks.0.*']"]

    def train(out: Path, how: list[str], steps: int, *more: str, status: int = 0) -> Path:
        """The checkpoint of the last step."""
        processes = 2 if how else 1
        batch = ["--data.batch_size", str(4 // processes)]
        command = tiny_runs.command(
            stage, out, *options, *batch, *how, "--resume", "latest", *more, steps=steps, validate_every=5
        )
        # into a new folder each time: an existing export is refused
        ended, said = run([*command, "--export", f"{tmp_path}/{out.name}-{steps}-{len(more)}"], tmp_path, processes)
        assert ended == status, said
        return RunFolder(out).checkpoints_folder / checkpoint_name(steps)

    out, save = tmp_path / "run", ["--trainer.callbacks+=tests.slow.injected.SaveAtStart"]
    before = state(train(out, DDP, 3))
    again = RunFolder(out).checkpoints_folder / checkpoint_name(3)
    train(out, FSDP, 5, *save, status=7)
    assert again.is_dir()
    assert_equal(state(again), before)
    kill = ["--trainer.callbacks+=tests.slow.injected.SignalAt", "--trainer.callbacks.init_args.steps=[4]"]
    train(out, FSDP, 5, *kill, status=-9)  # FSDP resumes from FSDP, too
    sharded = train(out, FSDP, 5)
    assert sharded.is_dir()
    before, random = state(sharded), load_checkpoint(sharded)["random"]
    train(out, [], 7, *save, status=7)
    assert sharded.is_file()
    assert_equal(state(sharded), before)
    train(out, [], 7)

    whole = train(tmp_path / "whole", DDP, 7)
    at_five = load_checkpoint(whole.with_name(checkpoint_name(5)))["random"]
    assert_equal(dict(leaves(random)), dict(leaves(at_five)))
    # training under FSDP is that under DDP: the exported weights and all metrics, of validation at step 5 too
    mine, theirs = (weights(tmp_path / f"{name}-7-0", stage) for name in ("run", "whole"))
    if stage == "denoiser":
        first = weights(tmp_path / "run-3-0", stage)
        still = {name for name, weight in first.items() if torch.equal(weight, mine[name])}
        assert still == {name for name in first if name.startswith(("text_embed.", "blocks.0."))}
    assert_close(mine, theirs, 1e-4)
    assert_same_metrics(out, tmp_path / "whole", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_fsdp_in_bf16_trains_as_ddp_in_bf16(tiny_runs: TinyRuns, tmp_path: Path, stage: str, randomised: Any) -> None:
    """Every metric but for what bf16 rounds, of validation and of generated images too, although those are generated outside of
    Lightning's autocast; and a preview is made.

    Stage two starts from weights whose loss is another than that of random ones.
    """
    start = []
    if stage == "denoiser":
        sizes: dict[str, Any] = {"sample_size": 16, "width": 16, "num_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        randomised(DiT(**sizes, caption_channels=8, positions="sincos_rope")).save_pretrained(tmp_path / "start")
        start = ["--model.init_from", f"{tmp_path}/start", *tiny_runs.evaluation()]
    for name, how in (("ddp", DDP), ("fsdp", FSDP)):
        options = ["--trainer.precision", "bf16-mixed", "--data.batch_size", "2", *how, *start]
        status, said = run(tiny_runs.command(stage, tmp_path / name, *options), tmp_path, 2)
        assert status == 0, said
        assert [*(tmp_path / name / "previews").iterdir()]
    assert_same_metrics(tmp_path / "fsdp", tmp_path / "ddp", 0.02, evaluation=0.2)


@pytest.mark.slow
def test_an_adapter_is_the_same_however_it_is_trained(tiny_runs: TinyRuns, tmp_path: Path, randomised: Any) -> None:
    """Also one that begins along the gradient; under FSDP the frozen base is sharded, too."""
    sizes: dict[str, Any] = {"sample_size": 16, "width": 16, "num_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    randomised(DiT(**sizes, caption_channels=8, positions="sincos_rope")).save_pretrained(tmp_path / "start")
    adapter = ["--model.adapter.rank", "2", "--model.adapter.init", "lora_ga", "--model.init_from", f"{tmp_path}/start"]
    files = {}
    for name, how in (("one", []), ("ddp", DDP), ("fsdp", FSDP)):
        processes = 2 if how else 1
        options = ["--trainer.precision", "32-true", "--data.batch_size", str(4 // processes), *how, *adapter]
        status, said = run(tiny_runs.command("denoiser", tmp_path / name, *options), tmp_path, processes)
        assert status == 0, said
        files[name] = load_file(tmp_path / name / "adapter" / ADAPTER_NAME)
    assert_close(files["ddp"], files["one"], 1e-4)
    assert_close(files["fsdp"], files["one"], 1e-4)
