"""Low-rank adapters: what they begin with, what a run keeps and exports, and what pipelines make of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.cli import dispatch
from ldm.errors import UsageError
from ldm.models.adapters import AdapterFile, add_to, base_hash
from ldm.training.adapters import Adapter, AdapterConfig
from tests.tiny import write_config

KINDS = {
    "lora": {"rank": 4},
    "rslora, pissa": {"rank": 4, "rank_stabilised": True, "init": "pissa"},
    "dora": {"rank": 4, "method": "dora"},
    "orthogonal": {"rank": 4, "init": "orthogonal", "alpha": 8.0},
    "gaussian": {"rank": 2, "init": "gaussian", "target_modules": ["to_q", "blocks.*.feed_forward.0", "patch_embed"]},
}


def fit(folder: Path, latents: tuple[Path, Path], steps: int, *options: str, **model: Any) -> Path:
    trainer = {"max_steps": steps, "val_check_interval": 4, "log_every_n_steps": 1}
    folder.mkdir(exist_ok=True)
    config = write_config(folder / "config.yaml", latents, trainer, **model)
    dispatch(["denoiser", "fit", "--config", str(config), "--out", str(folder / "run"), *options])
    return folder / "run"


@pytest.fixture(scope="module")
def base(latents: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("base"), latents, 4) / "pipeline"


def tune(folder: Path, latents: tuple[Path, Path], base: Path, kind: dict[str, Any], *options: str, steps: int = 8) -> Path:
    prompts = {"preview_prompts": ["a ring"], "preview_steps": 2}
    return fit(folder, latents, steps, *options, denoiser=None, init_from=str(base), adapter=kind, **prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_and_the_file_gives_what_was_trained(kind: str, tiny_dit: Any, tmp_path: Path) -> None:
    from ldm.models.adapters import write_adapter

    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.rand(2)
    before, plain = tiny_dit(*inputs).sample, {name: weight.clone() for name, weight in tiny_dit.state_dict().items()}
    config = AdapterConfig(**KINDS[kind])
    adapter = Adapter(config, tiny_dit, "tiny")
    torch.testing.assert_close(tiny_dit(*inputs).sample, before, rtol=1e-6, atol=1e-6 * float(before.abs().max()))
    trained = [parameter for parameter in tiny_dit.parameters() if parameter.requires_grad]
    tiny_dit(*inputs).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = tiny_dit(*inputs).sample
    assert (after - before).abs().max() > 0.01
    with adapter.disabled():
        assert torch.equal(tiny_dit(*inputs).sample, before)
    for folder in ("once", "twice"):
        write_adapter(tmp_path / folder, *adapter.exported(), adapter.record({}))
    once, twice = ((tmp_path / folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in ("once", "twice"))
    assert once == twice

    other = type(tiny_dit)(**{k: v for k, v in tiny_dit.config.items() if not k.startswith("_")}).eval()
    other.load_state_dict(plain)
    file = AdapterFile.read(tmp_path / "once")
    file.require_fits(other)
    add_to(other, file, "own")
    close = {"rtol": 1e-5, "atol": 1e-5 * float(after.abs().max())}
    torch.testing.assert_close(other(*inputs).sample, after, **close)
    assert base_hash(other) == base_hash(tiny_dit)
    other.fuse_lora()
    other.unload_lora()
    torch.testing.assert_close(other(*inputs).sample, after, **close)
    with pytest.raises(UsageError, match="was trained on tiny"):
        file.require_fits(other)
    file.require_fits(other, force=True)


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_keeps_the_adapter_alone_and_resumes_exactly(base: Path, latents: tuple[Path, Path], tmp_path: Path) -> None:
    kind = {"rank": 2, "init": "pissa", "dropout": 0.1}
    whole = tune(tmp_path / "whole", latents, base, kind)
    half = tune(tmp_path / "half", latents, base, kind, steps=4)
    (half / "adapter").rename(tmp_path / "first")
    config = json.loads((tmp_path / "half" / "config.yaml").read_text())
    config["trainer"]["max_steps"] = 8
    (tmp_path / "half" / "config.yaml").write_text(json.dumps(config))
    dispatch(["denoiser", "fit", "--config", str(tmp_path / "half" / "config.yaml"), "--out", str(half), "--resume", "latest"])
    names = ["adapter/pytorch_lora_weights.safetensors"]
    assert [(whole / name).read_bytes() for name in names] == [(half / name).read_bytes() for name in names]
    for one, other in zip(state(whole)["state_dict"].items(), state(half)["state_dict"].items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    kept = state(whole)
    assert all(".lora_" in name for name in kept["state_dict"])
    assert len(kept["average"]["shadow_params"]) == 2 * 20  # of A and B, and not of the base
    dispatch(["denoiser", "export", str(whole), str(tmp_path / "again")])
    assert (tmp_path / "again" / "pytorch_lora_weights.safetensors").read_bytes() == (whole / names[0]).read_bytes()
