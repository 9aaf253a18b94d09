"""The page of a run, from whatever files of the run exist."""

from __future__ import annotations

import json
import os
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.cli import report as command
from ldm.cli.parser import Parser
from ldm.errors import LdmError, UsageError
from ldm.reporting.grids import captioned_grid, paired_grid, read_grid, save_grid
from ldm.reporting.metrics_csv import read_metrics
from ldm.runs.layout import RunFolder
from ldm.runs.report import SILENT_SECONDS, RunRecord, write_run_report

HEADER = "epoch,step,time/elapsed_seconds,time/images_per_second,train/loss,val/loss\r\n"


class Words(HTMLParser):
    """The text of a page, its images' descriptions, and its links."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words, self.alts, self.links, self.refresh = [], [], [], None
        self.feed(page.read_text())
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.alts += [given["alt"]] if "alt" in given else []
        self.links += [given[name] for name in ("src", "href") if name in given]
        if given.get("http-equiv") == "refresh":
            self.refresh = given["content"]

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []


def make_run(folder: Path, stage: str = "denoiser", rows: str = "", max_steps: int = 100, **start: Any) -> Path:
    """The files that a run leaves; ``start`` is the record of its only start."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    model = {"denoiser": {"class_path": "ldm.models.dit.DiT"}, "autoencoder": "autoencoder"}
    model = model if stage == "denoiser" else {"autoencoder": {"block_out_channels": [8]}, "adversary": {}}
    trainer = {"max_steps": max_steps, "log_every_n_steps": 10}
    config = {"trainer": trainer, "model": model, "data": {"train": "shards"}, "out": str(folder), "export": None}
    (logs / "config.yaml").write_text(yaml.safe_dump(config))
    if rows:
        (logs / "metrics.csv").write_text(HEADER + rows)
    if start:
        record = {
            "started": "2026-01-01T00:00:00+00:00",
            "resumed_at_step": None,
            "command": "ldm denoiser fit",
            "processes": 2,
            "precision": "32-true",
            "parameters": {"denoiser": 1234567},
            "git": {"commit": "0123456789abcdef" * 2, "dirty": True},
            "versions": {"torch": "2.15.0"},
        }
        (logs / "environment.json").write_text(json.dumps([record | start]))
    return folder


def page_of(folder: Path, **options: Any) -> Words:
    write_run_report(folder, folder / "report.html", **options)
    return Words(folder / "report.html")


def grow_old(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (folder / "logs", *folder.rglob("*")):
        os.utime(path, (then, then))


TWO_ROWS = "0,9,5.0,40.0,1.0,\r\n0,19,10.0,42.0,0.5,0.7\r\n"


def test_a_run_in_training(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", rows=TWO_ROWS, processes=2), refresh_seconds=30)
    assert page.words[0] == "run: training" and page.refresh == "30"
    for said in ("20 of 100 steps", "0:10 elapsed", "0:40 time left", "42 images per second", "0.7 validation loss"):
        assert said in page.text
    assert "1,234,567" in page.text and "0123456789ab + changes" in page.text and "DiT" in page.text
    assert "--resume latest" not in page.text  # it is still running
    assert all(link.startswith("data:") for link in page.links)


def test_a_finished_run(tmp_path: Path) -> None:
    rows = TWO_ROWS + "0,99,60.0,42.0,0.1,0.2\r\n"
    run = make_run(tmp_path / "run", rows=rows, ended={"time": "2026-01-01T00:01:00+00:00", "step": 100})
    page = page_of(run, refresh_seconds=30)
    assert page.words[0] == "run: finished" and page.refresh is None
    assert "ldm sample" in page.text and "time left" not in page.text
    (run / "logs" / "environment.json").unlink()  # a run of an earlier version: its exported model shows it
    (run / "pipeline").mkdir()
    assert page_of(run).words[0] == "run: finished"


def test_the_run_of_an_adapter_names_its_base_and_trigger_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=TWO_ROWS, processes=1)
    config = yaml.safe_load((run / "logs" / "config.yaml").read_text())
    config["model"] |= {"init_from": "quickstart/pipeline", "adapter": {"rank": 4, "method": "dora", "trigger_words": None}}
    config["data"]["default_caption"] = "a photo of sks dog"
    (run / "logs" / "config.yaml").write_text(yaml.safe_dump(config))
    words = page_of(run).words
    for name, value in {"base": "quickstart/pipeline", "method": "dora", "trigger words": "a photo of sks dog"}.items():
        assert words[words.index(name) + 1] == value


def test_the_page_of_a_stopped_run_says_how_to_resume(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", rows=TWO_ROWS, ended={"time": "then", "step": 23, "why": "as asked"})
    page = page_of(run)
    assert page.words[0] == "a run: stopped: as asked" and "23 of 100 steps" in page.text
    assert f"--out '{run}' --resume latest" in page.text


def test_a_killed_run_counts_as_stopped_once_it_is_silent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=TWO_ROWS, processes=1)
    grow_old(run, SILENT_SECONDS + 60)
    assert page_of(run).words[0] == "run: stopped: nothing written for 11:00"


def test_a_run_of_slow_steps_may_be_silent_for_longer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    header = HEADER.replace("time/images_per_second", "time/step_seconds")
    (run / "logs" / "metrics.csv").write_text(header + "0,9,5.0,60.0,1.0,\r\n")
    grow_old(run, SILENT_SECONDS + 60)
    assert page_of(run).words[0] == "run: training"


def test_an_unfinished_row_is_ignored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=TWO_ROWS + "0,29,15.0,42.0,0.4")
    assert read_metrics(run / "logs" / "metrics.csv")["train/loss"] == ([10, 20], [1.0, 0.5])
    assert "20 of 100 steps" in page_of(run).text


@pytest.mark.parametrize("rows", ["", "0,0,1.0,,1.0,\r\n"])
@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_run_of_one_step_or_none_yet(tmp_path: Path, stage: str, rows: str) -> None:
    page = page_of(make_run(tmp_path / "run", stage, rows=rows, max_steps=1000))
    assert f"{1 if rows else 0} of 1,000 steps" in page.text and "None yet" in page.text


def test_checkpoints_are_listed_without_reading_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=TWO_ROWS)
    checkpoints = run / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step=00000010.ckpt").write_bytes(b"no checkpoint" * 10**6)
    (checkpoints / "step=00000010.ckpt.sha256").write_text("0")
    sharded = checkpoints / "step=00000020.ckpt"
    sharded.mkdir()
    (sharded / "part").write_bytes(b"0" * 2**20)
    (checkpoints / ".step=00000030.ckpt.1.tmp").write_bytes(b"unfinished")
    (checkpoints / "last.ckpt").symlink_to("step=00000020.ckpt")
    (checkpoints / "best.ckpt").symlink_to("step=00000010.ckpt")
    page = page_of(run)
    assert "step=00000010.ckpt 10 12.4 MiB best" in page.text and "step=00000020.ckpt 20 1.0 MiB last" in page.text
    assert [step for step, _ in RunRecord.read(run).checkpoints()] == [10, 20]


def colours(count: int, *colour: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), colour) for _ in range(count)]


def test_a_grid_keeps_its_images(tmp_path: Path) -> None:
    rows = [("a cat", colours(1, 255, 0, 0)), ("ein Bär", colours(1, 0, 0, 255))]
    save_grid(captioned_grid([row[1][0] for row in rows], [row[0] for row in rows]), rows, tmp_path / "captioned.png")
    paired = [("original", colours(2, 255, 0, 0)), ("reconstruction", colours(3, 0, 255, 0))]
    save_grid(paired_grid(paired), paired, tmp_path / "paired.png")
    for name, given in (("captioned", rows), ("paired", paired)):
        _, again = read_grid(tmp_path / f"{name}.png")
        assert [(label, len(images)) for label, images in again] == [(label, len(images)) for label, images in given]
        for (_, images), (_, originals) in zip(again, given, strict=True):
            assert {image.getpixel((0, 0)) for image in images} == {originals[0].getpixel((0, 0))}
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    assert read_grid(tmp_path / "other.png")[1] == []


@pytest.mark.parametrize("labels", [["a ring"], ["a ring", "a star"], ["original", "reconstruction"], []])
def test_previews_grow_from_the_first_to_the_last(tmp_path: Path, labels: list[str]) -> None:
    """One image, several, rows of them; and grids of earlier versions, which do not name their rows."""
    run = make_run(tmp_path / "run", rows=TWO_ROWS)
    (run / "previews").mkdir()
    for step in range(0, 110, 10):
        rows = [(label, colours(3 if label in ("original", "reconstruction") else 1, step, 0, 0)) for label in labels]
        path = run / "previews" / f"step-{step:08d}.png"
        if rows:
            save_grid(paired_grid(rows), rows, path)
        else:
            Image.new("RGB", (40, 20)).save(path)
    page = page_of(run)
    assert page.alts[0].startswith("Preview after 100 steps") and "Previews, first to last" in page.alts
    (run / "previews" / "step-00000100.png").unlink()
    for path in list((run / "previews").iterdir())[1:]:
        path.unlink()
    assert len(page_of(run).alts) == 1  # a single preview has no row of its own


def test_quarantine_and_warnings_are_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=TWO_ROWS, processes=1)
    (run / "logs" / "run.log").write_text("".join(f"line {number}\n" for number in range(10_000)))
    (run / "logs" / "run-rank1.log").write_text("rank 1 WARNING <b>of the other</b>\n")
    bad = [json.dumps({"shard": "a.tar", "key": f"cat-{number}", "reason": "is <broken>"}) for number in range(10)]
    (run / "quarantine.jsonl").write_text("\n".join(bad[:9]) + '\n{"shard": "hal')
    (run / "1-quarantine.jsonl").write_text("\n".join([bad[0], bad[9]]) + "\n")  # other processes find the same
    page = page_of(run)
    assert "10 samples in quarantine, 8 of them" in page.text and "is <broken>" in page.text
    assert "1 half-written line left out" in page.text
    assert "line 9999" in page.text and "line 9000" not in page.text and "<b>of the other</b>" in page.text


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match=r"is not the folder of a run: .*config\.yaml is not there"):
            write_run_report(folder, tmp_path / "report.html")
    (tmp_path / "logs").mkdir()
    for text, complaint in (
        ("[1, 2]", "whole file"),
        ("a: [", "not readable YAML"),
        ("{model: {}}", "trainer: field required"),
    ):
        (tmp_path / "logs" / "config.yaml").write_text(text)
        with pytest.raises(LdmError, match=rf"config\.yaml.*{complaint}") as error:
            write_run_report(tmp_path, tmp_path / "report.html")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def damaged(run: Path, path: str, text: str) -> str:
    """What the page of a run says when one of its files holds ``text``."""
    (run / path).write_text(text)
    with pytest.raises(LdmError) as error:
        write_run_report(run, run / "report.html")
    (run / path).unlink()
    assert str(run / path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value).removeprefix(str(run / path))


def test_a_damaged_file_is_named_with_its_key_or_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", processes=1)
    record = json.loads((run / "logs" / "environment.json").read_text())[0]
    for change, key in (
        ({"git": 5}, "0.git"),
        ({"ended": {"time": "then", "step": None}}, "0.ended.step"),
        ({"resumed_at_step": 10**30}, "0.resumed_at_step"),
        ({"versions": [1]}, "0.versions"),
    ):
        assert damaged(run, "logs/environment.json", json.dumps([record | change])).startswith(f": {key}: ")
    for text in ("null", '{"a":' * 10**5, "[NaN]", f"[{'1' * 5000}]"):
        damaged(run, "logs/environment.json", text)
    for rows, line in (("0,x,1,2,3,\r\n", 2), ("0,1,1,2\r\n", 2), (TWO_ROWS + "0,5,1,2,3,4,5\r\n", 4), ("0,inf,,,,\r\n", 2)):
        assert damaged(run, "logs/metrics.csv", HEADER + rows).startswith(f", line {line}: ")
    damaged(run, "logs/metrics.csv", "epoch,train/loss\n1,2\n")
    (run / "previews").mkdir()
    assert "not a PNG" in damaged(run, "previews/step-00000001.png", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(run / "quarantine.jsonl")
    with pytest.raises(LdmError, match="named pipe"):
        write_run_report(run, run / "report.html")


def test_metrics_that_are_not_finite_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", rows="0,9,nan,inf,nan,\r\n0,19,1e400,-1,inf,nan\r\n0,3,5,1,1,1\r\n"))
    assert "20 of 100 steps" in page.text or "4 of 100 steps" in page.text


@pytest.mark.parametrize("boxes", [[[0, 0, 9, 9]], [[-1, 0, 4, 4]], [[4, 4, 0, 0]], [[0, 0, 8, 8]] * 2, [[0, 0, 10**9, 9]], 3])
def test_the_boxes_of_a_grid_lie_side_by_side_in_it(tmp_path: Path, boxes: Any) -> None:
    chunk = PngInfo()
    chunk.add_itxt("ldm rows", json.dumps([["a ring", boxes]]))
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png", pnginfo=chunk)
    with pytest.raises(LdmError, match=r"grid\.png, chunk 'ldm rows'"):
        read_grid(tmp_path / "grid.png")


def run_command(*arguments: str | Path) -> None:
    parser = Parser("ldm")
    command.add(parser.add_subparsers(parser_class=Parser))
    options = parser.parse_args(["report", *map(str, arguments)])
    options.run(options)


def test_the_command_writes_into_the_run_or_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = make_run(tmp_path / "run", rows=TWO_ROWS)
    run_command(run)
    run_command(run, "--out", tmp_path / "elsewhere" / "page.html")
    assert (run / "report.html").is_file() and (tmp_path / "elsewhere" / "page.html").is_file()
    assert capsys.readouterr().out.startswith("training; look at ")
    config = RunFolder(run).config
    before = config.read_bytes()
    for wrong in (["--every", "0"], ["--out", tmp_path], ["--out", config]):
        with pytest.raises(UsageError):
            run_command(run, *wrong)
    assert config.read_bytes() == before


def test_the_command_follows_a_run_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ended = {"time": "then", "step": 20, "why": "as asked"}
    run_command(make_run(tmp_path / "run", rows=TWO_ROWS, ended=ended), "--every", "3600")
    assert capsys.readouterr().out.splitlines()[-1] == "stopped: as asked"
