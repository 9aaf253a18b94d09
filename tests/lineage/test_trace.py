"""A model is traced back to its images with every fingerprint compared; the steps of a sample are those that trained on it."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.cli import main
from ldm.data.writer import write_images
from ldm.inference.metadata import provenance_of, save_png
from ldm.inference.settings import GenerationSettings
from ldm.pipeline import load_pipeline
from ldm.runs.lineage import DataRecord, history
from ldm.shapes.scenes import generate
from tests.tiny import TinyRuns

BUCKETS = ("--data.crop", "bucket", "--data.buckets", "[32]", "--data.bucket_step", "16")


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Any]]:
    """What each step of a run in this process trains on: keys of images, or draws of latents. A step that is trained again
    counts once."""
    steps: dict[int, list[Any]] = {}

    def record(_: DataRecord, trainer: Any, module: Any, batch: dict[str, Any], number: int) -> None:
        steps[trainer.global_step] = batch["key"] if "key" in batch else batch["draws"][:, 0].tolist()

    monkeypatch.setattr(DataRecord, "on_train_batch_start", record)
    return steps


def traced(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    main(["trace", *map(str, arguments), "--json", "-"])
    return json.loads(capsys.readouterr().out)


def walk(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [node, *(below for child in node["children"] for below in walk(child))]


def by_sample(steps: dict[int, list[Any]]) -> dict[Any, list[int]]:
    found = defaultdict(list)
    for step, samples in sorted(steps.items()):
        for sample in samples:
            found[sample].append(step)
    return found


def test_the_steps_of_a_sample_are_those_that_trained_on_it(tiny_runs: TinyRuns, tmp_path, trained_on, capsys):
    """Buckets, an image that cannot be read, a crash, and another batch size after it; then an older run without records."""
    sizes = [(48, 32), 32, (32, 48), (48, 32), 32, (48, 32), 32, (32, 48), (48, 32), 32, 32, 32]
    write_images(tmp_path / "shards", "shapes", generate(12, sizes, seed=0), samples_per_shard=5)
    shard = tmp_path / "shards" / "shapes-00001.tar"
    data = bytearray(shard.read_bytes())
    place = data.index(b"IDAT", data.index(b"00000006.png")) + 8
    data[place : place + 40] = bytes(40)
    shard.write_bytes(data)
    here = ("--data.train", f"{tmp_path}/shards", "--data.validation", f"{tmp_path}/shards", *BUCKETS)
    options = (*here, "--data.max_bad_share", "0.5", "--checkpoints.every_steps", "3")
    out = tmp_path / "run"
    first = tiny_runs.command("autoencoder", out, *options, "--data.batch_size", "2", steps=9, validate_every=20)
    main(first[3:])
    shutil.rmtree(out / "autoencoder")
    again = tiny_runs.command("autoencoder", out, *options, "--data.batch_size", "1", steps=30, validate_every=40)
    main([*again[3:], "--resume", str(out / "checkpoints" / "step=00000006.ckpt")])
    expected = by_sample(trained_on)
    assert sorted(expected) == [f"{number:08d}" for number in range(12) if number != 6]
    uses = {}
    for key in (*expected, "00000006"):
        (uses[key],) = traced(out, "--sample", key, "--check", "recorded", capsys=capsys)["uses"]
    broken = uses.pop("00000006")
    assert broken["steps"] == [] and "cannot be decoded" in broken["reason"]
    assert {key: each["steps"] for key, each in uses.items()} == expected
    # of before there were records: one start, or several with the same settings
    environment = out / "logs" / "environment.json"
    starts = json.loads(environment.read_text())
    assert [start["exported"]["step"] for start in starts] == [9, 30]
    old = {name: value for name, value in starts[1].items() if name not in ("data", "exported")}
    environment.write_text(json.dumps([old | {"resumed_at_step": None}]))
    plan = traced(out, "--sample", "00000003", capsys=capsys)["uses"][0]["steps"]
    assert len(plan) in (2, 3) and len({step // 11 for step in plan}) == len(plan)  # once an epoch
    main(["trace", str(out), "--sample", "00000003"])
    assert f"trained on {len(plan)} times, at steps {plan[0]}" in capsys.readouterr().out


def test_the_history_of_a_run():
    def start(at: int | None) -> Any:
        return {"resumed_at_step": at}

    a, b, c, d = start(None), start(500), start(300), start(300)
    assert history([a], 10) == [(range(10), a)]
    assert history([a, b], 900) == [(range(500), a), (range(500, 900), b)]
    assert history([a, b, c, d], 900) == [(range(300), a), (range(300, 900), d)]  # c ended before it saved
    assert history([a, b], 400) == [(range(400), a)]
    assert history([b], 900) == [(range(500, 900), b)]


@pytest.fixture(scope="module")
def chain(tiny_runs: TinyRuns, tiny_text_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, a denoiser that began with another's weights, and an image of it."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(tiny_runs.folder / "shards", folder / "shards")
    main(tiny_runs.command("autoencoder", folder / "one", "--data.train", f"{folder}/shards", steps=3)[3:])
    export = ["latents", "export", "--autoencoder", f"{folder}/one/autoencoder", "--shards", f"{folder}/shards"]
    main([*export, "--out", f"{folder}/latents", "--text-encoder", tiny_text_encoder])
    common = ["--data.train", f"{folder}/latents", "--model.autoencoder", f"{folder}/one/autoencoder"]
    common += ["--data.validation", f"{folder}/latents"]
    main(tiny_runs.command("denoiser", folder / "base", *common, steps=2)[3:])
    initial = ("--model.init_from", f"{folder}/base/pipeline")
    main(tiny_runs.command("denoiser", folder / "two", *common, *initial, "--export", f"{folder}/model", steps=12)[3:])
    pipeline = load_pipeline(folder / "model", "cpu")
    image = pipeline("a ring", num_inference_steps=1, output_type="np").images[0]
    made = Image.fromarray((255 * np.asarray(image)).astype(np.uint8))
    settings = GenerationSettings("a ring", seed=3, steps=1)
    save_png(made, folder / "image.png", settings, provenance_of(pipeline, folder / "model"))
    return folder


def test_an_image_is_traced_to_the_images_of_every_training(chain: Path, capsys, monkeypatch, tmp_path):
    found = traced(chain / "image.png", "--search", chain, "--check", "all", "--sample", "00000005", capsys=capsys)
    nodes = walk(found)
    kinds = [node["kind"] for node in nodes]
    assert kinds[:2] == ["image", "pipeline"] and "'a ring', seed 3" in found["notes"][0]
    for kind, places in {"run": {"one", "two", "base"}, "latents": {"latents"}, "image shards": {"shards"}}.items():
        assert {Path(node["name"]).name for node in nodes if node["kind"] == kind} == places
    assert {node["state"] for node in nodes[1:]} == {"checked"}
    run = next(node for node in nodes if Path(node["name"]).name == "two")
    assert len(run["uses"][0]["steps"]) == 2  # 12 steps of 4 draw each of 24 samples twice
    # moved, with relative paths that lead nowhere: found by fingerprints
    moved = tmp_path / "moved"
    shutil.copytree(chain, moved / "deep" / "er")
    hidden = chain.with_name("hidden")
    chain.rename(hidden)
    try:
        nodes = walk(traced(moved / "deep" / "er" / "image.png", "--search", moved, capsys=capsys))
        assert {node["state"] for node in nodes[1:]} == {"checked"}
        assert all(str(chain) not in node["name"] for node in nodes)
        shutil.rmtree(moved / "deep" / "er" / "base")
        shutil.rmtree(moved / "deep" / "er" / "one")
        nodes = walk(traced(moved / "deep" / "er" / "model", "--search", moved, capsys=capsys))
        states = {(node["kind"], Path(node["name"]).name): node["state"] for node in nodes}
        assert states["network", "pipeline"] == "not checked"  # of init_from
        assert states["autoencoder", "vae"] == "checked"  # the pipeline's own copy
    finally:
        hidden.rename(chain)


def test_a_matcher_is_traced_to_the_tables_of_its_images(tiny_runs: TinyRuns, tiny_text_encoder: str, tmp_path, capsys):
    """Shards packed from a folder with a table in it, and of a listing beside it; of older shards the source is not known."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for key, pixels, _ in generate(6, 32, seed=0):
        Image.fromarray(pixels).save(photos / f"{key}.png")
    rows = "".join(f"{path.name},shape {path.stem}\n" for path in sorted(photos.glob("*.png")))
    for table in (photos / "metadata.csv", tmp_path / "list.csv"):
        table.write_text(f"file_name,caption\n{rows}")
    for name, options in (("shards", []), ("listed", ["--captions", f"{tmp_path}/list.csv", "--validation", "2"])):
        main(["shards", "pack", str(photos), str(tmp_path / name), *options])
    export = ["latents", "export", "--autoencoder", f"{tiny_runs.folder}/autoencoder", "--shards", f"{tmp_path}/shards"]
    main([*export, "--out", f"{tmp_path}/latents", "--text-encoder", tiny_text_encoder])
    data = ("--data.train", f"{tmp_path}/latents", "--data.validation", f"{tmp_path}/latents")
    main(tiny_runs.command("matcher", tmp_path / "run", *data, steps=2)[3:])
    search = ("--search", tmp_path, tiny_runs.folder)
    nodes = walk(traced(tmp_path / "run" / "matcher", *search, capsys=capsys))
    assert [node["kind"] for node in nodes[:2]] == ["matcher", "autoencoder"]
    assert {node["kind"]: node["state"] for node in nodes} == {
        **{kind: "checked" for kind in ("matcher", "autoencoder", "text encoder", "run", "latents", "image shards", "table")},
        "images": "",
    }
    for place in (tmp_path / "listed", tmp_path / "listed" / "validation"):
        (images,) = traced(place, capsys=capsys)["children"]
        assert images["name"] == str(photos) and images["children"][0]["name"] == str(tmp_path / "list.csv")
        assert images["children"][0]["state"] == "checked"
    (photos / "metadata.csv").write_text(f"file_name,caption\n{rows}more.png,more\n")
    (tmp_path / "list.csv").unlink()
    assert traced(tmp_path / "listed", capsys=capsys)["children"][0]["children"][0]["state"] == "not checked"
    with pytest.raises(SystemExit):
        main(["trace", str(tmp_path / "run" / "matcher"), "--search", *map(str, search[1:])])
    out, err = capsys.readouterr()
    assert err == f"ldm: not what was recorded: table {photos}/metadata.csv; the tree says why\n" and "changed since" in out
    manifest = json.loads((tmp_path / "listed" / "manifest.json").read_text())
    for value, fails in (("nowhere", True), (None, False)):
        changed = {**manifest, "packed_from": value} if fails else {k: v for k, v in manifest.items() if k != "packed_from"}
        (tmp_path / "listed" / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(SystemExit) if fails else nullcontext():
            assert traced(tmp_path / "listed", capsys=capsys)["children"] == []


def test_what_differs_is_named(chain: Path, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(chain, folder, ignore=shutil.ignore_patterns("base"))
    shutil.rmtree(folder / "shards")
    write_images(folder / "shards", "shapes", generate(24, 32, seed=9))  # repacked from others since
    hidden = chain.with_name("hidden")
    chain.rename(hidden)
    try:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["trace", str(folder / "two"), "--search", str(folder)])
    finally:
        hidden.rename(chain)
    out, err = capsys.readouterr()
    assert err == f"ldm: not what was recorded: shards {folder}/latents/../shards; the tree says why\n" or "shards" in err
    assert "holds other shards now" in out


def test_what_cannot_be_traced_is_refused_in_one_line(tmp_path, capsys, chain):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for arguments, said in (
        ([tmp_path / "empty"], "is nothing that can be traced; give a PNG"),
        ([tmp_path / "none"], "is nothing that can be traced"),
        ([tmp_path / "broken.png"], "is not a whole PNG"),
        ([chain / "model", "--search", tmp_path / "none"], "a folder to look in"),
    ):
        with pytest.raises(SystemExit):
            main(["trace", *map(str, arguments)])
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and said in line
    main(["trace", str(chain / "two"), "--sample", "nowhere", "--check", "recorded"])
    assert "no sample of its data has the key nowhere" in capsys.readouterr().out
