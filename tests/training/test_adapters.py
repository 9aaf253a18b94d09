"""Low-rank adapters: what they begin with, what a run keeps and exports, and what pipelines make of the file."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ldm.cli import dispatch, main
from ldm.errors import LdmError, UsageError
from ldm.inference.metadata import read_png
from ldm.models.adapter_file import AdapterFile, add_to, write_adapter
from ldm.models.adapters import base_hash
from ldm.models.dit import DiT
from ldm.pipeline import load_pipeline
from ldm.training.adapters import GAMMA, Adapter, AdapterConfig
from tests.tiny import ROOT, write_config

KINDS = {
    "lora": {"rank": 4},
    "rslora, pissa": {"rank": 4, "rank_stabilised": True, "init": "pissa"},
    "dora": {"rank": 4, "method": "dora"},
    "orthogonal": {"rank": 4, "init": "orthogonal", "alpha": 8.0},
    "gaussian": {"rank": 2, "init": "gaussian", "target_modules": ["to_q", "blocks.*.feed_forward.0", "patch_embed"]},
    "lokr": {"rank": 2, "method": "lokr", "alpha": 4.0},
    "lokr of few rows": {"rank": 2, "method": "lokr", "lokr_factor": 2},
    "loha": {"rank": 4, "method": "loha", "alpha": 2.0},
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


def tune(
    folder: Path, latents: tuple[Path, Path], base: Path, kind: dict[str, Any], *options: str, steps: int, **model: Any
) -> Path:
    prompts = {"preview_prompts": ["a ring"], "preview_steps": 2}
    return fit(folder, latents, steps, *options, denoiser=None, init_from=str(base), adapter=kind, **prompts | model)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_and_the_file_gives_what_was_trained(kind: str, tiny_dit: Any, tmp_path: Path) -> None:
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
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5 * float(after.abs().max())}
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


def trained_file(run_folder: Path) -> Path:
    return run_folder / "adapter" / "pytorch_lora_weights.safetensors"


def whole_as_resumed(folder: Path, latents: tuple[Path, Path], base: Path, kind: dict[str, Any], **model: Any) -> Path:
    """A run of four steps, whose file is that of one, in ``half``, that was resumed after two."""
    whole = tune(folder / "whole", latents, base, kind, steps=4, **model)
    half = tune(folder / "half", latents, base, kind, steps=2, **model)
    shutil.rmtree(half / "adapter")
    config = json.loads((folder / "half" / "config.yaml").read_text())
    config["trainer"]["max_steps"] = 4
    (folder / "half" / "config.yaml").write_text(json.dumps(config))
    dispatch(["denoiser", "fit", "--config", str(folder / "half" / "config.yaml"), "--out", str(half), "--resume", "latest"])
    assert trained_file(whole).read_bytes() == trained_file(half).read_bytes()
    return whole


@pytest.mark.parametrize("kind", ["dora", "orthogonal", "gaussian", "lokr", "loha"])
def test_other_kinds_resume_exactly(kind: str, base: Path, latents: tuple[Path, Path], tmp_path: Path) -> None:
    whole_as_resumed(tmp_path, latents, base, KINDS[kind])


def test_a_run_keeps_the_adapter_alone_and_resumes_exactly(base: Path, latents: tuple[Path, Path], tmp_path: Path) -> None:
    kind = {"rank": 2, "init": "pissa", "dropout": 0.1}
    whole = whole_as_resumed(tmp_path, latents, base, kind)
    kept, half = state(whole), state(tmp_path / "half" / "run")
    for one, other in zip(kept["state_dict"].items(), half["state_dict"].items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    assert all(".lora_" in name for name in kept["state_dict"])
    assert len(kept["average"]["shadow_params"]) == 2 * 20  # of A and B, and not of the base
    dispatch(["denoiser", "export", str(whole), str(tmp_path / "again")])
    assert (tmp_path / "again" / "pytorch_lora_weights.safetensors").read_bytes() == trained_file(whole).read_bytes()


@pytest.mark.parametrize("method", ["lora", "lokr"])
def test_a_base_in_bf16_trains_the_same_bits_under_mixed_precision(
    method: str, base: Path, latents: tuple[Path, Path], tmp_path: Path
) -> None:
    trained = []
    for precision in (None, "bf16"):
        kind = {"rank": 2, "method": method, "base_precision": precision}
        out = tune(tmp_path / str(precision), latents, base, kind, "--trainer.precision", "bf16-mixed", steps=2)
        trained.append(load_file(trained_file(out)))
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_base_in_fewer_bytes_resumes_exactly(
    precision: str, base: Path, latents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In fp32 arithmetic: previews, export and checkpoints are as without, and the memory that is counted is less."""
    if precision == "int8":
        pytest.importorskip("torchao")
    kind = {"rank": 2, "init": "lora_ga", "base_precision": precision}
    whole_as_resumed(tmp_path, latents, base, kind)
    config, counted = tmp_path / "half" / "config.yaml", []
    for options in ([], ["--model.adapter.base_precision", "null"]):
        said = run(capsys, "denoiser", "fit", "--config", config, "--out", tmp_path / "dry", "--dry-run", *options)
        counted.append(float(next(re.finditer(r"weights ([\d.]+) kB", said))[1]))
    assert counted[0] < counted[1]


def test_lora_ga_begins_along_the_gradient_and_resumes_exactly(base: Path, latents: tuple[Path, Path], tmp_path: Path) -> None:
    """The base's output stays as it was, and the file restores what it began with; LoRA+ has a rate for B."""
    kind = {"rank": 2, "init": "lora_ga", "loraplus_lr_ratio": 8.0}
    optimiser = {"learning_rate": 1e-3, "warmup_steps": 0}
    whole = whole_as_resumed(tmp_path, latents, base, kind, optimiser=optimiser)
    weights = state(whole)["state_dict"]
    start = {name: weight for name, weight in weights.items() if ".start." in name}
    a, b = (weight for name, weight in start.items() if "blocks.0.attention.to_q" in name)
    identity = torch.eye(2) * len(b) ** 0.5 / GAMMA
    torch.testing.assert_close(a @ a.T, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(b.T @ b, identity, rtol=0, atol=1e-5)
    groups = state(whole)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == [1e-3, 8e-3] and [len(group["params"]) for group in groups] == [20, 20]
    again = ["denoiser", "fit", "--config", str(tmp_path / "half" / "config.yaml"), "--out", str(tmp_path / "half" / "run")]
    longer = ["--resume", "latest", "--trainer.max_steps", "6"]
    with pytest.raises(UsageError, match=r"another loraplus_lr_ratio: give --model.adapter.loraplus_lr_ratio 8"):
        dispatch([*again, *longer, "--model.adapter.loraplus_lr_ratio", "null"])
    muon = ["--model.adapter.loraplus_lr_ratio", "null", "--model.optimiser.muon_learning_rate", "0.01"]
    with pytest.raises(UsageError, match=r"without Muon: give --model.optimiser.muon_learning_rate null"):
        dispatch([*again, *longer, *muon])
    with pytest.raises(UsageError, match="loraplus_lr_ratio is of AdamW's rates"):
        tune(tmp_path / "muon", latents, base, kind, steps=1, optimiser=optimiser | {"muon_learning_rate": 1e-3})


@pytest.fixture(scope="module")
def tuned(base: Path, latents: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the recipe that ships."""
    out, (autoencoder, data) = tmp_path_factory.mktemp("tuned") / "run", map(str, latents)
    sizes = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--data.batch_size", "4"]
    places = ["--data.train", data, "--data.validation", data, "--model.autoencoder", autoencoder]
    own = ["--model.adapter.rank", "2", "--model.adapter.alpha", "64", "--model.adapter.trigger_words", "[sks ring]"]
    own += ["--model.optimiser.learning_rate", "0.01", "--model.optimiser.warmup_steps", "0"]
    machine = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.preview_prompts", "[a ring]"]
    recipe = ["--config", str(ROOT / "configs/denoiser/lora_8gb.yaml"), "--model.init_from", str(base)]
    dispatch(["denoiser", "fit", *recipe, "--out", str(out), *sizes, *places, *own, *machine])
    return out / "adapter"


def test_its_card_says_how_to_use_it(base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "dog"
    dispatch(["denoiser", "export", str(tuned.parent), str(out), "--model-card", "--license", "mit"])
    card = ModelCard.load(out / "README.md")
    assert "Trigger words: sks ring." in card.text and "| the base pipeline |" in card.text
    (command,) = re.findall(r"```bash\nldm sample (.*?)\n```", card.text)
    assert command.startswith("pipeline 'a ring' --lora .") and card.data.to_dict()["instance_prompt"] == "sks ring"
    monkeypatch.chdir(out)
    Path("pipeline").symlink_to(base)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(code, {})
    main(["sample", *shlex.split(command), "--device", "cpu"])
    with Image.open("image.png") as one, Image.open(next(Path("images").glob("0*.png"))) as other:
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1 and Path("samples.png").exists()


def generate(pipeline: Any) -> Tensor:
    return pipeline("a ring", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_a_pipeline_takes_adapters_as_in_diffusers(base: Path, tuned: Path) -> None:
    pipeline = load_pipeline(base, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    plain = generate(pipeline)
    pipeline.load_lora_weights(tuned, adapter_name="a")
    adapted = generate(pipeline)
    assert (adapted - plain).abs().max() > 1e-3
    pipeline.load_lora_weights(str(tuned / "pytorch_lora_weights.safetensors"), adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.75, 0.25])
    torch.testing.assert_close(generate(pipeline), adapted, rtol=0, atol=1e-5)
    pipeline.set_adapters("a")
    pipeline.fuse_lora()
    torch.testing.assert_close(generate(pipeline), adapted, rtol=0, atol=1e-5)
    pipeline.unfuse_lora()
    with pytest.raises(UsageError, match="called a already"):
        pipeline.load_lora_weights(tuned, adapter_name="a")
    pipeline.unload_lora_weights()
    torch.testing.assert_close(generate(pipeline), plain, rtol=0, atol=1e-5)
    pipeline.load_lora_weights(load_file(tuned / "pytorch_lora_weights.safetensors"), "tensors")  # whose scale is then 1


def test_the_file_says_what_it_is_of(tuned: Path) -> None:
    with safe_open(tuned / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "2" and metadata["ss_network_alpha"] == "64.0" and metadata["ss_steps"] == "4"
    assert metadata["modelspec.trigger_phrase"] == "sks ring" and json.loads(metadata["ldm"])["base"]["name"] == "pipeline"
    assert AdapterFile.read(tuned).trigger_words == ["sks ring"]
    assert (tuned / "lineage.json").exists()


def sample(*arguments: Any) -> list[bytes]:
    *given, out = map(str, arguments)
    main(["sample", *given, "--steps", "2", "--device", "cpu", "--out", out])
    return [path.read_bytes() for path in sorted(Path(out).glob("[0-9]*.png"))]


def test_sample_takes_adapters_and_repeats_their_images(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = sample(base, "a ring", "--lora", f"{tuned}=0.5", tmp_path / "with")
    assert made != sample(base, "a ring", tmp_path / "without")
    image = next((tmp_path / "with").glob("0*.png"))
    settings, _ = read_png(image)
    ((file, weight),) = settings.adapters()
    assert file.startswith("sha256:") and weight == 0.5
    assert sample(base, "--from-image", image, "--lora", tuned, tmp_path / "again") == made
    lines = [{"prompt": "a ring", "lora": [f"{tuned}=0.5"]}, {"prompt": "a ring", "seed": 0}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    mixed = sample(base, "--prompts", tmp_path / "prompts.jsonl", tmp_path / "mixed")
    assert mixed == made + sample(base, "a ring", tmp_path / "plain")
    for wrong, said in (
        (["--from-image", image], "give the files of these adapters again"),
        (["a ring", "--lora", str(base)], "holds 0 .safetensors files"),
        (["a ring", "--lora", str(tuned), "--lora", f"{tuned}=0.1"], "twice"),
    ):
        with pytest.raises(SystemExit):
            sample(base, *wrong, tmp_path / "wrong")
        assert said in capsys.readouterr().err


def run(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    main([*map(str, arguments)])
    return capsys.readouterr().out


def test_merged_resized_and_extracted_adapters(base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the commands; a merged model is a model like any other, and everything says what it is of."""
    run(capsys, "adapter", "merge", base, f"{tuned}=0.5", f"{tuned}=0.25", tmp_path / "merged")
    run(capsys, "adapter", "extract", tmp_path / "merged", base, tmp_path / "extracted", "--rank", 4)
    assert run(capsys, "adapter", "resize", tmp_path / "extracted", tmp_path / "resized", "--rank", 2).startswith(
        "rank 2, with 100.00%"
    )
    pipeline, images = load_pipeline(base, "cpu"), []
    for adapter, weight in ((tuned, 0.75), (tmp_path / "extracted", 1.0), (tmp_path / "resized", 1.0)):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(adapter, adapter.name)
        pipeline.set_adapters(adapter.name, weight)
        images.append(generate(pipeline))
        pipeline.unload_lora_weights()
    merged = load_pipeline(tmp_path / "merged", "cpu")
    merged.set_progress_bar_config(disable=True)
    for other in images:
        torch.testing.assert_close(generate(merged), other, rtol=0, atol=1e-5)
    shown = json.loads(run(capsys, "adapter", "show", tmp_path / "resized", "--json"))
    assert shown["rank"] == [2] and shown["base"]["name"] == "pipeline" and shown["training"]["resized_from"]["rank"] == 4
    assert "sks ring" in run(capsys, "adapter", "show", tuned)
    tree = json.loads(run(capsys, "trace", tmp_path / "merged", "--search", tuned.parent, "--json", "-"))
    found = {node["name"]: node["state"] for node in tree["children"] if node["kind"] == "adapter"}
    assert tree["state"] == "checked" and found == {str(tuned): "checked"}


def test_a_merge_refuses_what_it_cannot_do(
    base: Path, tuned: Path, latents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(capsys, "adapter", "merge", base, tuned, tmp_path / "merged")
    for wrong, said in (
        ([tmp_path / "merged", tuned], "was trained on pipeline"),
        ([base, f"{tuned}=nan"], "finite"),
        ([tuned.parent, tuned], "adapter"),
    ):
        with pytest.raises(SystemExit):
            run(capsys, "adapter", "merge", *wrong, tmp_path / "out")
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
    run(capsys, "adapter", "merge", tmp_path / "merged", tuned, tmp_path / "out", "--force")
    with pytest.raises(SystemExit):
        sample(tmp_path / "merged", "a ring", "--lora", tuned, tmp_path / "refused")
    assert "was trained on pipeline" in capsys.readouterr().err
    assert sample(tmp_path / "merged", "a ring", "--lora", tuned, "--force", tmp_path / "forced")


@pytest.mark.parametrize("method", ["lora", "lokr", "loha"])
def test_an_adapter_of_pixart_serves_the_stock_network(
    method: str, latents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By peft, and merged. The published weights also predict a variance, which is not trained."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 16}
    base = tmp_path / "pixart" / "transformer"
    PixArtTransformer2DModel(**sizes, caption_channels=8, sample_size=16).save_pretrained(base)
    diffusion = {
        "path": {"class_path": "ldm.diffusion.path.VariancePreserving", "init_args": {"schedule": "linear"}},
        "prediction": {"class_path": "ldm.diffusion.prediction.Epsilon"},
    }
    run_folder = tune(tmp_path / "tuned", latents, base.parent, {"rank": 2, "method": method}, steps=2, **diffusion)
    adapted = peft.PeftModel.from_pretrained(
        PixArtTransformer2DModel.from_pretrained(base), str(run_folder / "adapter" / "peft")
    )
    run(capsys, "adapter", "merge", base.parent, run_folder / "adapter", tmp_path / "merged")
    merged: Any = PixArtTransformer2DModel.from_pretrained(tmp_path / "merged" / "transformer")
    inputs = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 8), torch.tensor([5, 500])
    with torch.no_grad():
        found, plain = adapted(*inputs).sample, PixArtTransformer2DModel.from_pretrained(base)(*inputs).sample
        torch.testing.assert_close(merged(*inputs).sample, found, rtol=1e-5, atol=1e-6)
    assert (found - plain).abs().max() > 1e-5 and found.shape[1] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": {"rank": 64}}, "give at most 32"),
        ({"adapter": {"target_modules": ["to_kv"]}}, "to_kv matches no layer; give names such as to_v, to_k"),
        ({"adapter": {"rank": 3, "init": "orthogonal"}}, "give an even one"),
        ({"adapter": {"rank": 17, "init": "lora_ga"}}, "give at most 16"),
        ({"adapter": {"loraplus_lr_ratio": 0}}, "loraplus_lr_ratio is 0; give a number above 0"),
        ({"adapter": {"method": "dora", "init": "pissa"}}, "not of dora"),
        ({"adapter": {"init": "pissa", "target_modules": ["patch_embed"], "rank": 2}}, "patch_embed is a convolution"),
        ({"adapter": {"method": "lokr", "dropout": 0.1}}, "dropout is of the methods lora and dora"),
        ({"adapter": {"method": "loha", "init": "pissa"}}, "init pissa is of the methods lora and dora"),
        ({"adapter": {"method": "lora", "lokr_factor": 4}}, "with lokr"),
        ({"adapter": {"method": "dora", "base_precision": "int8"}}, "int8 is not of dora"),
        ({"adapter": {"method": "loha", "target_modules": ["patch_embed"], "rank": 2}}, "method loha is for linear layers"),
        ({"adapter": {}, "freeze": ["blocks.0.*"]}, "freeze cannot be used with an adapter"),
        ({"adapter": {}, "init_from": None}, "give that model as init_from"),
        ({"adapter": {}, "prediction": {"class_path": "ldm.diffusion.prediction.X0"}}, "give the same path, prediction"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    options: dict[str, Any], said: str, base: Path, latents: tuple[Path, Path], tmp_path: Path
) -> None:
    network = {} if options.get("init_from", "") is None else {"denoiser": None}
    with pytest.raises(LdmError, match=said):
        fit(tmp_path / "wrong", latents, 1, **network | {"init_from": str(base)} | options)
    assert not (tmp_path / "wrong" / "run").exists()


def test_adapters_of_two_kinds_are_not_used_together(
    tuned: Path, base: Path, latents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tune(tmp_path, latents, base, {"rank": 2, "method": "lokr"}, steps=1) / "adapter"
    pipeline = load_pipeline(base, "cpu")
    pipeline.load_lora_weights(tuned)
    with pytest.raises(UsageError, match="of LoKr, which cannot be used beside an adapter of LORA"):
        pipeline.load_lora_weights(other)
    run(capsys, "adapter", "merge", base, other, tmp_path / "merged")
    load_pipeline(tmp_path / "merged", "cpu").load_lora_weights(tuned, force=True)
    assert "LoKr" in run(capsys, "adapter", "show", other)
    with pytest.raises(UsageError, match="only LoRA can be resized"):
        dispatch(["adapter", "resize", str(other), str(tmp_path / "small"), "--rank", "1"])


def test_dora_of_rows_without_a_direction_is_refused(tiny_dit: Any) -> None:
    with torch.no_grad():
        tiny_dit.blocks[0].text_attention.to_out.weight[3] = 0
    with pytest.raises(UsageError, match=r"blocks.0.text_attention.to_out has rows of zeros"):
        Adapter(AdapterConfig(method="dora"), tiny_dit, "tiny")


def test_adapters_of_other_models_and_broken_files_are_refused(tuned: Path, base: Path, tmp_path: Path) -> None:
    pipeline, file = load_pipeline(base, "cpu"), tuned / "pytorch_lora_weights.safetensors"
    whole = load_file(file)
    first = next(iter(whole))
    other = DiT(sample_size=16, patch_size=4, width=16, num_layers=1, num_attention_heads=2, caption_channels=8)
    with pytest.raises(UsageError, match=r"of \(32, 32\), which is \(16, 16\) in this model"):
        AdapterFile.read(tuned).require_fits(other)
    for number, (content, said) in enumerate(
        [
            (file.read_bytes()[:900], "cannot be read as an adapter"),
            (save({"transformer.blocks.0.attention.to_q.weight": torch.zeros(1)}), "no weight of a denoiser's adapter"),
            (save({"transformer.blocks.0.attention.to_q.lora_A.weight": torch.zeros(2, 32)}), "do not fit|not hold matrices"),
            (save(whole | {first: whole[first] * torch.nan}), "holds numbers that are not finite"),
            (save(whole | {first: whole[first].int()}), "holds integers"),
            (save({"x": torch.zeros(1)}), "no weight of a denoiser's adapter"),
            (
                save({"transformer.blocks.0.attention.to_q.lokr_w1": torch.zeros(2, 2)}),
                "does not say how its matrices are scaled",
            ),
            (save({f"transformer.x.{name}": torch.zeros(2, 2) for name in ("lokr_w1", "lora_A.weight")}), "another method"),
            (save(dict(load_file(file)), {"ldm": "{"}), "its metadata"),
            (save(dict(load_file(file)), {"lora_adapter_metadata": '{"transformer.lora_alpha": "8"}'}), "lora_alpha"),
        ]
    ):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
        with pytest.raises(LdmError, match=said):
            pipeline.load_lora_weights(tmp_path / f"{number}.safetensors")
