"""The shipped recipes, run by ``fit`` with tiny overrides, one after another as in the README."""

from __future__ import annotations

import inspect
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline, PixArtTransformer2DModel
from PIL import Image
from torchvision.models import vgg16

from ldm.cli import main
from ldm.data.buckets import Buckets
from ldm.data.writer import write_images
from ldm.evaluation.features import load_feature_network
from ldm.files import read_json
from ldm.latents.export import export_latents
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.dit import DiT
from ldm.pipeline import load_pipeline
from ldm.runs.dry_run.memory import static_memory
from ldm.shapes.scenes import generate

CONFIGS = Path(__file__).parents[1] / "configs"


# run here with tiny networks, as are those that tools/bench/convergence.py compares
TRAINED_AUTOENCODERS = ("decoder_finetune", "kl_f16_8gpu", "kl_f4_cpu", "kl_f8_24gb", "kl_f8_8gb", "kl_f8_8gpu")
TRAINED_DENOISERS = ("dit_b_8gb", "dit_l_24gb", "dit_s_cpu", "dit_xl_8gpu")
FINE_TUNED = ("denoiser/pixart_finetune_24gb",)
# given after another recipe
TEXT = "denoiser/two_text_encoders"
# in tests/training
FEW = ("denoiser/few_images", "denoiser/lora_8gb", "shapes/embedding", "shapes/lora")
STAGES = (256, 512, 1024)  # each starts from the one before
# both stages: sizes of the images here, and options of the export between them, as in the recipe's header
BUCKETS = ["--captions", "all", "--buckets", "64", "--bucket-step", "8", "--max-aspect", "3", "--max-upscale", "2"]
EXAMPLES = {"shapes": ("40", []), "emoji": ("64", []), "clipart": ("64,88x48", BUCKETS)}
COMPARED = tuple(f"convergence/{name}" for name in ("ours", "dit", "minrf"))
# the same as another recipe but for the strategy, which is tested in tests/slow
SHARDED = ("autoencoder/kl_f8_fsdp", "denoiser/dit_xl_fsdp")


def test_every_recipe_is_tried_here() -> None:
    tried = [f"{stage}/{name}" for stage in EXAMPLES for name in ("autoencoder", "denoiser")]
    tried += ["shapes/pixels", "shapes/matcher", "matcher/images"]
    tried += [f"autoencoder/{name}" for name in TRAINED_AUTOENCODERS] + [f"denoiser/{name}" for name in TRAINED_DENOISERS]
    shipped = [str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")]
    tried += [f"stages/{side}" for side in STAGES]
    assert sorted(shipped) == sorted([*tried, *COMPARED, *SHARDED, *FINE_TUNED, TEXT, *FEW])


def keys(node: object, prefix: str = "") -> set[str]:
    """All keys of a config, with dots between those of nested mappings."""
    if not isinstance(node, dict):
        return {prefix}
    return set().union(*(keys(value, f"{prefix}.{name}" if prefix else name) for name, value in node.items()))


@pytest.mark.parametrize("recipe", SHARDED)
def test_the_sharded_recipes_differ_from_others_in_the_strategy_alone(recipe: str, capsys: pytest.CaptureFixture) -> None:
    stage = recipe.split("/")[0]
    siblings = [path for path in (CONFIGS / stage).glob("*.yaml") if f"{stage}/{path.stem}" not in SHARDED]
    known = set().union(*(keys(yaml.safe_load(path.read_text())) for path in siblings))
    config = CONFIGS / f"{recipe}.yaml"
    assert keys(yaml.safe_load(config.read_text())) - known == {"trainer.strategy"}
    main([stage, "fit", "--config", str(config), "--out", "run", "--print_config"])
    assert "strategy: fsdp" in capsys.readouterr().out


@pytest.mark.parametrize("recipes", EXAMPLES)
def test_both_stages_from_the_shipped_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: str) -> None:
    monkeypatch.chdir(tmp_path)
    size, export_options = EXAMPLES[recipes]
    main(["shards", "shapes", "shards", "--count", "24", "--size", size])
    data = ["--data.train", "shards", "--data.validation", "shards", "--data.batch_size", "4", "--data.validation_samples", "4"]
    few = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
    config = str(CONFIGS / recipes / "autoencoder.yaml")
    main(["autoencoder", "fit", "--config", config, "--out", "runs/ae", *data, *few, *timetable(2, 1, 2)])
    assert AutoencoderKL.from_pretrained("runs/ae/autoencoder").config["latent_channels"] == 4
    # max_steps counts batches though two optimisers step
    state = torch.load("runs/ae/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 6
    assert sorted(path.name for path in Path("runs/ae/previews").iterdir()) == [f"step-0000000{step}.png" for step in (0, 3, 6)]
    main(["autoencoder", "export", "runs/ae", "again-ae"])
    assert all(Path("again-ae", path.name).read_bytes() == path.read_bytes() for path in Path("runs/ae/autoencoder").iterdir())

    export = ["latents", "export", "--autoencoder", "runs/ae/autoencoder", "--shards", "shards", "--out", "latents"]
    main([*export, *export_options])
    extra = json.loads(Path("latents/manifest.json").read_text())
    assert extra["samples"] == 24 and len(extra["latents_mean"]) == 4

    latents = ["--data.train", "latents", "--data.validation", "latents", *data[4:], "--model.preview_steps", "2"]
    config = str(CONFIGS / recipes / "denoiser.yaml")
    model = ["--model.autoencoder", "runs/ae/autoencoder"]
    main(["denoiser", "fit", "--config", config, "--out", "runs/dit", *latents, *few, *model])
    pipeline = DiffusionPipeline.from_pretrained("runs/dit/pipeline")
    assert pipeline.vae.config["latents_mean"] == extra["latents_mean"]
    main(["denoiser", "export", "runs/dit", "again-pipeline"])
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert Path("again-pipeline", weights).read_bytes() == Path("runs/dit/pipeline", weights).read_bytes()

    for out in ("images", "again"):
        main(["sample", "runs/dit/pipeline", "a red ring", "a blue star", "--out", out, "--steps", "2", "--seed", "5"])
    images, again = ({path.name: path.read_bytes() for path in Path(out).glob("*.png")} for out in ("images", "again"))
    assert len(images) == 3 and images == again

    if recipes == "shapes":
        config, steps = str(CONFIGS / "shapes" / "matcher.yaml"), [*data[4:], *few]
        main(["matcher", "fit", "--config", config, "--out", "runs/matcher", *latents[:4], *steps, *model])
        main(["matcher", "export", "runs/matcher", "again-matcher"])
        first, again = (load_feature_network(path) for path in ("runs/matcher/matcher", "again-matcher"))
        assert first.hash == again.hash and first.takes_texts
        sizes = {"in_channels": "3", "sample_size": "40", "patch_size": "8", "width": "32"}
        network = [text for name, value in sizes.items() for text in (f"--model.matcher.init_args.{name}", value)]
        config, online = str(CONFIGS / "matcher" / "images.yaml"), ["--model.online", "true", "--model.autoencoder", "identity"]
        main(["matcher", "fit", "--config", config, "--out", "runs/own", *data, *few, *network, *online, "--data.workers", "0"])
        # without an autoencoder
        main(["latents", "export", "--autoencoder", "identity", "--shards", "shards", "--out", "pixels"])
        latents[1], latents[3] = "pixels", "pixels"
        main(["denoiser", "fit", "--config", str(CONFIGS / "shapes/pixels.yaml"), "--out", "runs/pixels", *latents, *few])
        assert DiffusionPipeline.from_pretrained("runs/pixels/pipeline").vae_scale_factor == 1


@pytest.mark.parametrize("file", sorted((CONFIGS / "cluster").iterdir()), ids=lambda file: file.name)
def test_the_files_for_clusters_are_shell_and_resume(file: Path) -> None:
    assert subprocess.run(["bash", "-n", file], capture_output=True).stderr == b""
    assert file.read_text().rstrip().endswith("--resume latest")


def timetable(start: int, warmup: int, ramp: int) -> list[str]:
    """Of the adversarial loss, in steps."""
    steps = {"start": start, "discriminator_warmup": warmup, "generator_ramp": ramp}
    return [text for name, value in steps.items() for text in (f"--model.adversary.{name}", str(value))]


def tiny_arguments(config: str, size: int, widths: str = "") -> list[str]:
    """A recipe of stage one with small images, networks and few steps, neither compiled nor in bf16."""
    data = ["--data.train", "shards", "--data.validation", "shards", "--data.batch_size", "4", "--data.validation_samples", "2"]
    arguments = ["autoencoder", "fit", "--config", str(CONFIGS / "autoencoder" / config), *data]
    arguments += ["--data.workers", "0", "--trainer.devices", "1"]
    arguments += ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--data.image_size", str(size)]
    arguments += [*timetable(0, 0, 1), "--model.compile", "false", "--trainer.precision", "32-true"]
    if widths:
        arguments += ["--model.autoencoder.block_out_channels", widths, "--model.autoencoder.norm_num_groups", "4"]
        arguments += ["--model.autoencoder.sample_size", str(size)]
    return [*arguments, "--model.adversary.discriminator.init_args.width", "8"]


@pytest.mark.parametrize(
    ("config", "widths", "factor"),
    [("kl_f8_8gb", "[8, 8, 8, 8]", 8), ("kl_f8_24gb", "[8, 8, 8, 8]", 8), ("kl_f16_8gpu", "[8, 8, 8, 8, 8]", 16),
     ("kl_f4_cpu", "[8, 8, 8]", 4)],
)  # fmt: skip
def test_recipes_for_your_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, widths: str, factor: int
) -> None:
    """One of the autoencoders is then fine-tuned: its decoder alone, on windows of larger images, validated on whole ones."""
    monkeypatch.chdir(tmp_path)
    main(["shards", "shapes", "shards", "--count", "8", "--size", "80"])
    random = ["--model.perceptual.init_args.weights", "random"]
    main([*tiny_arguments(f"{config}.yaml", 64, widths), *random, "--out", "run"])
    trained = AutoencoderKL.from_pretrained("run/autoencoder")
    assert 2 ** (len(trained.config["block_out_channels"]) - 1) == factor
    if config == "kl_f4_cpu":
        arguments = [*tiny_arguments("decoder_finetune.yaml", 32), "--model.autoencoder.init_from", "run/autoencoder"]
        main([*arguments, *random, "--out", "finer"])
        finer = AutoencoderKL.from_pretrained("finer/autoencoder")
        assert finer.config["latents_mean"] == trained.config["latents_mean"]
        for name, before in trained.state_dict().items():
            assert torch.equal(before, finer.state_dict()[name]) or not name.startswith(("encoder.", "quant_conv."))
        assert not torch.equal(trained.decoder.conv_out.weight, finer.decoder.conv_out.weight)
        assert "run/autoencoder" not in Path("finer/autoencoder/config.json").read_text()
        assert Image.open("finer/previews/step-00000003.png").width > 2 * 80  # whole images


def test_a_recipe_names_the_weights_that_it_lacks_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It needs the pretrained trunk of LPIPS; without a network, the error is one line with the two alternatives."""

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.chdir(tmp_path)
    main(["shards", "shapes", "shards", "--count", "4", "--size", "64"])
    with pytest.raises(SystemExit) as left:
        main([*tiny_arguments("kl_f8_8gpu.yaml", 64, "[8, 8, 8, 8]"), "--out", "run"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2 and "path" in said and "'random'" in said


# width, blocks and heads of Peebles & Xie 2022, table 1
PRESETS = {"dit_s": (384, 12, 6), "dit_b": (768, 12, 12), "dit_l": (1024, 24, 16), "dit_xl": (1152, 28, 16)}
DENOISERS = (*TRAINED_DENOISERS, "dit_xl_fsdp")


@pytest.mark.parametrize("name", ["kl_f8_8gb", "kl_f8_24gb", "kl_f8_8gpu", "kl_f16_8gpu"])
def test_the_memory_noted_with_stage_one(name: str) -> None:
    recipe = (CONFIGS / "autoencoder" / f"{name}.yaml").read_text()
    model = yaml.safe_load(recipe)["model"]
    with torch.device("meta"):
        autoencoder = AutoencoderConfig(**model["autoencoder"]).build()
        discriminator = PatchDiscriminator(**model["adversary"]["discriminator"]["init_args"])
        trunk = vgg16(weights=None).features
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (autoencoder, discriminator, trunk)]
    kept = static_memory(sizes[0] + sizes[1], frozen=sizes[2], averaged=sizes[0])
    said = " ".join(recipe.replace("# ", " ").split())
    assert f": {kept.total / 1e9:.1f} GB kept" in said and f"{sizes[0] / 1e6:.0f}M parameters" in said


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer."""
    return inputs * outputs + outputs


@pytest.mark.parametrize("name", DENOISERS)
def test_the_denoisers_have_the_sizes_of_the_paper(name: str) -> None:
    recipe = (CONFIGS / "denoiser" / f"{name}.yaml").read_text()
    arguments = yaml.safe_load(recipe)["model"]["denoiser"]["init_args"]
    with torch.device("meta"):
        denoiser = DiT(**arguments)
    config = denoiser.config
    width, blocks, heads = PRESETS[name.rsplit("_", 1)[0]]
    assert [config[key] for key in ("width", "num_layers", "num_attention_heads", "patch_size")] == [width, blocks, heads, 2]
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    said = " ".join(recipe.replace("# ", " ").split())
    assert f"{count / 1e6:.1f}M parameters" in said
    kept = static_memory(count, averaged=count, shards=8 if "fsdp" in name else 1)
    assert f": {kept.total / 1e9:.1f} GB kept" in said

    text = config["caption_channels"]
    head_norms, text_norm, table = 4 * width // heads, 2 * width, 6 * width
    block = 8 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width) + head_norms + text_norm + table
    time = linear(256, width) + linear(width, width) + 8 * linear(width, width)  # 6 to modulate the blocks, 2 the output
    words = 2 * 2 * text + 2 * linear(text, width) + linear(width, width)
    assert count == blocks * block + time + words + linear(4 * 4, width) + linear(width, 4 * 4)


def tiny_denoiser(train: str, validation: str, autoencoder: str, of_dit: bool = True) -> list[str]:
    """Options for a recipe of stage two: a tiny network and two steps on latents of 4 x 4, neither compiled nor in bf16."""
    tiny = {"sample_size": 4, "width": 16, "num_layers": 2, "num_attention_heads": 2} if of_dit else {}
    arguments = [text for name, value in tiny.items() for text in (f"--model.denoiser.init_args.{name}", str(value))]
    arguments += ["--data.train", train, "--data.validation", validation, "--model.autoencoder", autoencoder]
    arguments += ["--data.batch_size", "4", "--data.validation_samples", "4", "--data.workers", "0", "--model.compile", "false"]
    arguments += ["--trainer.devices", "1", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    return [*arguments, "--model.accumulate", "2", "--trainer.precision", "32-true", "--model.preview_steps", "1"]


@pytest.fixture(scope="module")
def tiny_latents(image_shards: Path, tiny_text_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds an untrained f8 autoencoder and latents of 4 x 4."""
    folder = tmp_path_factory.mktemp("latents")
    AutoencoderConfig([8, 8, 8, 8], 4, 1, 4, False, 32).build().save_pretrained(folder / "autoencoder")
    export_latents(folder / "autoencoder", image_shards, folder / "latents", tiny_text_encoder)
    return folder


def tiny_pixart(**sizes: Any) -> PixArtTransformer2DModel:
    """PixArt-XL-2-256's architecture in small, or in the ``sizes`` given, with its learned variance."""
    tiny: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 2}
    tiny |= {"sample_size": 4, "caption_channels": 8, "interpolation_scale": 1}
    return PixArtTransformer2DModel(**tiny | sizes)


def test_the_memory_noted_with_pixart() -> None:
    recipe = (CONFIGS / "denoiser/pixart_finetune_24gb.yaml").read_text()
    with torch.device("meta"):
        published = tiny_pixart(
            num_attention_heads=16, attention_head_dim=72, cross_attention_dim=1152, num_layers=28, caption_channels=4096
        )
    count = sum(parameter.numel() for parameter in published.parameters())
    kept = static_memory(count, eight_bit=count)
    said = " ".join(recipe.replace("# ", " ").split())
    assert f"{count / 1e6:.0f}M weights" in said and f": {kept.total / 1e9:.1f} GB kept" in said


@pytest.mark.parametrize("recipe", [*(f"denoiser/{name}" for name in TRAINED_DENOISERS), *COMPARED, *FINE_TUNED])
def test_the_denoisers_train(tiny_latents: Path, tmp_path: Path, recipe: str) -> None:
    arguments = ["denoiser", "fit", "--config", str(CONFIGS / f"{recipe}.yaml"), "--out", str(tmp_path / "run")]
    if recipe in FINE_TUNED:
        tiny_pixart().save_pretrained(tmp_path / "pixart" / "transformer")
        arguments += ["--model.init_from", str(tmp_path / "pixart"), "--model.optimiser.eight_bit", "false"]
    else:
        arguments += ["--model.denoiser.init_args.caption_channels", "8"]
    latents, autoencoder = (str(tiny_latents / name) for name in ("latents", "autoencoder"))
    main([*arguments, *tiny_denoiser(latents, latents, autoencoder, recipe not in FINE_TUNED)])
    assert DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").transformer.config["num_layers"] == 2


def test_two_text_encoders_and_captions_by_weight_from_a_table_on(
    tiny_latents: Path, tiny_text_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the recipe's header, with a tiny encoder and MiniLM."""
    monkeypatch.chdir(tmp_path)
    rows = ["file,short,long"]
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(f"{number}.png")
        rows.append(f"{number}.png,shape {number}," + (f"a longer text on shape {number}" if number % 2 else ""))
    Path("captions.csv").write_text("\n".join(rows))
    main(["shards", "pack", ".", "shards", "--captions", "captions.csv", "--caption-names", "short,long"])
    autoencoder = str(tiny_latents / "autoencoder")
    export = ["latents", "export", "--autoencoder", autoencoder, "--shards", "shards", "--out", "latents"]
    encoders = [f"{{name: {tiny_text_encoder}, layer: -2}}", "{name: minilm, max_tokens: 12}"]
    main([*export, "--captions", "short", "long", "--text-encoder", *encoders])
    assert json.loads(Path("latents/manifest.json").read_text())["caption_names"] == ["short", "long"]
    recipes = [text for name in ("denoiser/dit_s_cpu", TEXT) for text in ("--config", str(CONFIGS / f"{name}.yaml"))]
    arguments = ["denoiser", "fit", *recipes, "--out", "run", *tiny_denoiser("latents", "latents", autoencoder)]
    main([*arguments, "--model.denoiser.init_args.caption_channels", "[8, 384]"])
    pipeline = load_pipeline("run/pipeline")
    assert [encoder.settings or encoder.max_tokens for encoder in pipeline.text_encoders] == [64, 12]
    assert pipeline.transformer.config["pooled_text"] == ["last", "none"]


def test_stages_of_rising_resolution(tiny_latents: Path, tiny_text_encoder: str, tmp_path: Path) -> None:
    """Each at an eighth of its side, on images of three shapes."""
    autoencoder, images = str(tiny_latents / "autoencoder"), generate(9, [(240, 160), 176, (160, 240)], seed=0)
    write_images(tmp_path / "shards", "shapes", images)
    tiny = {"sample_size": 4, "width": 16, "num_layers": 2, "num_attention_heads": 2, "caption_channels": 8}
    source = [text for name, value in tiny.items() for text in (f"--model.denoiser.init_args.{name}", str(value))]
    for side in STAGES:
        latents, run = str(tmp_path / f"latents-{side}"), tmp_path / str(side)
        export_latents(autoencoder, tmp_path / "shards", latents, tiny_text_encoder, buckets=Buckets((side // 8,), 16))
        arguments = ["--config", str(CONFIGS / f"stages/{side}.yaml"), "--out", str(run), *source]
        arguments += ["--data.train", latents, "--data.validation", latents, "--model.autoencoder", autoencoder]
        arguments += ["--data.batch_size", "1", "--data.workers", "0", "--model.compile", "false", "--model.accumulate", "1"]
        arguments += ["--trainer.devices", "1", "--trainer.precision", "32-true", "--model.preview_steps", "1"]
        main(["denoiser", "fit", *arguments, "--trainer.max_steps", "4", "--trainer.val_check_interval", "4"])
        source = ["--model.init_from", str(run)]
        trained, config = load_pipeline(run / "pipeline"), read_json(run / "pipeline/transformer/config.json", dict)
        assert config["sample_size"] == 4 and config["micro_conditioning"]
        assert (side // 8, side // 8) in trained.trained_sizes and len(trained.trained_sizes) == 3


@pytest.mark.parametrize("file", sorted((CONFIGS / "stages").iterdir()), ids=lambda file: file.stem)
def test_the_stages_have_the_network_and_the_memory_that_they_say(file: Path) -> None:
    first = yaml.safe_load((CONFIGS / "stages/256.yaml").read_text())["model"]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DiT(**first["denoiser"]["init_args"]).parameters())
    said, model = " ".join(file.read_text().replace("# ", " ").split()), yaml.safe_load(file.read_text())["model"]
    assert f": {static_memory(count, averaged=count).total / 1e9:.1f} GB kept" in said
    assert f"{count / 1e6:.1f}M parameters" in said or file.stem != "256"
    for part in ("path", "prediction", "timesteps"):
        assert model[part] == first[part]


def test_recipes_that_are_compared_differ_in_nothing_else() -> None:
    recipes = [yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text()) for recipe in COMPARED]
    shipped = yaml.safe_load((CONFIGS / "shapes" / "denoiser.yaml").read_text())["model"]
    ours = recipes[0]["model"]
    for part in ("path", "prediction", "timesteps", "ema_decay", "optimiser"):
        assert ours[part] == shipped[part]
    network = ours["denoiser"]["init_args"]
    sizes = ("in_channels", "sample_size", "patch_size", "width", "num_layers", "num_attention_heads", "caption_channels")
    defaults = {name: parameter.default for name, parameter in inspect.signature(DiT).parameters.items()}
    expected = defaults | shipped["denoiser"]["init_args"]
    assert all(value == expected[name] for name, value in network.items() if name not in sizes)
    for recipe in recipes:
        other = recipe["model"]
        assert {name: other["denoiser"]["init_args"][name] for name in sizes} == {name: network[name] for name in sizes}
        assert (recipe["data"], recipe["trainer"], other["ema_decay"]) == (
            recipes[0]["data"], recipes[0]["trainer"], ours["ema_decay"]
        )  # fmt: skip
