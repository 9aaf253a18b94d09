"""Sweeps: the metrics of ``ldm evaluate pipeline`` for every combination; and the best one as the defaults of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from ldm.cli import main
from ldm.data.writer import write_images
from ldm.evaluation.sweep import SamplerSettings, SweepFolder, SweptSettings, choose, find_metric, pareto_front, settings_of
from ldm.evaluation.sweep_page import write_page
from ldm.inference.metadata import model_hash, read_png
from ldm.models.text_encoder import TextEncoder
from ldm.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm.shapes.scenes import generate


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "shards"
    write_images(folder, "shapes", generate(14, 32, seed=0))
    return folder


@pytest.fixture
def saved(make_pipeline: Callable, tiny_text_encoder: str, tmp_path: Path) -> Path:
    """The directory of an untrained pipeline."""
    make_pipeline(words=TextEncoder.load(tiny_text_encoder)).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def swept(scheduler: str, evaluations: int, value: float, better: Any = "lower") -> SweptSettings:
    metrics: Any = {"fid_x": {"value": value, "real": None, "better": better}}
    return {"scheduler": scheduler, "steps": evaluations, "guidance": 1.0, "evaluations": evaluations, "metrics": metrics}


def test_the_front_is_what_no_other_beats_and_the_cheapest_within_the_tolerance_is_chosen() -> None:
    results = [swept("a", 20, 5.0), swept("b", 10, 5.2), swept("c", 10, 4.9), swept("d", 5, 9.0), swept("e", 40, 4.8)]
    assert [settings_of(one).scheduler for one in pareto_front(results, "fid_x")] == ["d", "c", "e"]
    for tolerance, scheduler in ((0.0, "e"), (0.03, "c"), (1.0, "d")):
        assert choose(results, "fid_x", tolerance)["scheduler"] == scheduler
    higher = [swept("a", 20, 0.9, "higher"), swept("b", 10, 0.89, "higher"), swept("c", 5, 0.1, "higher")]
    assert choose(higher, "fid_x", 0.02)["scheduler"] == "b" and choose(higher, "fid_x", 0.0)["scheduler"] == "a"
    names = ["fid_inception", "fid_clip_1", "clipscore_clip_1"]
    assert [find_metric(name, names) for name in ("fid", "fid_clip_1", "clipscore")] == names
    with pytest.raises(Exception, match="there is no metric 'cmmd'; choose one of: fid_inception, "):
        find_metric("cmmd", names)


def test_a_sweep_has_the_metrics_of_evaluate_and_is_resumed_and_extended(
    shards: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    common = [f"{saved}", "--shards", f"{shards}", "--network", "alex-random", "--size", "32", "--count", "7"]

    def sweep(*options: str, out: str = "out") -> dict[str, Any]:
        main(["sweep", *common, "--out", f"{tmp_path}/{out}", *options])
        return json.loads((tmp_path / out / "sweep.json").read_text())

    lists = ["--steps", "2,1,2", "--guidance", "1,2", "--scheduler", "heun"]
    record = sweep(*lists)
    found = {settings_of(one): one for one in record["results"]}
    assert [*found] == [("heun", 1, 1.0), ("heun", 1, 2.0), ("heun", 2, 1.0), ("heun", 2, 2.0)]
    assert [one["evaluations"] for one in found.values()] == [1, 2, 3, 6]  # two a step but the last, twice with guidance
    one = ["--scheduler", "heun", "--steps", "2", "--guidance", "2", "--json", f"{tmp_path}/one.json"]
    main(["evaluate", "pipeline", *common, *one])
    evaluated = json.loads((tmp_path / "one.json").read_text())
    assert evaluated["metrics"] == found[SamplerSettings("heun", 2, 2.0)]["metrics"]
    assert record["protocol"].items() >= {"count": 7, "seed": 0, "generated": 7, "model_hash": model_hash(saved)}.items()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Pareto front" in page and "Guidance and FID (alex_random)" in page and "Images by steps" in page

    folder = SweepFolder(tmp_path / "out", record["protocol"])
    for number, each in enumerate(folder.results.values()):
        each["metrics"]["clipscore_x"] = {"value": number, "real": None, "better": "higher"}
    write_page(folder, "a sweep", "clipscore_x", choose(folder.results.values(), "clipscore_x", 0.0))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Guidance and CLIPScore (x)" in page and "heun, 2 steps, guidance 2" in page

    # what is missing is computed, and all of it is as it was
    file = tmp_path / "out" / "sweep.json"
    whole = file.read_bytes()
    file.write_text(json.dumps(record | {"results": record["results"][1:2]}))
    assert sweep(*lists) == record and file.read_bytes() == whole
    capsys.readouterr()
    assert len(sweep("--scheduler", "euler")["results"]) == 8  # with the steps and guidance of the folder
    assert "8 settings; chosen by FID (alex_random): " in capsys.readouterr().out
    file.write_bytes(whole)
    for options, said in [
        (["--seed", "1"], f"{file} is a sweep with seed 0, not 1; give a new folder"),
        (["--network", "vgg-random"], f"{file} is a sweep with networks {{'alex_random': '"),
        (["--steps", "5,,10"], "--steps is '5,,10'; give values with commas between them, such as 5,10,20"),
        (["--guidance", "nan"], "--guidance is 'nan'; give values"),
        (["--scheduler", "euler,eular"], "no sampler 'eular'"),
        (["--by", "cmmd"], "there is no metric 'cmmd'; choose one of: fid_alex_random, kid_alex_random"),
        (["--recommend", "euler,10"], "--recommend is 'euler,10'; give a scheduler, steps and guidance"),
        (["--tolerance", "-1"], "--tolerance is -1; give a share"),
    ]:
        with pytest.raises(SystemExit):
            sweep(*options)
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert file.read_bytes() == whole


def test_what_a_sweep_recommends_is_the_default_of_every_way_to_generate(
    shards: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def sample(out: str, *options: str) -> np.ndarray:
        main(["sample", f"{saved}", *options, "--out", f"{tmp_path}/{out}"])
        return np.asarray(Image.open(next((tmp_path / out).glob("0000*.png"))))

    def image_of(pipeline: Any, **settings: Any) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        (image,) = pipeline("a ring", generator=[torch.Generator().manual_seed(0)], **settings).images
        return np.asarray(image)

    before, fingerprint = sample("before", "a ring"), model_hash(saved)
    command = [
        "sweep",
        f"{saved}",
        "--shards",
        f"{shards}",
        "--network",
        "alex-random",
        "--size",
        "32",
        "--out",
        f"{tmp_path}/out",
    ]
    command += ["--steps", "2", "--guidance", "2", "--scheduler", "dpm++2m"]
    main([*command, "--recommend"])
    assert "now recommends dpm++2m, 2 steps, guidance 2" in capsys.readouterr().out
    assert model_hash(saved) == fingerprint  # the model is the same one

    explicit = sample("explicit", "a ring", "--scheduler", "dpm++2m", "--steps", "2", "--guidance", "2")
    assert "recommended" not in capsys.readouterr().err
    recommended = sample("recommended", "a ring")
    assert "recommended for this model: scheduler dpm++2m, steps 2, guidance 2" in capsys.readouterr().err
    assert (recommended == explicit).all() and (recommended != before).any()
    inside, provenance = read_png(next((tmp_path / "recommended").glob("0000*.png")))
    assert (inside.scheduler, inside.steps, inside.guidance, provenance.scheduler) == ("dpm++2m", 2, 2.0, "dpm++2m")
    # in Python, of a directory that diffusers opens
    opened = DiffusionPipeline.from_pretrained(saved)
    assert isinstance(opened, LatentDiffusionPipeline) and (image_of(opened) == explicit).all()
    assert type(opened.scheduler).__name__ == "DPMSolverMultistepScheduler"
    # what is given wins; steps hold with their scheduler alone
    euler = FlowMatchEulerDiscreteScheduler()
    other = DiffusionPipeline.from_pretrained(saved, scheduler=euler)
    assert (image_of(other) == image_of(other, num_inference_steps=30, guidance_scale=2.0)).all()
    other.save_pretrained(tmp_path / "other")
    assert load_pipeline(tmp_path / "other").recommended_settings() == {}
    assert (image_of(opened, num_inference_steps=3) == sample("three", "a ring", "--steps", "3")).all()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a ring", "scheduler": "euler"}')
    sample("file", "--prompts", f"{tmp_path}/prompts.jsonl")
    inside, _ = read_png(next((tmp_path / "file").glob("0000*.png")))
    assert (inside.scheduler, inside.steps, inside.guidance) == ("euler", 30, 2.0)
    capsys.readouterr()
    # an image of before is generated again as it was
    again = sample("again", "--from-image", f"{next((tmp_path / 'before').glob('0000*.png'))}")
    assert (again == before).all() and "warning" not in capsys.readouterr().err
    main([*command, "--recommend", "euler,1,1"])  # which the folder does not have yet
    main(["evaluate", "pipeline", *command[1:8], "--json", f"{tmp_path}/x.json"])
    protocol = json.loads((tmp_path / "x.json").read_text())["protocol"]
    assert (protocol["scheduler"], protocol["steps"], protocol["guidance"]) == ("euler", 1, 1.0)
    assert protocol["recommended"] == ["scheduler", "steps", "guidance"] and protocol["model_hash"] == fingerprint
    # as it was at first
    forgetting = load_pipeline(saved)
    forgetting.forget_recommended()
    assert (image_of(forgetting) == before).all()
