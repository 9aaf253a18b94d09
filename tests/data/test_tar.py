"""Our scan of a tar's headers sees what ``tarfile`` sees, and says so where the tar is damaged."""

import io
import os
import shutil
import subprocess
import tarfile
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.data.tar import BLOCK, index_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)

parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12)
long_parts = st.builds(lambda part, times: part * times, parts, st.integers(1, 25))
names = st.lists(long_parts, min_size=1, max_size=5).map("/".join)


@st.composite
def members(draw, format):
    """A file (two times out of three), folder or link, as its header and its data."""
    member = tarfile.TarInfo(draw(names))
    kinds = [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
    member.type = draw(st.sampled_from(kinds))
    if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        member.linkname = draw(names)
    # what has a fraction becomes a pax header
    member.mtime = draw(
        st.integers(0, 2**33 - 1) | st.floats(0, 2e9) if format == tarfile.PAX_FORMAT else st.integers(0, 2**33 - 1)
    )
    member.uname = draw(st.sampled_from(["", "ldm", "Ångström"]))
    data = draw(st.binary(max_size=30)) * draw(st.sampled_from([1, 1, 40])) if member.isreg() else b""
    member.size = len(data)
    return member, data


@st.composite
def tars(draw):
    """The bytes of a tar."""
    format = draw(st.sampled_from(FORMATS))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, encoding="utf-8") as tar:
        for member, data in draw(st.lists(members(format), max_size=6)):
            try:
                tar.addfile(member, io.BytesIO(data))
            except ValueError:  # a name that ustar has no room for
                assert format == tarfile.USTAR_FORMAT
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("tar") / "x.tar"


def scan(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return index_tar(descriptor)
    finally:
        os.close(descriptor)


def scan_bytes(path, data):
    path.write_bytes(data)
    return scan(path)


def rows(index):
    """(name, offset, size) of each file; the three columns are equally long."""
    return list(zip(index.names, index.offsets.tolist(), index.sizes.tolist(), strict=True))


def tarfile_rows(path):
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=tars())
def test_it_agrees_with_tarfile(place, data):
    index = scan_bytes(place, data)
    assert index.damage is None
    assert rows(index) == tarfile_rows(place)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
@pytest.mark.parametrize("format", ["ustar", "gnu", "posix", "oldgnu"])
def test_it_agrees_with_tarfile_on_what_the_program_tar_writes(tmp_path, format):
    folder = tmp_path / "in" / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True)
    for number, name in enumerate(["a.png", "é.txt", "k" * 90 + ".png", "empty.txt"]):
        (folder / name).write_bytes(bytes([number + 1]) * (700 * number if name != "empty.txt" else 0))
    (folder / "link.png").symlink_to("a.png")
    (tmp_path / "in" / "one.png").write_bytes(b"one")
    os.link(tmp_path / "in" / "one.png", tmp_path / "in" / "two.png")
    subprocess.run(["tar", f"--format={format}", "-cf", tmp_path / "x.tar", "-C", tmp_path / "in", "."], check=True)
    index = scan(tmp_path / "x.tar")
    assert index.damage is None and len(index.names) == 5  # links are no files
    assert rows(index) == tarfile_rows(tmp_path / "x.tar")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_of_more_than_8_gib_are_stepped_over(tmp_path, format):
    """GNU writes such a size in binary, pax in a header of its own. The file is sparse: it takes no room."""
    big, small = tarfile.TarInfo("big.bin"), tarfile.TarInfo("small.txt")
    big.size, small.size = 2**33 + 5, 3
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(big.tobuf(format))
        file.seek(-(-big.size // BLOCK) * BLOCK, os.SEEK_CUR)
        file.write(small.tobuf(format) + b"abc".ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    index = scan(tmp_path / "x.tar")
    assert index.damage is None and rows(index) == tarfile_rows(tmp_path / "x.tar")
    assert index.sizes.tolist() == [2**33 + 5, 3]


def written(format=tarfile.PAX_FORMAT):
    """Three files without a zero byte, the second with a long name: the tar's bytes, and where its end mark begins."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, size in (("a.png", 700), ("d/" * 80 + "é.png", 1024), ("c.txt", 20)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
        end = tar.offset
    return file.getvalue(), end


def header_positions(data, end, index):
    """Positions of all blocks that are not a file's data."""
    inside = {block for _, offset, size in rows(index) for block in range(offset, offset + size, BLOCK)}
    return [position for position in range(0, end, BLOCK) if position not in inside]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_cut_is_damage_and_what_stands_before_it_is_read(tmp_path, format):
    data, end = written(format)
    whole = rows(scan_bytes(tmp_path / "x.tar", data))
    assert len(whole) == 3
    for cut in range(0, end + 1, 128):
        index = scan_bytes(tmp_path / "x.tar", data[:cut])
        assert index.damage is not None, cut
        assert rows(index) == [row for row in whole if row[1] + row[2] <= cut]
    for cut in range(end + BLOCK, len(data) + 1, BLOCK):  # of the end mark one block will do
        index = scan_bytes(tmp_path / "x.tar", data[:cut])
        assert index.damage is None and rows(index) == whole


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_zeroed_headers_are_damage_and_zeroed_data_move_nothing(tmp_path, format):
    data, end = written(format)
    index = scan_bytes(tmp_path / "x.tar", data)
    whole, headers = rows(index), header_positions(data, end, index)
    # zeros do not show in the text of a long name: it is no header, and has no checksum
    unproven = {position for position in headers if data[position + 257 : position + 262] != b"ustar"}
    assert len(unproven) == 1
    for position, size in product(range(0, end, BLOCK), (BLOCK, 5 * BLOCK // 2)):
        if size > BLOCK and position + size >= end:
            continue  # like a tar that ends there
        zeroed = data[:position] + bytes(size) + data[position + size :]
        index = scan_bytes(tmp_path / "x.tar", zeroed)
        if position in headers and position not in unproven:
            assert index.damage is not None
            assert rows(index) == whole[: len(rows(index))] and len(rows(index)) < 3
        elif position not in unproven and size == BLOCK:
            assert index.damage is None and rows(index) == whole


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_in_a_header_is_damage_or_changes_nothing(tmp_path, format):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, size in (("a.png", 700), ("b.txt", 20)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
    data = file.getvalue()
    whole = rows(scan_bytes(tmp_path / "x.tar", data))
    seen = 0
    for header, before in ((0, 0), (3 * BLOCK, 1)):
        for byte in range(header, header + BLOCK):
            flipped = bytearray(data)
            flipped[byte] ^= 1 << byte % 8
            index = scan_bytes(tmp_path / "x.tar", flipped)
            if index.damage is None:
                assert rows(index) == whole
            else:
                assert rows(index) == whole[:before]
                seen += 1
    # all but those in the blanks around the checksum
    assert seen > 0.99 * 2 * BLOCK


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=tars(), where=st.integers(0, 2**20), junk=st.binary(min_size=1, max_size=600))
def test_whatever_overwrites_it_nothing_is_raised_and_no_file_lies_outside(place, data, where, junk):
    where %= len(data)
    data = data[:where] + junk + data[where + len(junk) :]
    for _, offset, size in rows(scan_bytes(place, data)):
        assert 0 <= offset <= offset + size <= len(data)


def with_extra(records, type=tarfile.XHDTYPE):
    """A pax header with these records before an empty file."""
    extra = tarfile.TarInfo("extra")
    extra.type, extra.size = type, len(records)
    padded = records.ljust(-(-len(records) // BLOCK) * BLOCK, b"\0")
    return extra.tobuf(tarfile.USTAR_FORMAT) + padded + tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT) + bytes(2 * BLOCK)


@pytest.mark.parametrize(
    "records",
    [
        b"no number path=b\n",
        b"999 path=b\n",
        b"2 path=b\n",
        b"14 size=minus1\n",
        b"18 size=99999999999\n",
        b"9" * 5000 + b" path=b\n",
        b"5012 size=" + b"9" * 5001 + b"\n",  # Python refuses to read a number of so many digits
    ],
)
def test_broken_pax_records_are_damage(tmp_path, records):
    index = scan_bytes(tmp_path / "x.tar", with_extra(records))
    assert index.damage is not None and index.names == []


def test_extra_headers_apply_to_the_next_member_alone(tmp_path):
    index = scan_bytes(tmp_path / "x.tar", with_extra(b"10 path=b\n")[: -2 * BLOCK] + with_extra(b"11 mtime=1\n"))
    assert index.names == ["b", "a.txt"] and index.damage is None
    # a global header says nothing of one member
    assert scan_bytes(tmp_path / "x.tar", with_extra(b"13 comment=x\n", tarfile.XGLTYPE)).names == ["a.txt"]


def test_what_is_no_tar_says_so(tmp_path):
    for data, words in (
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>" + b" " * 1000, "is not an uncompressed tar"),
        (b"\x1f\x8b" + bytes(range(256)) * 4, "is not an uncompressed tar"),
        (b"<html>503</html>", "is too short for a tar"),
    ):
        index = scan_bytes(tmp_path / "x.tar", data)
        assert words in (index.damage or "") and index.names == [] and len(index.offsets) == len(index.sizes) == 0
    assert scan_bytes(tmp_path / "x.tar", bytes(20 * BLOCK)).damage is None  # a tar without members


def test_a_size_in_binary_is_read(tmp_path):
    member = tarfile.TarInfo("a.txt")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (5).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    index = scan_bytes(tmp_path / "x.tar", bytes(header) + b"hello".ljust(BLOCK, b"\0") + bytes(2 * BLOCK))
    assert rows(index) == [("a.txt", BLOCK, 5)] == tarfile_rows(tmp_path / "x.tar") and index.damage is None
    assert index.offsets.dtype == np.int64
