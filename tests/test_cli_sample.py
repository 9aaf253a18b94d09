import errno
import json

import numpy as np
import pytest
from PIL import Image

from ldm.cli import main
from ldm.inference import output_folder as folders
from ldm.inference.metadata import read_png
from ldm.inference.output_folder import GRID_IMAGES, OutputFolder, file_name

QUICK = ("--steps", "2", "--device", "cpu")


@pytest.fixture(scope="session")
def model(make_pipeline, short_words, tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "model"
    make_pipeline(words=short_words).save_pretrained(path)
    return path


@pytest.fixture
def sample(model, tmp_path, monkeypatch, capsys):
    """Runs ``ldm sample`` in a new folder: exit code, what it said, and its complaints, without bars of progress."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, out="out", model=model):
        code = 0
        try:
            main(["sample", str(model), *QUICK, *map(str, arguments), "--out", out])
        except SystemExit as left:
            code = left.code
        said = capsys.readouterr()
        return code, said.out, "".join(line for line in said.err.splitlines(keepends=True) if line.startswith("ldm: "))

    return run


def make_images(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_every_image_has_its_name_its_seed_and_its_settings(sample, tmp_path):
    code, said, _ = sample("a red ring", "🟥", "--count", 2, "--seed", 5, "--guidance-interval", 0.2, 0.8, "--size", "32x16")
    assert code == 0 and "4 images, grid.png and index.html: out" in said
    names = ["0000-a-red-ring.png", "0001-a-red-ring.png", "0002.png", "0003.png"]
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png", "index.html", "run.json"]
    for number, name in enumerate(names):
        settings, provenance = read_png(out / name)
        assert settings.seed == 5 + number and settings.guidance_interval == (0.2, 0.8) and settings.steps == 2
        assert (settings.width, settings.height) == (provenance.width, provenance.height) == (32, 16)
        assert provenance.sampler == "FlowMatchEulerDiscreteScheduler" and settings.prompt == ("a red ring", "🟥")[number // 2]
    assert len({image for image in make_images(out).values()}) == 4
    code, said, _ = sample("a red ring", "--scheduler", "heun", out="other")
    assert code == 0 and read_png(tmp_path / "other" / names[0])[1].sampler == "FlowMatchHeunDiscreteScheduler"


def test_an_image_is_drawn_again_from_itself_bit_by_bit(sample, tmp_path, model):
    assert sample("a red ring", "a star", "--seed", 5, "--negative", "blur", "--scheduler", "euler-ancestral")[0] == 0
    drawn = tmp_path / "out" / "0001-a-star.png"
    code, _, said = sample("--from-image", drawn, out="again")
    assert code == 0 and "warning" not in said
    assert (tmp_path / "again" / "0000-a-star.png").read_bytes() == drawn.read_bytes()
    code, _, _ = sample("--from-image", drawn, "--seed", 5, "--count", 2, "--negative", "", "--no-metadata", out="changed")
    assert code == 0 and not Image.open(tmp_path / "changed" / "0001-a-star.png").info
    assert "parameters" in Image.open(drawn).info
    code, _, said = sample("--from-image", tmp_path / "changed" / "0001-a-star.png", out="none")
    assert code == 2 and "holds no settings" in said and not (tmp_path / "none").exists()


def test_an_image_of_another_model_is_named_as_such(sample, tmp_path, make_pipeline, short_words):
    assert sample("a red ring")[0] == 0
    drawn, other = tmp_path / "out" / "0000-a-red-ring.png", tmp_path / "other"
    make_pipeline(words=short_words, seed=1).save_pretrained(other)
    hashes = [read_png(drawn)[1].model_hash[:12]]
    code, _, said = sample("--from-image", drawn, out="again", model=other)
    hashes.append(read_png(tmp_path / "again" / "0000-a-red-ring.png")[1].model_hash[:12])
    assert code == 0 and all(name in said for name in hashes) and "warning" in said
    code, _, said = sample("--from-image", drawn, "--strict", out="third", model=other)
    assert code == 2 and said.count("\n") == 1 and all(name in said for name in hashes)


def test_what_is_there_is_not_drawn_again(sample, tmp_path):
    lines = [{"prompt": f"a {colour} ring", "guidance": guidance} for colour in ("red", "blue") for guidance in (1, 2)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("--prompts", "prompts.jsonl", "--batch-size", 2, "--preview-every", 1)
    assert sample(*arguments)[0] == 0
    out = tmp_path / "out"
    whole = {name: pixels(out / name) for name in make_images(out)}
    grid = pixels(out / "grid.png")
    assert len(whole) == 4 and not (out / "preview.png").exists()
    for name in ("0001-a-red-ring.png", "0002-a-blue-ring.png", "grid.png", "index.html"):
        (out / name).unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("[0-9]*.png")}
    code, said, _ = sample(*arguments)
    assert code == 0 and "4 images (2 existed)" in said
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    assert list(make_images(out)) == list(whole) and all(
        abs(pixels(out / name) - one).max() <= 1 for name, one in whole.items()
    )
    assert (out / "index.html").exists() and abs(pixels(out / "grid.png") - grid).max() <= 1
    code, said, _ = sample(*arguments)
    assert code == 0 and "4 images (4 existed)" in said


@pytest.mark.parametrize(
    "arguments, why",
    [
        (("a red ring", "--guidance", "2"), "guidance 3.0, not 2.0"),
        (("a red ring", "--seed", "2"), "seed 0, not 2"),
        (("a blue ring",), "holds 0000-a-red-ring.png of another request"),
        (("a red ring", "--dtype", "bf16"), "float32, not of"),
    ],
)
def test_a_folder_of_another_request_is_refused_and_left_alone(sample, tmp_path, arguments, why):
    assert sample("a red ring")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, _, said = sample(*arguments)
    assert code == 2 and "out" in said and why in said and said.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_an_interrupted_run_leaves_what_is_drawn_and_goes_on(sample, tmp_path, monkeypatch):
    save = OutputFolder.save

    def interrupted(self, number, *rest, **metadata):
        if number == 2:
            raise KeyboardInterrupt
        save(self, number, *rest, **metadata)

    arguments = ("a red ring", "--count", 4)
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "save", interrupted)
        code, _, said = sample(*arguments)
    assert code == 130 and "2 of 4 images are generated; the same command generates the rest" in said
    there = make_images(tmp_path / "out")
    assert len(there) == 2
    code, said, _ = sample(*arguments)
    assert code == 0 and "4 images (2 existed)" in said
    assert sample(*arguments, out="at-once")[0] == 0
    assert (
        make_images(tmp_path / "out") == make_images(tmp_path / "at-once")
        and there.items() <= make_images(tmp_path / "out").items()
    )


def test_a_folder_of_a_newer_format_is_refused(sample, tmp_path):
    assert sample("a red ring")[0] == 0
    request = tmp_path / "out" / "run.json"
    request.write_text(json.dumps(json.loads(request.read_text()) | {"format_version": 99}))
    code, _, said = sample("a red ring")
    assert code == 1 and "run.json" in said and "format version 99" in said and said.count("\n") == 1


def test_a_full_disk_is_one_line(sample, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "save_png", full)
    code, _, said = sample("a red ring")
    assert code == 1 and said.count("\n") == 1 and "out cannot be written (No space left on device) after 0 of 1" in said


def test_an_out_that_cannot_be_written_is_known_before_drawing(sample, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for out in ("file", "file/images", "full"):
        code, _, said = sample("a red ring", out=out)
        assert code in (1, 2) and said.count("\n") == 1 and out in said
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_broken_lines_are_named_and_the_others_drawn_if_asked(sample, tmp_path):
    lines = ['{"prompt": "a ring"}', "broken", '{"prompt": "a star", "scheduler": "magic"}', '{"prompt": "a star"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    code, _, said = sample("--prompts", "prompts.jsonl")
    assert code == 2 and said.count("\n") == 1 and "prompts.jsonl, line 2: " in said and not (tmp_path / "out").exists()
    code, said, complaints = sample("--prompts", "prompts.jsonl", "--keep-going")
    assert code == 1 and "2 images" in said and "2 lines of prompts.jsonl are broken" in complaints
    assert "line 2: " in complaints and "line 3: no sampler 'magic'" in complaints
    there = make_images(tmp_path / "out")
    assert list(there) == ["0000-a-ring.png", "0003-a-star.png"]
    (tmp_path / "prompts.jsonl").write_text("\n".join([lines[0], '{"prompt": "two"}', '{"prompt": "three"}', lines[3]]))
    code, said, _ = sample("--prompts", "prompts.jsonl")
    assert code == 0 and "4 images (2 existed)" in said and there.items() <= make_images(tmp_path / "out").items()


def test_a_long_prompt_is_warned_of_with_the_words_that_are_cut(sample, tmp_path):
    long = " ".join(["ring"] * 22) + " upon a star"
    code, _, said = sample(long, "--negative", long)
    assert code == 0 and "does not see: 'upon a star'" in said
    (path,) = (tmp_path / "out").glob("0*.png")
    assert read_png(path)[0].prompt == read_png(path)[0].negative == long
    code, _, said = sample(long, "--strict", out="none")
    assert code == 2 and "upon a star" in said and not (tmp_path / "none").exists()


def test_the_grid_of_a_long_run_shows_its_beginning(sample, tmp_path):
    lines = "\n".join(f"ring {number}" for number in range(GRID_IMAGES + 3))
    (tmp_path / "prompts.txt").write_text(f"# rings\n\n{lines}\n")
    code, said, _ = sample("--prompts", "prompts.txt", "--batch-size", 32)
    assert code == 0 and f"{GRID_IMAGES + 3} images, grid.png of the first {GRID_IMAGES}" in said
    assert len(make_images(tmp_path / "out")) == GRID_IMAGES + 3


def test_previews_are_written_while_an_image_is_drawn(sample, tmp_path, monkeypatch):
    seen = []
    write = OutputFolder.preview

    def preview(self, *arguments):
        write(self, *arguments)
        with Image.open(self.path / "preview.png") as image:
            seen.append(np.asarray(image).std())

    monkeypatch.setattr(OutputFolder, "preview", preview)
    assert sample("a red ring", "--preview-every", 1)[0] == 0
    assert len(seen) == 2 and min(seen) > 1 and not (tmp_path / "out" / "preview.png").exists()


@pytest.mark.parametrize(
    "arguments, why",
    [
        ((), "give one of: prompts, --prompts FILE, --from-image PNG"),
        (("a ring", "--prompts", "prompts.txt"), "give one of"),
        (("",), "the prompt is empty"),
        (("a ring", "--steps", "0"), "steps is 0"),
        (("a ring", "--count", "0"), "--count is 0"),
        (("a ring", "--batch-size", "0"), "--batch-size is 0"),
        (("a ring", "--scheduler", "magic"), "choose one of: euler, "),
        (("a ring", "--eta", "0.3"), "give scheduler ddim, too"),
        (("a ring", "--size", "big"), "give WIDTHxHEIGHT"),
        (("a ring", "--size", "15"), "give multiples of 4 pixels"),
        (("a ring", "--original-size", "big"), "original_size is 'big'; give WIDTHxHEIGHT"),
        (("a ring", "--original-size", "64x48"), "made without micro-conditioning; leave out the original size"),
        (("a ring", "--crop-left", "2"), "made without micro-conditioning"),
        (("a ring", "--device", "tpu"), "device tpu is not on this machine; choose one of: cpu"),
        (("a ring", "--device", "cuda:99"), "device cuda:99 is not on this machine"),
        (("a ring", "--dtype", "fp16"), "dtype fp16 is for GPUs; on the cpu give bf16 or fp32"),
        (("a ring", "--dtype", "fp8"), "invalid choice: 'fp8'"),
        (("a ring", "--image", "gone.png"), "gone.png"),
        (("a ring", "--strength", "0.5"), "give image, too"),
        (("a ring", "--weak", "gone"), "gone is not a pipeline directory"),
        (("--prompts", "gone.txt"), "gone.txt cannot be read"),
        (("--from-image", "gone.png"), "gone.png cannot be read (No such file or directory); give an image"),
    ],
)
def test_bad_usage_is_one_line_and_leaves_nothing(sample, tmp_path, arguments, why):
    code, _, said = sample(*arguments)
    assert code == 2 and why in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_file_names_are_short_enough_for_any_file_system():
    for prompt in ("𝐚" * 300, "word " * 100, 'a/b\\c:d*?"<>|\n\0.png', "", "..", "\ud800"):
        name = file_name(12, prompt)
        assert name.startswith("0012") and name.endswith(".png") and len(name.encode()) < 200
        assert not set(name) & set('/\\:*?"<>|\n\0')
