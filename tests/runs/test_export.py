"""A run's folder, which may be a stranger's or damaged, is exported or refused in one line, and nothing half-made is left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.cli import dispatch
from ldm.errors import LdmError, UsageError
from ldm.latents.export import export_latents
from ldm.locks import hold_folder
from ldm.pipeline import load_pipeline
from ldm.runs.checkpoints.files import sidecar
from ldm.runs.layout import RunFolder
from tests.tiny import write_config


@pytest.fixture(scope="module")
def finished(latents: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    averages = {"sigma_rel": [0.05, 0.1], "snapshot_every": 1}
    config = write_config(folder / "config.yaml", latents, {"max_steps": 2, "val_check_interval": 2}, power_averages=averages)
    dispatch(["denoiser", "fit", "--config", str(config), "--out", str(folder / "run")])
    shutil.rmtree(folder / "run" / "pipeline")
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def change_config(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = RunFolder(run).config
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def change_checkpoint(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = RunFolder(run).last_checkpoint.resolve()
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    sidecar(path).unlink()


def refused(*words: str | Path) -> str:
    """The line of a refused command, whose last word is its output."""
    with pytest.raises(LdmError) as said:
        dispatch(["denoiser", *map(str, words)])
    assert "\n" not in str(said.value) and [*Path(words[-1]).parent.glob(".*.tmp")] == []
    assert not Path(words[-1]).exists()
    return str(said.value)


STRANGE = """
from pathlib import Path
from ldm.diffusion.timesteps import Uniform
Path(__file__).with_name("imported").touch()
class Mine(Uniform):
    pass
"""


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(timesteps={"class_path": "strange.Mine"}),
        lambda config: config["model"].update(timesteps="strange.Mine"),
        lambda config: config["model"].update(weighting={"class_path": "strange.Mine"}),
        lambda config: config["model"].update(auxiliary_losses=[{"class_path": "strange.Mine"}]),
        lambda config: config["trainer"].update(callbacks=[{"class_path": "strange.Mine"}]),
        lambda config: config["trainer"].update(logger={"class_path": "strange.Mine"}),
        lambda config: config["model"].update(timesteps="file.yaml"),
    ],
)
def test_a_class_of_elsewhere_is_neither_imported_nor_built_without_trust(
    change: Callable[[dict[str, Any]], object], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange.py").write_text(STRANGE)
    (tmp_path / "file.yaml").write_text("class_path: strange.Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    change_config(run, change)
    for command in (["export"], ["ema", "--sigma-rel", "0.08"]):
        said = refused(*command, run, tmp_path / "out")
        assert f"{RunFolder(run).config} names " in said and "--trust" in said
    assert not (tmp_path / "imported").exists()


def test_a_class_of_ones_own_is_built_with_trust(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.py").write_text(STRANGE)
    monkeypatch.syspath_prepend(tmp_path)
    change_config(run, lambda config: config["model"].update(timesteps={"class_path": "ours.Mine"}))
    refused("export", run, tmp_path / "out")
    dispatch(["denoiser", "export", str(run), str(tmp_path / "out"), "--trust"])
    assert (tmp_path / "out" / "model_index.json").is_file() and (tmp_path / "imported").exists()


def test_weights_that_are_not_finite_are_not_exported(run: Path, tmp_path: Path) -> None:
    change_checkpoint(run, lambda content: content["average"]["shadow_params"][0].fill_(float("nan")))
    assert "not finite" in refused("export", run, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(average=None),
        lambda content: content.update(state_dict={"a": torch.ones(1)}),
        lambda content: content.update(state_dict=5),
        lambda content: content.update(seed="x"),
        lambda content: content.update(num_images_seen=-1),
        lambda content: content.pop("skipped"),
        lambda content: content["average"].update(shadow_params=[torch.ones(1)]),
        lambda content: content["average"].update(shadow_params=None, decay="x"),
        lambda content: content["average"].update(power_function={}),
    ],
)
def test_a_checkpoint_of_another_content_is_named(
    change: Callable[[dict[str, Any]], object], run: Path, tmp_path: Path
) -> None:
    change_checkpoint(run, change)
    assert "checkpoint" in refused("export", run, tmp_path / "out")


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"{}", b'{"__metadata__":{"step":"x","sigma_rel":"0.1"}}', b"[" * 99])
def test_a_broken_snapshot_is_named(header: bytes, run: Path, tmp_path: Path) -> None:
    broken = sorted((run / "snapshots").iterdir())[0]
    broken.write_bytes(len(header).to_bytes(8, "little") + header)
    assert str(broken) in refused("ema", "--sigma-rel", "0.08", run, tmp_path / "out")


@pytest.mark.parametrize("metadata", [{"step": "-1"}, {"step": "9" * 40}, {"sigma_rel": "nan"}, {"sigma_rel": "7"}])
def test_a_snapshot_of_impossible_numbers_is_named(metadata: dict[str, str], run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = sorted((run / "snapshots").iterdir())[0]
    save_file(load_file(broken), broken, {"step": "1", "sigma_rel": "0.05"} | metadata)
    assert str(broken) in refused("ema", "--sigma-rel", "0.08", run, tmp_path / "out")


def test_a_second_fit_in_one_folder_is_refused(run: Path, tmp_path: Path, latents: tuple[Path, Path]) -> None:
    config = write_config(tmp_path / "config.yaml", latents, {"max_steps": 4})
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for out, options in ((run, ["--resume", "latest"]), (tmp_path / "new", [])):
        said = rf"another ldm is training in {out} \(process \d+ on "
        with hold_folder(out, f"training in {out}"), pytest.raises(UsageError, match=said):
            dispatch(["denoiser", "fit", "--config", str(config), "--out", str(out), *options])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before and not (tmp_path / "new").exists()


def test_a_run_is_exported_although_all_that_it_used_has_moved(
    latents: tuple[Path, Path], image_shards: Path, tiny_text_encoder: str, tmp_path: Path
) -> None:
    shutil.copytree(latents[0], tmp_path / "a" / "autoencoder")
    shutil.copytree(tiny_text_encoder, tmp_path / "a" / "text")
    export_latents(latents[0], image_shards, tmp_path / "a" / "latents", str(tmp_path / "a" / "text"))
    used = tmp_path / "a" / "autoencoder", tmp_path / "a" / "latents"
    config = write_config(tmp_path / "config.yaml", used, {"max_steps": 1, "limit_val_batches": 0})
    dispatch(["denoiser", "fit", "--config", str(config), "--out", str(tmp_path / "run")])
    for name in ("autoencoder", "text", "latents"):
        (tmp_path / "a" / name).rename(tmp_path / name)
    export = ["denoiser", "export", str(tmp_path / "run"), str(tmp_path / "pipeline")]
    with pytest.raises(UsageError):
        dispatch(export)
    now = {"autoencoder": "autoencoder", "text-encoder": "text", "train": "latents", "validation": "latents"}
    dispatch([*export, *(f"--{option}={tmp_path / place}" for option, place in now.items())])
    trained = tmp_path / "run" / "pipeline"
    assert load_pipeline(tmp_path / "pipeline").config["trained_on"] == load_pipeline(trained).config["trained_on"]
