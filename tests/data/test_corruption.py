"""Whatever happens to a shard, it is refused, found or put aside with its reason, and no sample is lost from the count."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.check import check_folder
from ldm.data.datamodule import ShardDataModule
from ldm.data.image_dataset import ImageDataset
from ldm.data.manifest import Manifest
from ldm.data.quarantine import BadSample
from ldm.data.shards import ShardReader
from ldm.data.writer import ShardWriter
from ldm.errors import LdmError
from ldm.files import sha256_file
from tests import samples
from tests.samples import write_tar

encoded = partial(samples.encoded, format="JPEG")

# three shards of eight samples; the one in the middle, with keys 08 to 15, is spoilt
SHARD = "x-00001.tar"
KEYS = [f"{number:02d}" for number in range(24)]


def make_image(number: int) -> Image.Image:
    """A smooth image of its own colours for each sample."""
    y, x = np.mgrid[:16, :16] * 8
    return Image.fromarray(np.stack([x, y, np.full_like(x, number * 10)], -1).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path, "x", samples_per_shard=8) as writer:
        for number, key in enumerate(KEYS):
            writer.write(key, {"jpg": encoded(make_image(number), quality=95), "txt": f"image {number}".encode()})
    Manifest("ldm-image-shards", tuple(writer.entries), {"captioned": 24}).save(tmp_path)
    return tmp_path


def renew(folder: Path) -> None:
    """Let the manifest agree with the size and hash of the spoilt shard, as if it had been made with it."""
    manifest = Manifest.load(folder)
    path = folder / SHARD
    now = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    shards = tuple(replace(entry, **now) if entry.name == SHARD else entry for entry in manifest.shards)
    replace(manifest, shards=shards).save(folder)


# what happens to the bytes of the shard


def member_at(path: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def cut(name: str, where: Callable[[tarfile.TarInfo], int]) -> Callable[[Path], None]:
    """End the shard somewhere at a member."""
    return lambda path: os.truncate(path, where(member_at(path, name)))


def overwrite(name: str, data: bytes, where: Callable[[tarfile.TarInfo], int]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(where(member_at(path, name)))
            file.write(data)

    return change


def flip_bit(path: Path) -> None:
    """In the middle of the compressed pixels."""
    member = member_at(path, "10.jpg")
    data = bytearray(path.read_bytes())
    data[member.offset_data + member.size - 40] ^= 4
    path.write_bytes(data)


# what happens to its members


def with_members(change: Callable[[dict[str, bytes]], dict[str, bytes] | list[tuple[str, bytes]]]) -> Callable[[Path], None]:
    """Write the shard anew from other members; a list may hold a name twice."""

    def rewrite(path: Path) -> None:
        with tarfile.open(path) as tar:
            members = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
        changed = change(members)
        write_tar(path, changed.items() if isinstance(changed, dict) else changed)

    return rewrite


def member(name: str, data: bytes) -> Callable[[Path], None]:
    """Another member, or other bytes in one; a sample's image is replaced by one of any format."""

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        key, _, extension = name.partition(".")
        if extension in ("png", "webp"):
            del members[f"{key}.jpg"]
        return members | {name: data}

    return with_members(change)


def without(name: str) -> Callable[[Path], None]:
    return with_members(lambda members: {other: data for other, data in members.items() if other != name})


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """All of a sample's members under another key."""
    return with_members(lambda members: [(name.replace(f"{old}.", f"{new}."), data) for name, data in members.items()])


def bomb_png() -> bytes:
    """One grey line whose header says 30000 x 30000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(30001))) + chunk(b"IEND", b"")


def bomb_jpeg() -> bytes:
    data = bytearray(encoded(make_image(10)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 30000, 30000)
    return bytes(data)


class Trap:
    """Makes a file where whoever unpickles it stands."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch sprung",)


GREY_16 = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
ANIMATION = {"save_all": True, "append_images": [make_image(11)], "duration": 100}
PAGE = b"<!DOCTYPE html>\n<html><title>503 Service Unavailable</title></html>\n".ljust(2000)


@dataclass(frozen=True)
class Corruption:
    """One thing that happens to the shard in the middle.

    Attributes:
        change: spoils the shard.
        bad: key (or #row, where it cannot be known) => the beginning of the reason. Empty: all samples can be used.
        of_shard: what the check finds of the shard as a whole, once the manifest agrees with its size and hash.
        keeps_size: so that only the hash shows it, where the manifest does not agree.
        blind: these keys may be read as they are or be put aside: nothing but the hash tells.
    """

    change: Callable[[Path], object]
    bad: dict[str, str] = field(default_factory=dict)
    of_shard: tuple[str, ...] = ()
    keeps_size: bool = False
    blind: frozenset[str] = frozenset()


def missing(first: int, why: str) -> dict[str, str]:
    return {f"#{row}": f"is missing: the shard {why}" for row in range(first, 8)}


def holds(samples: int) -> str:
    return f"holds {samples} samples, the manifest says 8"


BLOCK = tarfile.BLOCKSIZE
CORRUPTIONS = {
    "cut at a member boundary": Corruption(
        cut("11.jpg", lambda member: member.offset),
        missing(3, "is cut short at byte"),
        ("is cut short", holds(3)),
    ),
    "cut inside a header": Corruption(
        cut("11.jpg", lambda member: member.offset + 200),
        missing(3, "is cut short at byte"),
        ("is cut short", holds(3)),
    ),
    "cut inside data": Corruption(
        cut("11.jpg", lambda member: member.offset_data + 100),
        missing(3, "is cut short at byte"),
        ("is cut short", holds(3)),
    ),
    "cut between image and caption": Corruption(
        cut("11.txt", lambda member: member.offset),
        {"11": "has no caption"} | missing(4, "is cut short at byte"),
        ("is cut short", holds(4)),
    ),
    "zeroed headers in the middle": Corruption(
        overwrite("11.jpg", bytes(2 * BLOCK), lambda member: member.offset),
        missing(3, "holds data after its end mark at byte"),
        ("holds data after its end mark", holds(3)),
        keeps_size=True,
    ),
    "zeroed data in the middle": Corruption(
        overwrite("11.jpg", bytes(BLOCK), lambda member: member.offset_data),
        {"11": "not a JPEG, PNG or WebP image (but zero bytes)"},
        keeps_size=True,
    ),
    "a broken header": Corruption(
        overwrite("11.jpg", b"?", lambda member: member.offset),
        missing(3, "has a broken header at byte"),
        ("has a broken header", holds(3)),
        keeps_size=True,
    ),
    "an HTML page in its place": Corruption(
        lambda path: path.write_bytes(PAGE),
        missing(0, "is not an uncompressed tar at byte 0"),
        ("is not an uncompressed tar", holds(0)),
    ),
    "an empty file in its place": Corruption(
        lambda path: path.write_bytes(b""), missing(0, "is empty"), ("is empty", holds(0))
    ),
    "a flipped bit in the pixels": Corruption(flip_bit, keeps_size=True, blind=frozenset({"10"})),
    "an image without a caption": Corruption(without("10.txt"), {"10": "has no caption"}),
    "a caption without an image": Corruption(without("10.jpg"), {"10": "has no image"}),
    "a key twice": Corruption(
        renamed("11", "10"),
        {"10": "comes twice in the shard (two .jpg)", "#7": "is missing: the shard holds 7 samples"},
        (holds(7),),
    ),
    "a caption that is no UTF-8": Corruption(
        member("10.txt", "Ångström".encode("latin-1")), {"10": "caption is not UTF-8 text (byte 0)"}
    ),
    "a bomb of a PNG": Corruption(member("10.png", bomb_png()), {"10": "more pixels than the limit of"}),
    "a bomb of a JPEG": Corruption(member("10.jpg", bomb_jpeg()), {"10": "30000 x 30000 pixels, the limit is"}),
    "an animated PNG": Corruption(
        member("10.png", encoded(make_image(10), format="PNG", **ANIMATION)), {"10": "animated (2 frames); still images only"}
    ),
    "an animated WebP": Corruption(
        member("10.webp", encoded(make_image(10), format="WEBP", **ANIMATION)), {"10": "animated (2 frames); still images only"}
    ),
    "a pickle under an image's name": Corruption(
        member("10.jpg", pickle.dumps(Trap())), {"10": "not a JPEG, PNG or WebP image (but a pickle)"}
    ),
    "gzip data under an image's name": Corruption(
        member("10.jpg", gzip.compress(bytes(2**24), mtime=0)), {"10": "not a JPEG, PNG or WebP image (but gzip data)"}
    ),
    "an error page under an image's name": Corruption(
        member("10.jpg", PAGE), {"10": "not a JPEG, PNG or WebP image (but an HTML or XML page)"}
    ),
    # these can be used
    "a pickle beside the image": Corruption(member("10.pickle", pickle.dumps(Trap()))),
    "an array of pickles beside the image": Corruption(member("10.npy", pickle.dumps(Trap()))),
    "a gzip bomb beside the image": Corruption(member("10.txt.gz", gzip.compress(bytes(2**24), mtime=0))),
    "a CMYK image": Corruption(member("10.jpg", encoded(make_image(10).convert("CMYK"), quality=95))),
    "a 16-bit image": Corruption(member("10.png", encoded(GREY_16, format="PNG"))),
    "a grey image": Corruption(member("10.jpg", encoded(make_image(10).convert("L")))),
}  # fmt: skip


@pytest.fixture(params=CORRUPTIONS.values(), ids=list(CORRUPTIONS))
def corruption(request: pytest.FixtureRequest) -> Corruption:
    return request.param


@pytest.fixture
def spoilt(folder: Path, corruption: Corruption, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the spoilt shard, its manifest as it was; the traps would be sprung there."""
    monkeypatch.chdir(folder)
    corruption.change(folder / SHARD)
    return folder


def read(folder: Path) -> tuple[list[dict], list[BadSample]]:
    """Every sample once, in order: the good and the bad."""
    found = list(map(ImageDataset(folder).attempt, range(24)))
    return [sample for sample in found if isinstance(sample, dict)], [one for one in found if isinstance(one, BadSample)]


def agrees(bad: dict[str, str], corruption: Corruption) -> bool:
    """Whether these keys and reasons are those expected."""
    sure = {key: reason for key, reason in bad.items() if key not in corruption.blind}
    return sure.keys() == corruption.bad.keys() and all(sure[key].startswith(corruption.bad[key]) for key in sure)


def test_a_manifest_of_before_shows_it(spoilt: Path, corruption: Corruption) -> None:
    """By the size, before training begins; or by the hash."""
    problems, shards = check_folder(spoilt)
    assert problems == [] and [bool(shard.problems) for shard in shards] == [False, True, False]
    found = [str(problem) for problem in shards[1].problems]
    resized = (spoilt / SHARD).stat().st_size != Manifest.load(spoilt).shards[1].bytes
    assert not (corruption.keeps_size and resized)
    if resized:
        assert len(found) == 1 and f"{SHARD} has " in found[0] and "restore it" in found[0]
        with pytest.raises(LdmError, match=rf"{SHARD} has \d+ bytes, the manifest says \d+; restore it, or run `ldm shards"):
            ImageDataset(spoilt)
    else:
        assert found[0] == f"{SHARD} has other bytes than the manifest's sha256; restore it"


def test_the_deep_check_names_shard_key_and_reason(spoilt: Path, corruption: Corruption) -> None:
    """Though the manifest agrees with the shard's size and hash."""
    renew(spoilt)
    problems, shards = check_folder(spoilt, deep=True)
    assert problems == [] and not shards[0].problems and not shards[2].problems
    of_shard = [problem.what for problem in shards[1].problems if problem.where == SHARD]
    assert len(of_shard) == len(corruption.of_shard)
    assert all(what.startswith(expected) for what, expected in zip(of_shard, corruption.of_shard, strict=True))
    # a sample that is missing has no key to be named by
    of_samples = {problem.where: problem.what for problem in shards[1].problems if problem.where != SHARD}
    named = {f"{SHARD}: {key}": reason for key, reason in corruption.bad.items() if not key.startswith("#")}
    blind = {f"{SHARD}: {key}" for key in corruption.blind}
    assert of_samples.keys() - blind == named.keys()
    assert all(of_samples[where].startswith(reason) for where, reason in named.items())
    # and it counts what training will count
    good, bad = read(spoilt)
    assert sum(shard.good for shard in shards) == len(good) and len(good) + len(bad) == 24
    assert not (spoilt / "sprung").exists()


def test_read_once_good_and_bad_are_all_there_are(spoilt: Path, corruption: Corruption) -> None:
    renew(spoilt)
    good, bad = read(spoilt)
    assert len(good) + len(bad) == Manifest.load(spoilt).samples
    assert {sample.shard for sample in bad} <= {str(spoilt / SHARD)}
    assert agrees({sample.key: sample.reason for sample in bad}, corruption)
    # what is good is itself: no image has another's caption
    for sample in good:
        number = int(sample["key"])
        assert sample["caption"] == f"image {number}" and sample["image"].shape == (3, 16, 16)
        if number != 10:
            difference = sample["image"].transpose(1, 2, 0).astype(int) - np.asarray(make_image(number), int)
            assert np.abs(difference).max() <= 12  # JPEG's own
    assert not (spoilt / "sprung").exists()


def test_in_one_epoch_of_training_good_and_bad_are_all_there_are(spoilt: Path, corruption: Corruption) -> None:
    renew(spoilt)
    data = ShardDataModule(str(spoilt), str(spoilt), batch_size=4, max_bad_share=1.0, max_bad_in_a_row=1000)
    data.setup("fit")
    loader = data.train_dataloader()
    keys = [key for batch in islice(loader, 6) for key in batch["key"]]  # 6 batches of 4: the bad have been replaced
    assert len(keys) == 24
    good, bad = read(spoilt)
    assert loader.quarantine.known == set(bad)
    assert set(keys) == {sample["key"] for sample in good}  # each good one came, some for a bad one too
    assert len(set(keys)) + len(loader.quarantine) == Manifest.load(spoilt).samples
    assert not (spoilt / "sprung").exists()


def test_the_traps_are_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists()


def test_a_missing_shard_is_refused_before_training_and_named_when_it_goes_later(folder: Path) -> None:
    dataset = ImageDataset(folder)
    (folder / SHARD).unlink()
    with pytest.raises(LdmError, match=rf"{SHARD} is listed in the manifest but missing; restore it, or run `ldm shards index"):
        ImageDataset(folder)
    problems, shards = check_folder(folder)
    assert problems == [] and [shard.good for shard in shards] == [8, 0, 8]
    (problem,) = shards[1].problems
    assert str(problem).startswith(f"{SHARD} is listed in the manifest but missing; restore it")
    assert dataset[0]["key"] == "00"
    with pytest.raises(LdmError, match=rf"{SHARD} does not exist; restore it"):
        dataset[8]


def test_a_member_over_the_size_limit_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.data.shards.MAX_MEMBER_BYTES", 2**20)
    member("10.json", b" " * (2**20 + 1))(folder / SHARD)
    renew(folder)
    good, bad = read(folder)
    assert len(good) == 23
    assert bad == [BadSample(str(folder / SHARD), "10", f"has a member of {2**20 + 1} bytes, the limit is {2**20}")]
    assert len(ShardReader(folder / SHARD)) == 8
