import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm.data.decode import decode_image
from ldm.data.manifest import IMAGE_SHARDS, Manifest
from ldm.data.shards import ShardReader, ShardWriter, check_folder, encode_png, index_folder, write_images
from ldm.errors import LdmError, UsageError


def items(count):
    for index in range(count):
        yield f"{index:04d}", np.full((5, 7, 3), index, np.uint8), f"picture {index}"


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
    assert manifest.extra == {"image_size": 5}
    samples = [sample for entry in manifest.shards for sample in ShardReader(folder / entry.name)]
    for sample, (key, image, caption) in zip(samples, items(7), strict=True):
        assert sample.key == key and sample.caption == caption.encode()
        assert np.array_equal(np.asarray(decode_image(sample.image)), image)
    assert check_folder(folder, deep=True) == []


def test_webdataset_reads_our_shards(folder):
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = [sample for url in urls for sample in ShardReader(url)]
    assert [(s["__key__"], s["png"], s["txt"]) for s in samples] == [(s.key, s.image, s.caption) for s in ours]


def test_equal_input_gives_equal_bytes(folder, tmp_path):
    again = write_images(tmp_path / "again", "x", items(7), samples_per_shard=3)
    assert again.hash == Manifest.load(folder).hash


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
    reader.close()
    assert copy[0] == first == reader[0] and copy[-1].key == "0002"
    offset, size = reader.spans(0)["txt"]
    assert (folder / "x-00000.tar").read_bytes()[offset : offset + size] == first.caption
    child = os.fork()
    if child == 0:
        os._exit(0 if reader[1].key == "0001" else 1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(IndexError):
        reader[3]


def test_every_cut_of_a_shard_is_seen(folder):
    path = folder / "x-00000.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar)
    end += -end % 512
    for cut in range(0, end + 512, 128):
        path.write_bytes(data[:cut])
        with pytest.raises(LdmError, match=r"x-00000\.tar"):
            ShardReader(path)
    path.write_bytes(data[: end + 512])  # the end block alone is padding
    assert len(ShardReader(path)) == 3


def test_compressed_and_missing_shards_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    for name in ("a.tar", "b.tar"):
        with pytest.raises(LdmError, match=name):
            ShardReader(tmp_path / name)


def foreign(path, members, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_tars_from_elsewhere_are_read_as_webdataset_reads_them(tmp_path):
    import webdataset

    png = encode_png(Image.new("RGB", (4, 4)))
    long = "d/" * 60 + "k" * 120
    with_folder = [("dir/a.b/1.JPG", b"jpg"), ("dir/a.b/1.txt", b"one"), (f"{long}.png", png), (f"{long}.txt", b"two")]
    noise = [("._1.png", b"mac"), ("noext", b""), ("__meta__/a.txt", b""), ("z.pkl", b"no"), ("2.seg.png", b"other")]
    foreign(tmp_path / "a.tar", with_folder + noise, tarfile.PAX_FORMAT)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    reader = ShardReader(tmp_path / "a.tar")
    assert reader.keys == ("dir/a.b/1", long)
    assert reader[0].files == {"jpg": b"jpg", "txt": b"one"} and reader[1].image == png
    theirs = {sample["__key__"] for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)}
    assert set(reader.keys) <= theirs


def test_index_makes_a_manifest_that_checks(tmp_path):
    png = encode_png(Image.new("RGB", (4, 4)))
    foreign(tmp_path / "00000.tar", [("1.png", png), ("1.txt", b"one"), ("2.png", png)])
    (tmp_path / "00000_stats.json").write_text("{}")
    manifest = index_folder(tmp_path)
    assert (manifest.samples, manifest.extra["captioned"]) == (2, 1)
    manifest.save(tmp_path)
    assert check_folder(tmp_path, deep=True) == []


def test_index_refuses_what_cannot_be_trained_on(tmp_path):
    with pytest.raises(UsageError, match=r"holds no \.tar shard"):
        index_folder(tmp_path)
    for members, words in [
        ([("1.txt", b"")], "1 samples without an image"),
        ([("1.npy", b"")], "no sample"),
        ([("1.safetensors", b"")], "holds latents"),
        ([("1.png", b""), ("1.png", b"")], "twice"),
    ]:
        foreign(tmp_path / "a.tar", members)
        with pytest.raises(LdmError, match=words):
            index_folder(tmp_path)


def test_deep_check_finds_one_flipped_bit_and_undecodable_images(folder):
    path = folder / "x-00001.tar"
    data = bytearray(path.read_bytes())
    offset, _ = ShardReader(path).spans(1)["png"]
    data[offset] ^= 1  # the PNG signature
    path.write_bytes(data)
    assert check_folder(folder) == []
    problems = [(problem.where, problem.what) for problem in check_folder(folder, deep=True)]
    assert problems == [
        ("x-00001.tar", "has other bytes than the manifest's sha256"),
        ("x-00001.tar: 0004", "not a JPEG, PNG or WebP image"),
    ]
    path.write_bytes(bytes(len(data)))
    assert "holds 0 samples" in " ".join(problem.what for problem in check_folder(folder, deep=True))
