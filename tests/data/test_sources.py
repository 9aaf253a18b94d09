"""What a spec means: folders, patterns and URLs by their manifest alone. Nothing here needs a server."""

import json
import shutil

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from ldm.data.manifest import IMAGE_SHARDS, LATENT_SHARDS, Manifest
from ldm.data.remote import ShardCache, redact
from ldm.data.sources import open_source
from ldm.errors import LdmError, UsageError

NAMES = [f"shapes-{number:05d}.tar" for number in range(3)]


@pytest.fixture
def folder(image_shards, tmp_path):
    shutil.copytree(image_shards, tmp_path / "data" / "train")
    return tmp_path / "data" / "train"


@pytest.fixture
def edit(folder):
    """Change the manifest's entries."""

    def change(**entries):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def names(source):
    return [entry.name for entry in source.manifest.shards]


def test_a_folder_is_all_its_shards_in_place(folder):
    source = open_source(folder, IMAGE_SHARDS)
    assert source.manifest == Manifest.load(folder) and not source.is_remote
    assert [source.path(number) for number in range(3)] == [folder / name for name in NAMES]
    source.check_cheap()


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("shapes-{00001..00002}.tar", NAMES[1:]),
        ("shapes-{00002,00000}.tar", [NAMES[0], NAMES[2]]),  # the manifest's order, not the pattern's
        ("{shapes-0000[01],*-00002}.tar", NAMES),
        ("*.tar", NAMES),
        ("shapes-0000?.tar", NAMES),
        ("shapes-00001.tar", NAMES[1:2]),
    ],
)
def test_a_pattern_chooses_shards_of_the_manifest_in_its_order(folder, pattern, chosen, monkeypatch):
    source = open_source(f"{folder}/{pattern}")
    assert names(source) == chosen and source.restricted
    whole = Manifest.load(folder)
    assert source.manifest.shards == tuple(entry for entry in whole.shards if entry.name in chosen)
    assert source.manifest.extra == whole.extra
    monkeypatch.chdir(folder.parent)
    assert open_source(f"train/{pattern}").locations == source.locations  # absolute


def test_the_cheap_check_is_of_the_chosen_shards(folder):
    first, rest = open_source(folder / NAMES[0]), open_source(f"{folder}/shapes-{{00001..00002}}.tar")
    (folder / NAMES[2]).unlink()
    (folder / "stray.tar").write_bytes(b"")
    first.check_cheap()
    with pytest.raises(LdmError, match=rf"{NAMES[2]} is listed in the manifest but missing"):
        rest.check_cheap()
    (folder / NAMES[2]).write_bytes(b"x" * rest.manifest.shards[1].bytes)
    rest.check_cheap()
    with pytest.raises(LdmError, match=r"stray\.tar is not listed"):
        open_source(folder).check_cheap()


def test_magic_characters_in_the_name_of_a_folder_or_shard_are_taken_as_they_are(folder, edit):
    odd = folder.parent / "run[1]{a,b}"
    folder.rename(odd)
    assert names(open_source(odd)) == names(open_source(odd / "*.tar")) == NAMES
    path = odd / "manifest.json"
    path.write_text(path.read_text().replace(NAMES[0], "a[0].tar"))
    assert names(open_source(odd / "a[0].tar")) == ["a[0].tar"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{0}/shapes-{{00001..00004}}.tar", r"lists no shapes-00003\.tar; choose among its 3 shards, shapes-00000"),
        ("{0}/other-*.tar", r"lists no other-\*\.tar"),
        ("{0}/shapes-{{0000.tar", "brace without its partner"),
        ("{0}/../tr*/shapes-00000.tar", "several folders.*list"),
        ("{0}/../{{train,test}}/shapes-00000.tar", "several folders.*list"),
        ("{0}/{{a/x,b/y}}.tar", "several folders.*list"),
        ("http://localhost:1/{{a,b}}/x.tar", "several folders.*list"),
        ("s3://bucket/*/x.tar", "several folders.*list"),
        ("{0}/..", r"no manifest\.json; run `ldm shards index"),
        ("{0}/../*.tar", r"no manifest\.json; run `ldm shards index"),
        ("{0}/nothing", "not a folder"),
        ("{0}/nothing/", "not a folder"),
        ("", "is empty"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error_that_names_it(folder, spec, words):
    spec = spec.format(folder)
    with pytest.raises(UsageError, match=words) as error:
        open_source(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        "pipe:touch {0}",
        "pipe://touch {0}",
        "PIPE:touch {0}",
        "file://{0}",
        "ftp://localhost/train",
        "memory://train",
        "local:///train",
        "github://a:b@c/train",
        "simplecache::http://localhost:1/train",
        "zip://train.zip::http://localhost:1/train",
        "http://localhost:1/train::x",
        "s3://bucket/train.tar::simplecache",
        "http:/localhost/train",
        "http://",
        "s3:///train",
        "http://localhost:1/train-?.tar",
        "s3://bucket/train-0000?.tar",
        "s3://bucket/train?token=1",
        "http://localhost:1/train#x",
    ],
)
def test_other_schemes_and_chains_are_refused_before_anything_is_opened(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: pytest.fail(f"{scheme} was opened"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        open_source(spec.format(tmp_path / "made"))
    assert list(tmp_path.iterdir()) == []


def test_a_location_takes_the_shards_elsewhere(folder, edit, tmp_path):
    moved = tmp_path / "data" / "far"
    folder.rename(moved)
    folder.mkdir()
    shutil.move(moved / "manifest.json", folder)
    with pytest.raises(LdmError, match="missing"):
        open_source(folder).check_cheap()
    edit(location="../far")
    source = open_source(folder)
    assert [source.path(number) for number in range(3)] == [moved / name for name in NAMES]
    source.check_cheap()
    edit(location="http://user:password@localhost:1/far away/?token=1")
    source = open_source(f"{folder}/*.tar", cache=ShardCache(tmp_path / "cache"))
    assert source.cache is not None and source.is_remote and source.cache.folder == tmp_path / "cache"
    assert source.locations[2] == f"http://user:password@localhost:1/far away/{NAMES[2]}?token=1"
    assert "password" not in repr(source) and "token" not in repr(source)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("pipe:touch {0}", "neither a local path"),
        ("http://user:password@localhost:1/a::b", "chains"),
        ("http://localhost:1/*.tar", "is a pattern"),
        (7, "should be a valid string"),
        ("nowhere", r"is no folder here \(/.*/nowhere\); mount or move the shards there"),
    ],
)
def test_a_location_is_held_to_the_same_rules(folder, edit, tmp_path, location, words):
    edit(location=location.format(tmp_path / "made") if isinstance(location, str) else location)
    with pytest.raises(LdmError, match=f"manifest.json: .?location.*{words}") as error:
        open_source(folder)
    assert not (tmp_path / "made").exists() and "password" not in str(error.value)


def test_the_format_and_an_empty_manifest_are_refused(folder, edit):
    with pytest.raises(UsageError, match=f"describes {IMAGE_SHARDS}"):
        open_source(folder, LATENT_SHARDS)
    edit(shards=[], samples=0, bytes=0)
    with pytest.raises(LdmError, match="lists no shard"):
        open_source(folder)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    assert ShardCache().folder == tmp_path and ShardCache().max_bytes == 50 * 2**30
    monkeypatch.delenv("LDM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache().folder == tmp_path / ".cache" / "ldm" / "shards"


@pytest.mark.parametrize("url", ["https://user:pass@host/a/b", "https://host/a/b?sig=pass", "https://u:p@ss@host/a/b?x=pass"])
def test_redact_leaves_the_address_alone(url):
    assert redact(url) == "https://host/a/b"
    assert redact("/data//me@home/what?.tar") == "/data//me@home/what?.tar"


def test_a_missing_transport_names_its_package(folder, edit, monkeypatch):
    def missing(scheme):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UsageError, match=r"s3://bucket/train.* needs the package s3fs; run `pip install s3fs`"):
        open_source("s3://bucket/train")
    edit(location="s3://bucket/train")
    with pytest.raises(UsageError, match="pip install s3fs"):
        open_source(folder)


def test_an_object_store_is_asked_by_its_keys(folder, tmp_path, monkeypatch):
    """A local file system stands in for s3fs; tests/data/test_remote.py has the real one where it is installed."""
    made = []

    class Bucket(LocalFileSystem):
        def __init__(self, config_kwargs, **options):
            super().__init__(**options)
            made.append(config_kwargs)

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("s3://bucket", str(folder.parent)))

    monkeypatch.setattr(fsspec, "get_filesystem_class", {"s3": Bucket}.__getitem__)
    source = open_source("s3://bucket/train/shapes-{00000..00001}.tar", cache=ShardCache(tmp_path / "cache"))
    assert source.locations == tuple(f"s3://bucket/train/{name}" for name in NAMES[:2])
    assert source.path(1).read_bytes() == (folder / NAMES[1]).read_bytes()
    assert len(made) == 2 and all(limits["read_timeout"] == 30 for limits in made)
    with pytest.raises(UsageError, match=r"no manifest\.json"):
        open_source("s3://bucket/other")
