"""Reading and writing files that may be anything: regular files only, typed JSON, atomic output."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field

from ldm import files
from ldm.errors import LdmError, UsageError
from ldm.files import (
    MAX_YAML_VALUES,
    atomic_file,
    atomic_folder,
    check_yaml,
    parse_json,
    read_bytes,
    read_json,
    read_yaml,
    require_new_folder,
    require_output_file,
    require_version,
    write_json,
)
from tests.samples import yaml_bomb


def test_an_older_format_and_one_without_a_version_are_read() -> None:
    for found in (None, 0, 1, 2):
        require_version(found, 2, "shards/manifest.json: the manifest")


def test_a_newer_format_is_refused_by_name_with_the_fix() -> None:
    said = r"shards/manifest\.json: the manifest has format version 3\b.*up to 2\b.*newer ldm"
    with pytest.raises(LdmError, match=said) as refused:
        require_version(3, 2, "shards/manifest.json: the manifest")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("found", ["2", 1.0, True, -1, []])
def test_an_invalid_version_is_refused(found: object) -> None:
    with pytest.raises(LdmError, match="not a whole number"):
        require_version(found, 2, "run.json")


@dataclass
class Entry:
    name: str
    samples: Annotated[int, Field(ge=0, le=100)]
    scale: float = 1.0
    sizes: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def test_what_is_written_is_read_as_its_type(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "é 🔴", "samples": 3, "scale": 2, "sizes": [4, 5], "later": None})
    assert read_json(tmp_path / "a.json", Entry) == Entry("é 🔴", 3, 2.0, (4, 5))
    assert read_json(tmp_path / "a.json")["later"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a", "samples": true}', "samples: should be a valid integer, not True"),
        ('{"name": "a", "samples": 1.0}', "samples: should be a valid integer"),
        ('{"name": "a", "samples": -1}', "samples: should be greater than or equal to 0, not -1"),
        ('{"name": "a", "samples": 1e3}', "samples:"),
        ('{"name": "a", "samples": 101}', "samples: should be less than or equal to 100"),
        ('{"name": null, "samples": 1}', "name: should be a valid string, not None"),
        ('{"samples": 1}', "name: field required"),
        ('{"name": "a", "samples": 1, "sizes": [1, "2"]}', r"sizes\.1: should be a valid integer"),
        ('{"name": "a", "samples": 1, "scale": NaN}', "not readable JSON"),
        ('{"name": "a", "samples": 1, "extra": {"deep": [Infinity]}}', "not readable JSON"),
        ('{"name": "a", "samples": %s}' % ("9" * 5000), "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[]", "the whole file: should be an object"),
        ("null", "the whole file"),
        ("", "not readable JSON"),
        ('{"name": "a", "samp', "not readable JSON"),
        ('{"name": "\\ud800", "samples": 1}', "not readable JSON"),
        ('{"name": ["\\u001b]0;title\\u0007"], "samples": 1}', "name: should be a valid string"),
    ],
)
def test_json_of_another_shape_is_one_line_with_file_key_and_fix(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(LdmError, match=said) as refused:
        read_json(path, Entry)
    message = str(refused.value)
    assert str(path) in message and "write it again or restore it" in message
    assert len(message) < 400 + len(str(path)) and message.isprintable()


def test_json_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(LdmError, match="a is not readable JSON"):
        parse_json(b'{"name": "\xff"}', "a")


def special_files(folder: Path) -> list[Path]:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    (folder / "link").symlink_to(folder / "pipe")
    return [folder / "pipe", folder / "socket", folder / "link", folder, Path("/dev/zero"), Path("/dev/full")]


def test_only_regular_files_are_read_and_without_waiting(tmp_path: Path) -> None:
    for path in special_files(tmp_path):
        with pytest.raises(LdmError) as refused:
            read_bytes(path, 100, fix="give an image")
        assert str(path) in str(refused.value) and str(refused.value).endswith("give an image")


@pytest.mark.parametrize("name", ["nul\0", "\udcff\ud800", "a" * 5000, "absent", "file/inside"])
def test_a_name_that_no_file_has_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for action in (lambda path: read_bytes(path, 10), read_json):
        with pytest.raises(LdmError) as refused:
            action(f"{tmp_path}/{name}")
        assert str(refused.value).isprintable()


def test_a_file_over_the_limit_is_refused_and_one_at_the_limit_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(LdmError, match="larger than the limit of 4 bytes"):
        read_bytes(tmp_path / "a", 4)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(LdmError, match="larger than the limit"):
        read_bytes(tmp_path / "sparse", 2**30)


def test_output_never_replaces_a_file_of_the_input(tmp_path: Path) -> None:
    for name in ("manifest.json", "page.html"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "manifest.json")
    for inputs in ([tmp_path], [None, tmp_path / "manifest.json"]):
        for name in ("manifest.json", "link"):
            with pytest.raises(UsageError, match=r"manifest\.json is a file of .*, which is read"):
                require_output_file(tmp_path / name, inputs)
    require_output_file(tmp_path / "page.html", [tmp_path])
    require_output_file(tmp_path / "metrics.json", [tmp_path])
    require_output_file(tmp_path / "manifest.json", [tmp_path / "other"])


def test_output_replaces_regular_files_only_and_follows_links(tmp_path: Path) -> None:
    for path in special_files(tmp_path):
        with pytest.raises(UsageError, match="not overwritten"), atomic_file(path) as file:
            file.write(b"x")
        assert path.exists() and not path.is_file()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "elsewhere" / "target")
    with atomic_file(tmp_path / "alias") as file:
        file.write(b"x")
    assert (tmp_path / "alias").is_symlink() and (tmp_path / "elsewhere" / "target").read_bytes() == b"x"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for path in ("file", "file/inside", ".", "/proc/new", "/proc", "", "nul\0", "\ud800", "a" * 300, "."):
        with pytest.raises(UsageError) as refused:
            require_new_folder(path, "the run")
        assert str(refused.value).isprintable(), path
    os.chdir("..")
    (tmp_path / "file").unlink()
    (tmp_path / files.LOCK_NAME).touch()  # the lock of the process itself is not work
    require_new_folder(tmp_path, "the run")


def test_finished_work_is_kept_when_its_name_was_taken_meanwhile(tmp_path: Path) -> None:
    out, said = tmp_path / "out", "the work is complete and kept in"
    with pytest.raises(LdmError, match=said) as refused, atomic_folder(out) as folder:
        (folder / "work").write_text("done")
        out.mkdir()
        (out / "other").touch()
    assert str(folder) in str(refused.value) and (folder / "work").read_text() == "done"
    assert [path.name for path in out.iterdir()] == ["other"]


def test_a_folder_is_made_through_a_link_or_over_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "a").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").exists()
    with pytest.raises(ValueError), atomic_folder(tmp_path / "failed"):
        raise ValueError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def yaml_of(size: int) -> str:
    return f"[{', '.join(['0'] * (size - 1))}]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (yaml_bomb(9, 9), "more than"),
        (yaml_bomb(60, 2), "more than"),
        ("a: &a {b: *a}", r"\*a stands before the end of &a"),
        ("a: *b", r"\*b stands before the end of &b"),
        ("[" * 100_000, "more than|nesting"),
        ("{a: " * 3000 + "1" + "}" * 3000, "more than|nesting"),
        (yaml_of(MAX_YAML_VALUES + 1), "more than"),
    ],
)
def test_yaml_that_grows_beyond_memory_is_refused_before_it_is_built(text: str, said: str) -> None:
    with pytest.raises(yaml.YAMLError, match=said):
        check_yaml(text)


def test_yaml_with_a_few_aliases_is_read() -> None:
    check_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}")
    check_yaml(yaml_of(MAX_YAML_VALUES))


@pytest.mark.parametrize(
    "text", [yaml_bomb(9, 9), "a: 2020-99-99", "1" * 5000, "a: [", "!!python/name:os.system", "a: *b", "\0"]
)
def test_yaml_that_cannot_be_loaded_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(LdmError, match=r"config\.yaml") as refused:
        read_yaml(tmp_path / "config.yaml")
    assert str(refused.value).isprintable()


def test_yaml_is_checked_against_a_type(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: &n 4\nmore: [*n, *n]\n")
    assert read_yaml(tmp_path / "config.yaml", dict[str, Any]) == {"steps": 4, "more": [4, 4]}
    with pytest.raises(LdmError, match=r"config\.yaml: more: should be a valid integer"):
        read_yaml(tmp_path / "config.yaml", dict[str, int])


def test_sigterm_removes_the_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as leave, atomic_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    assert leave.value.code == 143 and os.listdir(tmp_path) == []


def test_something_else_than_a_folder_is_never_to_be_removed() -> None:
    with pytest.raises(UsageError) as error:
        require_new_folder(os.devnull, "the work")
    assert "is a device" in str(error.value) and "remove" not in str(error.value)
