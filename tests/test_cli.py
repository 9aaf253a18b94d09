"""The command line: invalid input gives one line that names the thing and the fix, and writes nothing."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli import main
from ldm.cli.parser import print_table
from ldm.errors import UsageError


def run(capsys: pytest.CaptureFixture, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, and the lines of stderr that begin with ``ldm:``."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as leave:
        code = int(leave.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, "\n".join(line for line in captured.err.splitlines() if line.startswith("ldm:"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"red number {number}")
    return folder


def test_python_m_ldm_is_the_command() -> None:
    said = subprocess.run([sys.executable, "-m", "ldm", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("ldm ")


def test_help_and_packing_do_not_wait_for_torch(tmp_path: Path, photos: Path) -> None:
    program = """
import sys
from ldm.cli import main
from ldm.cli.parser import print_table
from ldm.errors import UsageError
try:
    main(sys.argv[1:])
finally:
    loaded = {"torch", "diffusers", "transformers", "lightning"} & sys.modules.keys()
    assert not loaded, loaded
"""
    for arguments in (["--help"], ["sample", "--help"], ["shards", "pack", str(photos), str(tmp_path / "p"), "--size", "32"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_invalid_usage_is_one_line_with_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    code, _, said = run(capsys, "shards", "shapes")
    assert code == 2 and said.count("\n") == 0 and "out" in said and "--help" in said


def command(*arguments: str | bytes, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``python -m ldm`` as a process."""
    words = [sys.executable, "-m", "ldm", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment)
    return done.returncode, done.stdout, done.stderr


SAMPLE = ("sample", "nowhere", "a ring", "--out", "nowhere")


@pytest.mark.parametrize(
    "swallowed", ["except KeyboardInterrupt: pass", "except BaseException: raise ImportError('numpy')", "finally: pass"]
)
def test_ctrl_c_during_imports_ends_any_command_in_one_line(tmp_path: Path, swallowed: str) -> None:
    """A module takes the KeyboardInterrupt of its import for another error, as numpy's C code does, or drops it."""
    interrupted = f"""
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
{swallowed}
"""
    for name, arguments in (("torch", SAMPLE), ("torch", ("denoiser", "fit")), ("ldm.data.pack", ("shards", "pack", "a", "b"))):
        (tmp_path / "sitecustomize.py").write_text(f"""
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_loader
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            return spec_from_loader(name, SourceFileLoader(name, {str(tmp_path / "interrupted.py")!r}))
sys.meta_path.insert(0, Finder())
""")
        (tmp_path / "interrupted.py").write_text(interrupted)
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        assert command(*arguments, PYTHONPATH=path) == (130, "", "ldm: interrupted\n")


def test_a_background_job_keeps_ignoring_ctrl_c() -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from ldm.__main__ import main; main()"
    program = f"import sys; sys.argv[1:] = ['--version']\ntry:\n    exec({program!r})\nfinally:\n    print(signal.getsignal(2))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1"  # SIG_IGN


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (raised(RuntimeError("Failed to import"), KeyboardInterrupt()), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 1, "not enough memory"),
        (RuntimeError("can't start new thread"), 1, "not enough memory"),
        (raised(RuntimeError("Failed to import"), MemoryError()), 1, "not enough memory"),
        (
            raised(RuntimeError("Failed to import"), ImportError("libtorch.so: failed to map")),
            1,
            "(libtorch.so: failed to map)",
        ),
        (ImportError("libtorch.so: failed to map"), 1, "a package cannot be imported (libtorch.so"),
        (OSError(12, "Cannot allocate memory"), 1, "Cannot allocate memory"),
        (BlockingIOError(11, "Resource temporarily unavailable"), 1, "temporarily unavailable"),
        (UsageError("give\n\x1b]0;another\x07"), 2, r"give \x1b]0;another\x07"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(arguments: object) -> None:
        raise error

    monkeypatch.setattr("ldm.cli.dispatch", fail)
    found, _, said = run(capsys, "report", "run")
    assert found == code and line in said and said.startswith("ldm: ") and said.count("\n") == 0


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr("ldm.cli.dispatch", fail)
    with pytest.raises(KeyError):
        main(["report", "run"])


def test_without_docstrings_no_network_is_loaded() -> None:
    code, _, said = command(*SAMPLE, PYTHONOPTIMIZE="2")
    assert code == 2 and said.startswith("ldm: python -OO") and said.count("\n") == 1
    assert command("shards", "pack", "nowhere", "out", PYTHONOPTIMIZE="2")[2].startswith("ldm: nowhere")


def test_arguments_that_are_no_text_are_refused(capsys: pytest.CaptureFixture) -> None:
    for argument in ("\udcff.png", "a\0b"):
        for arguments in (["shards", "pack", argument, "out"], ["denoiser", "fit", "--out", argument], ["report", argument]):
            code, _, said = run(capsys, *arguments)
            assert code == 2 and "is not UTF-8 text" in said and said.count("\n") == 0
    code, _, said = command("report", b"\xff")
    assert code == 2 and said.startswith(r"ldm: the argument '\udcff' is not UTF-8 text") and said.count("\n") == 1


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    words = [sys.executable, "-m", "ldm", "sample", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_tables_show_foreign_text_as_it_is(capsys: pytest.CaptureFixture) -> None:
    print_table({"[red]\x1b]0;title\x07": ["[/]"]}, "a\x1b[2Jb")
    out = capsys.readouterr().out
    assert all(text in out for text in (r"[red]\x1b]0;title\x07", "[/]", r"a\x1b[2Jb"))


def test_shapes_pack_index_check(capsys: pytest.CaptureFixture, tmp_path: Path, photos: Path) -> None:
    assert run(capsys, "shards", "shapes", tmp_path / "s", "--count", "25", "--size", "32", "--shard-size", "10")[0] == 0
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [10, 10, 5]
    assert run(capsys, "shards", "pack", photos, tmp_path / "p", "--size", "32")[0] == 0
    (tmp_path / "p/manifest.json").unlink()
    code, out, _ = run(capsys, "shards", "index", tmp_path / "p")
    assert code == 0 and "3 samples in 1 shards" in out and "skipped" not in out
    code, out, _ = run(capsys, "shards", "check", tmp_path / "p", "--deep")
    assert code == 0 and "is complete: every sample decodes" in out
    shard = next((tmp_path / "p").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    code, out, said = run(capsys, "shards", "check", tmp_path / "p", "--deep")
    assert code == 1 and shard.name in out and "problem" in said


def test_index_and_check_report_unusable_samples(capsys: pytest.CaptureFixture, tmp_path: Path, photos: Path) -> None:
    """One sample of four has an invalid image, another none: a table, a line for each, and exit code 1."""
    image, folder = (photos / "0.png").read_bytes(), tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("0.png", image), ("1.png", b"none"), ("2.json", b"{}"), ("3.png", image)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    code, out, _ = run(capsys, "shards", "index", folder)
    assert code == 0 and "4 samples in 1 shards" in out and "1 of them have no image or a duplicate key" in out
    for deep, usable, problems in (
        ([], 3, ["a.tar: 2 has no image"]),
        (["--deep"], 2, ["a.tar: 1 not a", "a.tar: 2 has"]),
    ):
        code, out, said = run(capsys, "shards", "check", folder, *deep)
        assert code == 1 and said == f"ldm: {folder}: {len(problems)} problem(s)"
        assert all(any(line.startswith(problem) for line in out.splitlines()) for problem in problems)
        row = next(line for line in out.splitlines() if "problem(s)" in line)
        assert [cell.strip() for cell in re.split("[│|]", row)[1:4]] == ["a.tar", "4", str(usable)]


@pytest.mark.parametrize("kind", ["missing", "no images", "captions without columns", "captions name a missing image"])
def test_pack_refuses_in_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture, tmp_path: Path, photos: Path, kind: str
) -> None:
    source, extra, named = photos, [], ""
    if kind == "missing":
        source = named = tmp_path / "nowhere"
    elif kind == "no images":
        source = named = tmp_path / "empty"
        source.mkdir()
    else:
        named = tmp_path / "captions.csv"
        rows = "name,words\n0.png,hello\n" if "columns" in kind else "file,caption\n0.png,hello\ngone.png,bye\n"
        named.write_text(rows)
        extra = ["--captions", named]
    code, _, said = run(capsys, "shards", "pack", source, tmp_path / "out", *extra)
    assert code in (1, 2) and said.count("\n") == 0 and str(named) in said
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_other_work_is_not_touched(capsys: pytest.CaptureFixture, tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    config = Path(__file__).parents[1] / "configs/shapes/autoencoder.yaml"
    for arguments in (
        ["shards", "pack", photos, out],
        ["shards", "shapes", out, "--count", "3"],
        ["quickstart", "--out", out],
        ["autoencoder", "fit", "--config", config, "--out", out],
        ["sample", out, "a red ring", "--out", out],
    ):
        code, _, said = run(capsys, *arguments)
        assert code == 2 and str(out) in said, arguments
        assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--data.train", "/nowhere"], "data.train"),
        (["--model.adversary.start", "999999"], "adversary's start 999999"),
        (["--model.autoencoder.sample_size", "50"], "sample_size"),
        (["--model.no_such_key", "1"], "no_such_key"),
        (["--trainer.precision", "16-mixed"], "trainer.precision"),
        (["--model.adversary.guard.lower", "2"], "guard's lower 2.0"),
        (["--model.equivariance.probability", "2"], "Equivariance: probability 2"),
        (
            ["--model.autoencoder.block_out_channels", "[16, 16, 16, 16, 16]", "--model.autoencoder.sample_size", "80"],
            "downsampling factor 16",
        ),
        (["--config", "no/such/file.yaml"], "no/such/file.yaml"),
    ],
)
def test_fit_refuses_invalid_settings_before_it_writes(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[1] / "configs/shapes/autoencoder.yaml"
    main(["shards", "shapes", "shapes", "--count", "20", "--size", "40"])
    main(["shards", "shapes", "shapes-validation", "--count", "4", "--size", "40"])
    code, _, said = run(capsys, "autoencoder", "fit", "--config", config, "--out", "run", *changes)
    assert code == 2 and named in said and said.count("\n") == 0
    assert not (tmp_path / "run").exists()
