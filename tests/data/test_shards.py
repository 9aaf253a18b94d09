import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm.data.check import check_folder
from ldm.data.decode import DecodeError, decode_image
from ldm.data.manifest import IMAGE_SHARDS, SIZES_NAME, Manifest
from ldm.data.shards import ShardReader, unread_images
from ldm.data.writer import ShardWriter, encode_png, write_images
from ldm.errors import LdmError, UsageError
from ldm.files import sha256_file
from tests.samples import write_tar


def items(count):
    for index in range(count):
        yield f"{index:04d}", np.full((5, 7, 3), index, np.uint8), f"image {index}"


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "out", "x", items(7), samples_per_shard=3, extra={"image_size": 5})
    return tmp_path / "out"


def test_what_is_written_is_read_back(folder):
    manifest = Manifest.load(folder, IMAGE_SHARDS)
    assert [(entry.name, entry.samples) for entry in manifest.shards] == [
        ("x-00000.tar", 3),
        ("x-00001.tar", 3),
        ("x-00002.tar", 1),
    ]
    assert manifest.extra == {"image_size": 5, "sizes": sha256_file(folder / SIZES_NAME)}
    samples = [sample for entry in manifest.shards for sample in ShardReader(folder / entry.name)]
    for sample, (key, image, caption) in zip(samples, items(7), strict=True):
        assert sample.key == key and sample.captions == [caption]
        assert np.array_equal(np.asarray(decode_image(sample.image or b"")), image)
    problems, shards = check_folder(folder, deep=True)
    assert problems == [] and [(shard.good, shard.problems) for shard in shards] == [(3, ()), (3, ()), (1, ())]


def test_webdataset_reads_our_shards(folder):
    from webdataset.compat import WebDataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(WebDataset(urls, shardshuffle=False))
    ours = [sample for url in urls for sample in ShardReader(url)]
    assert [(s["__key__"], s["png"], s["txt"]) for s in samples] == [(s.key, s.image, s.files["txt"]) for s in ours]


def test_equal_input_gives_equal_bytes(folder, tmp_path):
    again = write_images(tmp_path / "again", "x", items(7), samples_per_shard=3)
    assert again.hash == Manifest.load(folder).hash


def test_bytes_of_shards_never_change(tmp_path):
    """Names beyond a header's 100 bytes, names that are not ASCII, empty members."""
    with ShardWriter(tmp_path, "x", samples_per_shard=None, bytes_per_shard=40960) as writer:
        for n in range(6):
            png = bytes((n * 7 + i * 31) % 256 for i in range(10_000 + n))
            writer.write(f"{n:04d}", {"png": png, "txt": f"caption {n} é".encode(), "json": b"{}"})
        writer.write("k" * 120, {"safetensors": bytes(range(256)) * 20})
        writer.write("grüß", {"txt": b""})
    assert [(entry.samples, entry.bytes, entry.sha256) for entry in writer.entries] == [
        (3, 40960, "8636bbd4e1a6cc3f3ac67cd0ba70ec927303bd8435b9aaee839d2c2a43cf56dc"),
        (3, 40960, "138fd03065de9b5586bbe3a3b4e24e60d9614a37b7dd39613a391b0430544373"),
        (2, 10240, "ee4f60bdf37cc1d01a47b3647ffc291db8b0ebf9ef32e91997943bac4bdda01e"),
    ]
    from webdataset.writer import TarWriter

    path = tmp_path / "theirs.tar"
    with open(path, "wb") as file, TarWriter(file, "ldm", "ldm", 0o644, encoder=False, mtime=0) as tar:
        for sample in ShardReader(tmp_path / "x-00002.tar"):
            tar.write({"__key__": sample.key, **sample.files})
    assert path.read_bytes() == (tmp_path / "x-00002.tar").read_bytes()


def test_an_exception_leaves_nothing_behind(tmp_path):
    def failing():
        yield from items(5)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError):
        write_images(tmp_path / "out", "x", failing(), samples_per_shard=2)
    assert os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "x", 2) as writer:
        for key in "abc":
            writer.write(key, {"txt": b"t"})
        raise RuntimeError
    assert os.listdir(tmp_path) == ["x-00000.tar"] and [entry.samples for entry in writer.entries] == [2]


def test_writer_refuses_keys_and_members_that_readers_would_misread(tmp_path):
    with ShardWriter(tmp_path, "x") as writer:
        writer.write("a", {"txt": b""})
        for key, files in [("a", {"txt": b""}), ("b.c", {"txt": b""}), ("../b", {"txt": b""}), ("b", {"pkl": b""})]:
            with pytest.raises(ValueError):
                writer.write(key, files)
    assert len(ShardReader(tmp_path / "x-00000.tar")) == 1
    with pytest.raises(UsageError, match="prefix"):
        ShardWriter(tmp_path, "../x")


def test_new_work_never_lands_on_old(folder):
    before = Manifest.load(folder)
    with pytest.raises(UsageError, match="already holds other work"):
        write_images(folder, "y", items(1))
    assert Manifest.load(folder) == before


def test_reader_survives_fork_and_pickle(folder):
    reader = ShardReader(folder / "x-00000.tar")
    first = reader[0]
    copy = pickle.loads(pickle.dumps(reader))
    assert copy[0] == first == reader[0] and copy[-1].key == "0002"
    reader.reopen(reader.path)
    assert copy[0] == first == reader[0]  # each has its own file open
    offset, size = reader.spans(0)["txt"]
    assert (folder / "x-00000.tar").read_bytes()[offset : offset + size] == first.files["txt"]
    child = os.fork()
    if child == 0:
        os._exit(0 if reader[1].key == "0001" else 1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(IndexError):
        reader[3]


def test_every_cut_of_a_shard_is_seen_and_what_is_whole_is_read(folder):
    path = folder / "x-00000.tar"
    data, whole = path.read_bytes(), list(ShardReader(path))
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar)
    end += -end % 512
    for cut in range(0, end + 512, 128):
        path.write_bytes(data[:cut])
        reader = ShardReader(path)
        assert reader.damage is not None
        for sample, before in zip(reader, whole, strict=False):
            # of the sample that was cut, the members that are left
            assert sample.key == before.key and sample.files.items() <= before.files.items()
    path.write_bytes(data[: end + 512])  # the end block alone is padding
    reader = ShardReader(path)
    assert list(reader) == whole and reader.damage is None


def test_what_is_no_tar_is_damage_and_what_is_not_there_an_error(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 1000
        tar.addfile(member, io.BytesIO(os.urandom(1000)))
    os.mkfifo(tmp_path / "p.tar")
    reader = ShardReader(tmp_path / "a.tar")
    assert len(reader) == 0 and reader.damage == "is not an uncompressed tar at byte 0"
    for name, words in (("b.tar", "does not exist"), ("", "is not a regular file"), ("p.tar", "is not a regular")):
        with pytest.raises(LdmError, match=f"{tmp_path / name} {words}.*; restore"):
            ShardReader(tmp_path / name)


def test_tars_from_elsewhere_are_read_as_webdataset_reads_them(tmp_path):
    from webdataset.compat import WebDataset

    png = encode_png(Image.new("RGB", (4, 4)))
    long = "d/" * 60 + "k" * 120
    with_folder = [("dir/a.b/1.JPG", b"jpg"), ("dir/a.b/1.txt", b"one"), (f"{long}.png", png), (f"{long}.txt", b"two")]
    noise = [("._1.png", b"mac"), ("noext", b""), ("__meta__/a.txt", b""), ("z.pkl", b"no"), ("2.seg.png", b"other")]
    write_tar(tmp_path / "a.tar", with_folder + noise, tarfile.PAX_FORMAT)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    reader = ShardReader(tmp_path / "a.tar")
    assert reader.keys == ("dir/a.b/1", long)
    assert reader[0].files == {"jpg": b"jpg", "txt": b"one"} and reader[1].image == png
    theirs = {sample["__key__"] for sample in WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)}
    assert set(reader.keys) <= theirs


def test_a_sample_that_comes_twice_or_is_too_large_cannot_be_used(tmp_path, monkeypatch):
    members = [("1.png", b"first"), ("2.png", b"fine"), ("1.txt", b"one"), ("1.PNG", b"again"), ("3.txt", b"0123456789")]
    write_tar(tmp_path / "a.tar", members)
    reader = ShardReader(tmp_path / "a.tar")
    assert reader.keys == ("1", "2", "3")
    for look in (reader.spans, reader.__getitem__):
        with pytest.raises(DecodeError, match=r"^comes twice in the shard \(two \.png\)$"):
            look(0)
    assert reader[1].files == {"png": b"fine"} and reader[2].files["txt"] == b"0123456789"
    monkeypatch.setattr("ldm.data.shards.MAX_MEMBER_BYTES", 9)
    with pytest.raises(DecodeError, match="has a member of 10 bytes, the limit is 9"):
        reader[2]
    assert reader[1].image == b"fine"


def test_only_the_extensions_asked_for_are_read(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.png", b"p"), ("1.txt", b"t"), ("2.json", b"{}"), ("2.JSON.gz", b""), ("2.npy", b"")])
    assert [sample.files for sample in ShardReader(tmp_path / "a.tar")] == [{"png": b"p", "txt": b"t"}, {"json": b"{}"}]
    assert [sample.files for sample in ShardReader(tmp_path / "a.tar", ["txt"])] == [{"txt": b"t"}]


def test_keys_that_are_no_text_are_shown_as_escapes(tmp_path):
    write_tar(tmp_path / "a.tar", [("gr\udcfc\udcdf.png", b""), ("grüß.png", b"")])
    assert ShardReader(tmp_path / "a.tar").keys == (r"gr\xfc\xdf", "grüß")


def test_a_closed_reader_opens_again_at_another_place_and_knows_its_shard(folder, tmp_path):
    with ShardReader(folder / "x-00000.tar") as reader:
        samples = list(reader)
    assert reader.keys == ("0000", "0001", "0002")  # what is known stays
    (folder / "x-00000.tar").rename(tmp_path / "moved.tar")
    reader.reopen(tmp_path / "moved.tar")
    assert list(reader) == samples
    reader.close()
    with pytest.raises(LdmError, match=r"x-00000.tar does not exist; restore it"):
        reader.reopen(folder / "x-00000.tar")


def test_a_shard_that_shrinks_while_it_is_open_is_named(folder):
    reader = ShardReader(folder / "x-00000.tar")
    os.truncate(folder / "x-00000.tar", 600)
    with pytest.raises(LdmError, match=r"x-00000.tar was overwritten or cut while it was open; restore it"):
        reader[2]


def test_a_shard_that_is_written_while_it_is_open_or_closed_is_never_read_by_the_old_places(folder):
    path = folder / "x-00000.tar"
    reader, whole = ShardReader(path), list(ShardReader(path))
    os.utime(path)  # a copy or a cache may touch it: its members are where they were
    assert list(reader) == whole
    other = (folder / "x-00001.tar").read_bytes()
    with open(path, "r+b") as file:
        file.write(other)
    with pytest.raises(LdmError, match=r"x-00000.tar was overwritten"):
        reader[0]
    reader.close()
    reader.reopen(path)
    assert reader.keys == ("0003", "0004", "0005") and reader[0] == ShardReader(folder / "x-00001.tar")[0]


def test_by_the_last_dot_names_with_dots_are_samples_and_by_the_first_they_are_named(tmp_path):
    names = ["1.jpg", "photo v1.0.jpg", "0.input.jpg", "0.output.JPG", "d.e/2.txt", ".3.png", "._1.jpg", "4.bmp", "__m__/6.jpg"]
    png = encode_png(Image.new("RGB", (4, 4)))
    write_tar(tmp_path / "a.tar", [*((name, b"") for name in names), ("5", png)])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("7.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        tar.addfile(link)
    assert ShardReader(tmp_path / "a.tar").keys == ("1", "d.e/2")
    assert ShardReader(tmp_path / "a.tar", key_dot="last").keys == ("1", "photo v1.0", "0.input", "0.output", "d.e/2")
    dots, hidden, other, link = unread_images(tmp_path / "a.tar", "first")
    assert dots.names == ("photo v1.0.jpg", "0.input.jpg", "0.output.JPG") and "--key-dot last" in dots.fix
    rest = [(".3.png",), ("4.bmp", "5"), ("7.png",)]
    assert [hidden.names, other.names, link.names] == rest
    assert [unread.names for unread in unread_images(tmp_path / "a.tar", "last")] == rest


def test_readers_leave_no_file_open(folder):
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    for _ in range(3):
        reader = ShardReader(folder / "x-00000.tar")
        assert open_files() == before + 1
        copy = pickle.loads(pickle.dumps(reader))
        reader.reopen(folder / "x-00001.tar")
        del copy
        assert reader[0].key == "0003" and open_files() == before + 1  # the copy had a file of its own
        del reader
    assert open_files() == before
