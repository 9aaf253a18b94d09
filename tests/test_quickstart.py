"""A miniature quickstart, every stage through the real command line."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from diffusers import AutoencoderKL
from PIL import Image

from ldm import cli
from ldm.errors import LdmError
from ldm.files import read_json, write_json
from ldm.quickstart import quickstart, recipe_path

MINUTES = 0.01


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The recipes with smaller models; ``test_configs.py`` trains them as they are."""
    folder = tmp_path_factory.mktemp("recipes")
    first, second = (yaml.safe_load(recipe_path(f"shapes/{stage}.yaml").read_text()) for stage in ("autoencoder", "denoiser"))
    first["data"] |= {"batch_size": 4, "validation_samples": 8}
    first["model"]["autoencoder"] |= {"block_out_channels": [8, 8, 16]}
    first["model"]["adversary"]["discriminator"]["init_args"] |= {"width": 8}
    second["data"] |= {"batch_size": 16}
    second["model"] |= {"preview_steps": 4}
    second["model"]["denoiser"]["init_args"] |= {"width": 48, "num_layers": 2, "num_attention_heads": 2}
    (folder / "autoencoder.yaml").write_text(yaml.safe_dump(first))
    (folder / "denoiser.yaml").write_text(yaml.safe_dump(second))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.quickstart.recipe_path", lambda name: folder / Path(name).name)
        patch.setattr("ldm.quickstart.MIN_IMAGES", 96)
        patch.setattr("ldm.quickstart.VALIDATION_IMAGES", 48)
        patch.setattr("ldm.quickstart.SAMPLING", {"num_inference_steps": 4, "guidance_scale": 3.0})
        yield


@pytest.fixture(scope="module")
def finished(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart that was interrupted before stage two and run again."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    ran: list[str] = []

    def stop_at_stage_two(arguments: Sequence[str]) -> None:
        if arguments[0] == "denoiser":
            raise KeyboardInterrupt
        ran.append(" ".join(arguments[:2]))
        cli.dispatch(arguments)

    with pytest.raises(LdmError, match="run the same quickstart again"):
        quickstart(out, MINUTES, 3, run=stop_at_stage_two)
    assert "latents export" in ran and (out / "autoencoder/config.json").is_file()
    stamp = (out / "autoencoder/config.json").stat().st_mtime_ns
    cli.main(["quickstart", "--out", str(out), "--minutes", str(MINUTES), "--seed", "3"])
    # it resumed: the finished stages were not run again
    assert (out / "autoencoder/config.json").stat().st_mtime_ns == stamp
    return out


def test_all_outputs_exist(finished: Path) -> None:
    for name in ("shards/manifest.json", "latents/manifest.json", "pipeline/model_index.json", "samples.png", "report.html"):
        assert (finished / name).is_file(), name
    assert AutoencoderKL.from_pretrained(finished / "autoencoder").config["latent_channels"] == 4
    with Image.open(finished / "samples.png") as grid:
        assert min(grid.size) > 300


def test_both_reports_have_the_same_metrics_and_the_page_loads_nothing(finished: Path) -> None:
    record = json.loads((finished / "report.json").read_text())
    page = html.unescape((finished / "report.html").read_text())
    assert f"{record['reconstruction']['psnr']:.2f}" in page
    assert f"{record['prompt_accuracy']:.3f}" in page
    assert 0 <= record["prompt_accuracy"] <= 1
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    for _, command in record["commands"]:
        assert command in page
    assert record["seconds_total"] == pytest.approx(sum(record["seconds"].values()), abs=0.11)


def test_its_commands_repeat_its_steps(finished: Path, tmp_path: Path) -> None:
    """The report's command for the latents, with another folder, gives the same bytes."""
    record = json.loads((finished / "report.json").read_text())
    command = next(line for _, line in record["commands"] if line.startswith("ldm latents export") and "validation" in line)
    arguments = command.split()[1:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "again")
    cli.main(arguments)
    for shard in (tmp_path / "again").glob("*.tar"):
        assert shard.read_bytes() == (finished / "latents-validation" / shard.name).read_bytes()


def test_evaluate_repeats_the_reported_accuracy(finished: Path, capsys: pytest.CaptureFixture) -> None:
    record = json.loads((finished / "report.json").read_text())
    command = next(line for _, line in record["commands"] if line.startswith("ldm evaluate pipeline"))
    capsys.readouterr()
    cli.main(command.split()[1:])
    shown = re.search(r"prompt_accuracy\W+([\d.]+)", capsys.readouterr().out)
    assert shown and float(shown[1]) == pytest.approx(record["prompt_accuracy"], abs=1e-4)


def test_another_quickstart_in_the_same_folder_is_refused(finished: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["quickstart", "--out", str(finished), "--minutes", str(MINUTES), "--seed", "4"])
    assert left.value.code == 2 and str(finished) in capsys.readouterr().err


def test_the_state_of_a_newer_ldm_is_refused(finished: Path, tmp_path: Path) -> None:
    state = read_json(finished / "state.json")
    write_json(tmp_path / "state.json", state | {"format_version": state["format_version"] + 1})
    with pytest.raises(LdmError, match=r"state\.json: the quickstart has format version 2.*newer ldm"):
        quickstart(tmp_path, MINUTES, 3, run=cli.dispatch)
