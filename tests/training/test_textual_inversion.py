"""Textual inversion: one word's embedding is trained, resumed, exported, and read by diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.cli import dispatch
from ldm.errors import UsageError
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import load_pipeline
from ldm.runs.layout import RunFolder
from tests.data.test_image_folder import images
from tests.tiny import ROOT, write_config


@pytest.fixture
def base(latents: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base").mkdir()
    config = write_config(tmp_path / "base/config.yaml", latents, {"max_steps": 20, "val_check_interval": 20})
    dispatch(["denoiser", "fit", "--config", str(config), "--out", str(tmp_path / "base/run")])
    return tmp_path / "base/run/pipeline"


def test_a_word_is_trained_resumed_and_read_by_diffusers(
    base: Path, latents: tuple[Path, Path], tiny_text_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.runs.callbacks.peak_flops", lambda *_: 1e12)  # as on a GPU
    photos = images(tmp_path / "photos", 5, 32)
    model: dict[str, Any] = {
        "token": "<sks>", "initial": "a", "vectors": 2, "denoiser": None, "init_from": str(base), "online": True,
        "text_encoder": tiny_text_encoder, "preview_prompts": ["a <sks>"], "preview_steps": 2, "ema_decay": 0.5,
        "optimiser": {"learning_rate": 0.1},
    }  # fmt: skip

    def run(name: str, steps: int, *options: str, **changes: Any) -> dict[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        trainer = {"max_steps": steps, "val_check_interval": steps}
        config = write_config(tmp_path / name / "config.yaml", (latents[0], photos), trainer, **model | changes)
        few = ["--data.default_caption", "a photo of <sks>", "--data.image_size", "32", *options]
        recipes = ["--config", str(ROOT / "configs/shapes/embedding.yaml"), "--config", str(config)]
        dispatch(["embedding", "fit", *recipes, "--out", str(tmp_path / name / "run"), *few])
        return torch.load(RunFolder(tmp_path / name / "run").last_checkpoint, weights_only=True)

    whole, _ = run("whole", 6, "--trainer.log_every_n_steps", "2"), run("parts", 3)
    assert "time/mfu" in (tmp_path / "whole/run/logs/metrics.csv").read_text()
    shutil.rmtree(tmp_path / "parts/run/embedding")
    resumed = run("parts", 6, "--resume", "latest")
    assert whole["state_dict"].keys() == {"embedding.vectors"} and whole["state_dict"]["embedding.vectors"].shape == (2, 8)
    assert torch.equal(whole["state_dict"]["embedding.vectors"], resumed["state_dict"]["embedding.vectors"])
    file = tmp_path / "whole/run/embedding/learned_embeds.safetensors"
    (learned,) = load_file(file).values()
    assert load_file(file).keys() == {"<sks>"} and learned.shape == (2, 8)
    assert torch.equal(learned, whole["average"]["shadow_params"][0])
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["ldm"])["text_encoder"] == TextEncoder.load(tiny_text_encoder).hash
    dispatch(["embedding", "export", str(tmp_path / "whole/run"), str(tmp_path / "again")])
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()

    # of the text encoder that diffusers puts it into, and of no other word, the embedding changes
    pipeline, plain = load_pipeline(base), load_pipeline(base)
    pipeline.load_textual_inversion(str(file.parent))
    (tokens,) = pipeline.tokenize(["a <sks>"])
    assert len(tokens[0]) == 2 + 1 + 2  # with those that begin and end a text
    assert torch.equal(pipeline._embed_all(["a ring"]).embeddings, plain._embed_all(["a ring"]).embeddings)
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[tokens[0][2:4]], learned)
    dispatch(["embedding", "merge", str(base), str(file), str(tmp_path / "merged")])
    merged = load_pipeline(tmp_path / "merged")
    prompts = ["a <sks>", "a <SKS> ring"]
    assert torch.equal(merged._embed_all(prompts).embeddings, pipeline._embed_all(prompts).embeddings)
    dispatch(["sample", str(tmp_path / "merged"), "a <sks>", "--out", str(tmp_path / "images"), "--steps", "1"])
    with pytest.raises(UsageError, match="the text encoder knows <sks> already; add it once"):
        merged.load_textual_inversion(str(file))
    save_file({"<x>": learned}, tmp_path / "other.safetensors", {"ldm": '{"text_encoder": "0123"}'})
    save_file({"<x>": learned[:, :4].contiguous()}, tmp_path / "narrow.safetensors")
    save_file({"clip_l": learned, "clip_g": learned.clone()}, tmp_path / "two.safetensors")
    save_file({"<x>": learned * torch.nan}, tmp_path / "nan.safetensors")
    save_file({"<x>": learned[None]}, tmp_path / "deep.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"emb_params": learned.half()}, tmp_path / "old.safetensors")  # as A1111 has it
    for name, said in {
        "other": "was learned for the text encoder 0123, and that of the pipeline is",
        "narrow": "has vectors of 4 numbers, and the text encoder's have 8",
        "two": r"holds 2 tensors \(clip_g, clip_l\), and a token has one",
        "nan": "not finite",
        "deep": r"holds a tensor \(1, 2, 8\)",
        "text": "cannot be read",
        "nowhere": "is no file of a token",
    }.items():
        with pytest.raises(UsageError, match=said):
            dispatch(["embedding", "merge", str(base), str(tmp_path / f"{name}.safetensors"), str(tmp_path / "refused")])
    merged.load_textual_inversion(tmp_path / "old.safetensors")
    assert len(merged.tokenize(["old"])[0][0]) == 2 + 2
    merged.unload_textual_inversion()
    assert merged.tokenize(prompts) == pipeline.tokenize(prompts)

    # a file is given beside the model, of one image of several; as A1111's it is the same
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": learned}, "name": "<sks>", "step": 3}
    torch.save(a1111, tmp_path / "a1111.pt")

    def pixels(*arguments: Any) -> list[bytes]:
        out = tmp_path / f"out{len([*tmp_path.glob('out*')])}"
        dispatch(["sample", *map(str, arguments), "--steps", "2", "--out", str(out)])
        return [Image.open(path).tobytes() for path in sorted(out.glob("0*.png"))]

    (wanted,) = pixels(tmp_path / "merged", "a <sks> ring")
    (without,) = pixels(base, "a <sks> ring")
    assert wanted != without
    lines: list[Any] = [
        {"prompt": "a <sks> ring", "seed": 0},
        {"prompt": "a <sks> ring", "seed": 0, "embedding": [str(tmp_path / "a1111.pt")]},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[0]])))
    assert pixels(base, "--prompts", tmp_path / "prompts.jsonl") == [without, wanted, without]
    assert pixels(base, "a <sks> ring", "--embedding", file) == [wanted]
    (image,) = sorted((tmp_path / "out3").glob("0*.png"))
    assert pixels(base, "--from-image", image, "--embedding", file.parent) == [wanted]
    for options, said in (
        ([], "give the files of these tokens again"),
        (["--embedding", tmp_path / "old.safetensors"], "again"),
    ):
        with pytest.raises(UsageError, match=said):
            pixels(base, "--from-image", image, *options)
    with pytest.raises(UsageError, match="twice"):
        pixels(base, "a <sks>", "--embedding", file, "--embedding", file)
    with pytest.raises(UsageError, match="knows <sks> already"):
        pixels(base, "a <sks>", "--embedding", file, "--embedding", tmp_path / "a1111.pt")
    start = plain.text_encoder.get_input_embeddings().weight[plain.tokenize(["a"])[0][0][1]]
    assert (learned - start).abs().min(1).values.max() > 0  # both vectors have moved from the initial word

    for options, changes, said in (
        ([], {"token": "sks"}, "the token is 'sks'; give one in angle brackets"),
        ([], {"token": "<dog>"}, "no caption of .*photos holds <dog>"),
        ([], {"initial": "abc"}, "the initial words 'abc' are 3 tokens"),
        ([], {"init_from": None, "denoiser": json.loads((tmp_path / "base/config.yaml").read_text())["model"]["denoiser"]},
         "give init_from, and set online"),
        ([], {"text_encoder": "minilm"}, "caption_channels"),
        ([], {"init_from": str(tmp_path / "whole/run")}, "trained a token's embedding, not a denoiser"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            run("refused", 1, *options, **changes)
        assert not (tmp_path / "refused/run").exists()
