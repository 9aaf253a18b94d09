import json
import os

import pytest

from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest, ShardEntry
from ldm.errors import LdmError, UsageError

ENTRIES = (ShardEntry("a-00000.tar", 3, 10, "0" * 64), ShardEntry("a-00001.tar", 2, 7, "1" * 64))


@pytest.fixture
def folder(tmp_path):
    for entry in ENTRIES:
        (tmp_path / entry.name).write_bytes(b"x" * entry.bytes)
    Manifest(IMAGE_SHARDS, ENTRIES, {"image_size": 32}).save(tmp_path)
    return tmp_path


def test_load_gives_back_what_save_wrote(folder):
    manifest = Manifest.load(folder, IMAGE_SHARDS)
    assert manifest == Manifest(IMAGE_SHARDS, ENTRIES, {"image_size": 32})
    assert (manifest.samples, manifest.bytes) == (5, 17)
    value = json.loads((folder / "manifest.json").read_text())
    assert (value["format"], value["version"], value["samples"], value["bytes"]) == (IMAGE_SHARDS, 1, 5, 17)
    manifest.check_cheap(folder)


def test_hash_is_that_of_the_shards_alone():
    assert Manifest(IMAGE_SHARDS, ENTRIES).hash == Manifest(IMAGE_SHARDS, ENTRIES, {"image_size": 8}).hash
    assert Manifest(IMAGE_SHARDS, ENTRIES).hash != Manifest(IMAGE_SHARDS, ENTRIES[::-1]).hash


def test_extra_cannot_hide_the_manifests_own_keys():
    with pytest.raises(ValueError, match="samples"):
        Manifest(IMAGE_SHARDS, ENTRIES, {"samples": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "1"}, "not a whole number"),
        ({"version": None}, "no format version"),
        ({"format": "other"}, "not a manifest"),
        ({"samples": 4}, '"samples" is 4'),
        ({"shards": None}, "shards: should be a valid array"),
        ({"shards": [{"name": "a.tar"}]}, "shards.0.samples: field required"),
        *(
            ({"shards": [{"name": "a.tar", "samples": 5, "bytes": 17, "sha256": "0" * 64} | change]}, words)
            for change, words in [
                ({"name": "../a.tar"}, "shards.0.name: must be the plain name of a .tar file"),
                ({"name": "a\0.tar"}, "shards.0.name"),
                ({"name": "a" * 252 + ".tar"}, "shards.0.name"),
                ({"name": None}, "shards.0.name"),
                ({"samples": -5}, "shards.0.samples"),
                ({"samples": 5.0}, "shards.0.samples"),
                ({"samples": True}, "shards.0.samples"),
                ({"samples": 10**15}, "shards.0.samples"),
                ({"bytes": 2**41}, "shards.0.bytes"),
                ({"sha256": "../x"}, "shards.0.sha256"),
                ({"sha256": "0" * 64 + "\n"}, "shards.0.sha256"),
            ]
        ),
        ({"captioned": "yes"}, "captioned"),
        ({"captioned": float("nan")}, "JSON"),
        ({"key_dot": "second"}, "key_dot"),
        ({"location": ["a"]}, "location"),
    ],
)
def test_broken_manifest_is_one_line_with_its_name_and_the_fix(folder, change, words):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LdmError) as error:
        Manifest.load(folder, IMAGE_SHARDS)
    message = str(error.value)
    assert str(path) in message and words in message and "\n" not in message
    assert "ldm shards index" in message or "write it again" in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not readable JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"[" * 100_000, "JSON"),
        (b'{"a": "\\ud800"}', "JSON"),
        (b'{"samples": ' + b"9" * 5000 + b"}", "JSON"),
    ],
)
def test_what_is_no_manifest_is_one_line(folder, data, words):
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(LdmError, match=f"manifest.json.*{words}") as error:
        Manifest.load(folder)
    assert "\n" not in str(error.value)


def test_a_manifest_is_a_regular_file(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(LdmError, match=r"manifest\.json is a named pipe; restore the manifest"):
        Manifest.load(folder)


def test_a_newer_manifest_is_refused_by_name(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(LdmError, match=rf"^{path} has format version 2, .* up to 1; install the newer ldm"):
        Manifest.load(folder)


def test_missing_folder_manifest_and_wrong_format_are_usage_errors(folder, tmp_path):
    with pytest.raises(UsageError, match="not a folder"):
        Manifest.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no manifest\.json; run `ldm shards index"):
        Manifest.load(tmp_path / "empty", IMAGE_SHARDS)
    with pytest.raises(UsageError, match=r"no manifest\.json; run `ldm latents export"):
        Manifest.load(tmp_path / "empty", LATENT_SHARDS)
    with pytest.raises(UsageError, match=f"describes {IMAGE_SHARDS}, but {LATENT_SHARDS}"):
        Manifest.load(folder, LATENT_SHARDS)


def test_check_cheap_sees_missing_resized_and_unlisted_shards(folder):
    manifest = Manifest.load(folder)
    (folder / "._a-00000.tar").write_bytes(b"")  # macOS leaves such files behind
    manifest.check_cheap(folder)
    (folder / "b.tar").write_bytes(b"")
    (folder / "a-00000.tar").unlink()
    (folder / "a-00001.tar").write_bytes(b"x")
    assert [(p.where, p.what.split(",")[0]) for p in manifest.cheap_problems(folder)] == [
        ("a-00000.tar", "is listed in the manifest but missing"),
        ("a-00001.tar", "has 1 bytes"),
        ("b.tar", "is not listed in the manifest"),
    ]
    with pytest.raises(LdmError, match=r"a-00000\.tar is listed.*ldm shards index"):
        manifest.check_cheap(folder)
