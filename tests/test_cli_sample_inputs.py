"""Images made from images are repeatable by the hashes of their inputs; what a file says is never a path to follow."""

import json
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.cli import main
from ldm.files import sha256_file
from ldm.inference.metadata import read_png
from ldm.locks import hold_folder

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture(scope="session")
def model(make_pipeline, short_words, tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "model"
    make_pipeline(words=short_words).save_pretrained(path)
    return path


@pytest.fixture
def sample(model, tmp_path, monkeypatch, capsys):
    """Runs ``ldm sample`` in a new folder: exit code and its complaints, without progress bars."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, out="out", steps=("--steps", "2")):
        code = 0
        try:
            main(["sample", str(model), *steps, "--device", "cpu", *map(str, arguments), "--out", str(out)])
        except SystemExit as left:
            code = left.code
        errors = capsys.readouterr().err.splitlines()
        return code, "\n".join(line for line in errors if line.startswith("ldm: "))

    return run


@pytest.fixture
def photos(tmp_path):
    """An image and a mask in a folder of their own."""
    folder = tmp_path / "private"
    folder.mkdir()
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    image.save(folder / "photo.png")
    mask = Image.new("RGBA", (16, 16))
    mask.paste((255, 255, 255, 255), (8, 0, 16, 16))
    mask.save(folder / "mask.png")
    return folder


def texts_of(folder):
    """All that the files of a folder say, without its images' pixels."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            yield path.read_bytes().decode("latin-1")


def test_an_image_whose_opaque_part_was_kept_is_marked_as_a_composite(sample, photos, tmp_path):
    hole = Image.open(photos / "photo.png").convert("RGBA")
    hole.paste((0, 0, 0, 0), (0, 0, 8, 8))
    hole.save(photos / "hole.png")
    for name, mark in (("hole", "/compositeWithTrainedAlgorithmicMedia"), ("photo", "/trainedAlgorithmicMedia")):
        assert sample("a red ring", "--image", photos / f"{name}.png", out=name) == (0, "")
        made = tmp_path / name / "0000-a-red-ring.png"
        assert mark in Image.open(made).info["XML:com.adobe.xmp"] and read_png(made)[1].composite == (name == "hole")


def test_an_inpainted_image_is_repeated_from_the_hashes_of_its_files(sample, photos, tmp_path):
    given = ("--image", photos / "photo.png", "--mask", photos / "mask.png")
    assert sample("a red ring", *given) == (0, "")
    made = tmp_path / "out" / "0000-a-red-ring.png"
    settings = read_png(made)[0]
    assert settings.image == f"sha256:{sha256_file(photos / 'photo.png')}"
    assert settings.mask == f"sha256:{sha256_file(photos / 'mask.png')}"
    assert not any(str(tmp_path) in text or "photo.png" in text for text in texts_of(tmp_path / "out"))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "--image IMAGE --mask MASK --out again" in page and settings.image in page
    assert "compositeWithTrainedAlgorithmicMedia" in Image.open(made).info["XML:com.adobe.xmp"]

    code, said = sample("--from-image", made, out="without")
    assert (
        code == 2 and settings.image in said and "give that again, by --image" in said and not (tmp_path / "without").exists()
    )
    moved = photos.rename(tmp_path / "elsewhere")
    assert sample("--from-image", made, "--image", moved / "photo.png", "--mask", moved / "mask.png", out="again") == (0, "")
    assert (tmp_path / "again" / made.name).read_bytes() == made.read_bytes()
    Image.new("RGB", (16, 16)).save(tmp_path / "other.png")
    code, said = sample("--from-image", made, "--image", "other.png", "--mask", moved / "mask.png", out="third")
    assert code == 2 and "other.png is sha256:" in said and settings.image in said and not (tmp_path / "third").exists()


def test_copies_of_the_inputs_make_the_folder_enough(sample, photos, tmp_path):
    assert sample("a red ring", "--image", photos / "photo.png", "--copy-inputs") == (0, "")
    (copy,) = (tmp_path / "out" / "inputs").iterdir()
    assert copy.suffix == ".png" and copy.read_bytes() == (photos / "photo.png").read_bytes()
    shutil.rmtree(photos)
    made = (tmp_path / "out").rename(tmp_path / "archive") / "0000-a-red-ring.png"
    assert "--image" not in (tmp_path / "archive" / "index.html").read_text()
    assert sample("--from-image", made) == (0, "")
    assert (tmp_path / "out" / made.name).read_bytes() == made.read_bytes()
    copy = made.parent / "inputs" / copy.name
    Image.new("RGB", (16, 16)).save(copy)
    code, said = sample("--from-image", made, out="third")
    assert code == 2 and f"{copy} is sha256:" in said


def test_a_weak_model_is_known_by_its_hash(sample, model, tmp_path):
    weak = shutil.copytree(model, tmp_path / "weak")
    assert sample("a red ring", "--weak", weak) == (0, "")
    made = tmp_path / "out" / "0000-a-red-ring.png"
    code, said = sample("--from-image", made, out="again")
    assert code == 2 and "--weak of sha256:" in said
    assert sample("--from-image", made, "--weak", weak.rename(tmp_path / "moved"), out="again") == (0, "")
    assert (tmp_path / "again" / made.name).read_bytes() == made.read_bytes()


def test_a_changed_input_does_not_resume_another_run(sample, photos, tmp_path):
    assert sample("a red ring", "--image", photos / "photo.png") == (0, "")
    Image.new("RGB", (16, 16)).save(photos / "photo.png")
    code, said = sample("a red ring", "--image", photos / "photo.png")
    assert code == 2 and "was generated with image" in said


@pytest.fixture
def hostile(tmp_path):
    """Writes a PNG that names other settings."""

    def write(source, **settings):
        content = json.loads(Image.open(source).info["ldm"])
        content["settings"] |= settings
        chunks = PngInfo()
        chunks.add_text("ldm", json.dumps(content))
        Image.new("RGB", (16, 16)).save(tmp_path / "hostile.png", pnginfo=chunks)
        return tmp_path / "hostile.png"

    return write


def test_no_path_and_no_huge_number_in_an_image_is_followed(sample, photos, hostile, tmp_path):
    assert sample("a red ring") == (0, "")
    made = tmp_path / "out" / "0000-a-red-ring.png"
    os.mkfifo(tmp_path / "pipe")
    for path in (photos / "photo.png", tmp_path / "pipe", "/dev/zero", "../private/photo.png", "sha256:../../private", "a\0b"):
        for name in ("image", "weak"):
            code, said = sample("--from-image", hostile(made, **{name: str(path)}), out="again")
            assert code == 2 and f"was generated with --{name} of " in said and "\n" not in said
    for changes, why in (
        ({"steps": 10**6}, "1,000,000 steps are more than the limit of 1,000; raise it by --max-steps"),
        ({"steps": 10**15}, "steps are more than"),
        ({"width": 10**6}, "no side may be above 32768 pixels"),
        ({"width": 40_000, "height": 40_000}, "more than 67108864 pixels"),
    ):
        code, said = sample("--from-image", hostile(made, **changes), out="again", steps=())
        assert code == 2 and why in said and "\n" not in said
    assert not (tmp_path / "again").exists()
    # a setting on the command line is meant
    assert sample("--from-image", hostile(made, steps=10**6), out="again") == (0, "")


@pytest.mark.parametrize("option", ["--image", "--mask", "--from-image", "--prompts"])
def test_what_is_no_regular_file_is_refused_at_once(sample, photos, tmp_path, option):
    pipe = tmp_path / ("pipe.txt" if option == "--prompts" else "pipe")
    os.mkfifo(pipe)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket.txt"))
    kinds = {pipe: "a named pipe", tmp_path / "socket.txt": "cannot be read", photos: "a folder", "/dev/zero": "a device"}
    for path, kind in kinds.items():
        if option == "--prompts" and path in (photos, "/dev/zero"):
            continue  # refused by its name
        arguments = (option, path) if option in ("--from-image", "--prompts") else ("a ring", option, path)
        if option == "--mask":
            arguments += ("--image", photos / "photo.png")
        code, said = sample(*arguments)
        assert code == 2 and kind in said and "\n" not in said and not (tmp_path / "out").exists()
    server.close()


def test_a_second_run_into_a_folder_is_told_who_works_there(sample, tmp_path):
    said = []
    with hold_folder(tmp_path / "out", "generating images into out"):
        worker = threading.Thread(target=lambda: said.append(sample("a red ring")))
        worker.start()
        worker.join()
    ((code, line),) = said
    assert code == 2 and f"process {os.getpid()} on {socket.gethostname()}" in line and "\n" not in line
    assert sample("a red ring") == (0, "") and not (tmp_path / "out" / ".lock").exists()


def test_a_killed_run_ends_in_the_same_files(sample, tmp_path):
    for parent in ("whole", "killed"):
        assert sample("a red ring", "--count", 3, out=f"{parent}/{parent}") == (0, "")
    whole, killed = tmp_path / "whole" / "whole", tmp_path / "killed" / "killed"
    for name in ("index.html", "grid.png", "0002-a-red-ring.png"):
        (killed / name).unlink()
    for name in ("preview.png", ".0002-a-red-ring.png.1234.tmp"):
        (killed / name).write_bytes(b"half")
    assert sample("a red ring", "--count", 3, out="killed/killed") == (0, "")
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, killed))
    assert first == second


@pytest.mark.parametrize("name", ["0000-a-red-ring.png", "0099-stray.png"])
def test_postscript_among_the_images_starts_no_program(sample, tmp_path, monkeypatch, name):
    assert sample("a red ring") == (0, "")
    (tmp_path / "out" / name).write_bytes(EPS)
    monkeypatch.setattr("subprocess.Popen", None)
    code, said = sample("a red ring")
    page = (tmp_path / "out" / "index.html").read_text()
    if name.startswith("0099"):
        assert code == 0 and "is not a whole PNG" in page
    else:
        assert code == 1 and f"{name}: not a PNG image" in said and "\n" not in said


@pytest.mark.parametrize(
    "content",
    [
        *("", "null", "[]", "{}", '{"images": []}', '{"images": {"a": 1}}', '{"images": {}, "model": 1}', "[" * 10_000, "NaN"),
        '{"images": {}, "model": "a", "model_hash": "b", "dtype": "c", "format_version": "1"}',
        '{"format_version": 1e400}',
    ],
)
def test_a_run_json_of_anything_is_one_line(sample, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(content)
    code, said = sample("a red ring")
    assert code in (1, 2) and "run.json" in said and "\n" not in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["0001-a-red-ring.png", "grid.png", "index.html"])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_generated(sample, tmp_path, name):
    assert sample("a red ring") == (0, "")
    (tmp_path / "out" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "out" / name)
    code, said = sample("a red ring", "--count", 2)
    assert code == 2 and f"{name} is a named pipe" in said and "\n" not in said
    assert len([*(tmp_path / "out").glob("0*.png")]) == 1 + name.startswith("0")


def test_every_png_is_marked_as_generated(sample, tmp_path):
    assert sample("a red ring", "a star", "--preview-every", 1) == (0, "")
    images = [*(tmp_path / "out").glob("*.png")]
    assert len(images) == 3 and all("trainedAlgorithmicMedia" in Image.open(path).info["XML:com.adobe.xmp"] for path in images)
    stored = json.loads(Image.open(tmp_path / "out" / "grid.png").info["ldm"])
    assert [one["prompt"] for one in stored["settings"]] == ["a red ring", "a star"]
    assert sample("a red ring", "--no-metadata", out="plain") == (0, "")
    assert all(not Image.open(path).info for path in (tmp_path / "plain").glob("*.png"))


@pytest.mark.parametrize(
    "out", ["/dev/null", "/dev/null/images", "/proc/images", "x" * 300, "a\0b", "\ud800", "file", "file/x"]
)
def test_an_out_that_cannot_be_made_is_one_line_before_the_model_is_opened(sample, tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("ldm.inference.generate.load_pipeline", None)
    code, said = sample("a red ring", out=out)
    assert code in (1, 2) and said.startswith("ldm: ") and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_current_folder_and_a_link_serve(sample, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert sample("a red ring", out="link") == (0, "") and (tmp_path / "real" / "grid.png").exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert sample("a red ring", out=".") == (0, "") and (tmp_path / "empty" / "grid.png").exists()
