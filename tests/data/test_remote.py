"""Shards over real HTTP from a server that fails in every way: each failure is recovered from or is a clear stop."""

import contextlib
import errno
import gzip
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

import ldm.data.remote
from ldm.data.manifest import Manifest
from ldm.data.remote import ShardCache, Transfer, fetch
from ldm.data.sources import open_source
from ldm.errors import LdmError, UsageError

NAMES = [f"shapes-{number:05d}.tar" for number in range(3)]
QUICK = Transfer(attempts=4, base_seconds=0.01, connect_seconds=30, read_seconds=30)  # patient: the machine may be busy
IMPATIENT = replace(QUICK, read_seconds=1)  # where a server stalls


class Server(ThreadingHTTPServer):
    """Serves ``files`` under /train; ``faults`` has, for a name, what its next answers suffer from."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked, self.headers = dict(files), {}, [], []
        self.delay, self.down = 0.0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/train"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def counts(self):
        return Counter(path.rpartition("/")[2].partition("?")[0] for path in self.asked)

    def stop(self):
        if not self.down.is_set():
            self.down.set()
            self.shutdown()
            self.server_close()

    def handle_error(self, request, client_address):
        pass  # clients may disconnect


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, name = self.server, unquote(self.path.partition("?")[0]).removeprefix("/train/")
        assert isinstance(server, Server)
        server.asked.append(self.path)
        server.headers.append(self.headers)
        faults = server.faults.get(name, [])
        fault = faults.pop(0) if faults else 200 if name in server.files else 404
        body = server.files.get(name, b"")
        time.sleep(server.delay)
        first, last = self.headers.get("Range", f"bytes=0-{len(body)}").removeprefix("bytes=").split("-")
        body = body[int(first) : int(last) + 1]
        half, length, extra = body, len(body), {}
        if isinstance(fault, int):
            status = 206 if fault == 200 and "Range" in self.headers else fault
            half = body if fault == 200 else b"sorry"
            length = len(half)
        else:
            status = 200
            if fault in ("reset", "stall", "short"):
                half = body[: length // 2]
            elif fault == "short and sure":
                half, length = body[: length // 2], length // 2
            elif fault == "short and silent":
                half, length = body[: length // 2], None
            elif fault == "long":
                half, length = body + bytes(2**22), length + 2**22
            elif fault == "corrupt":
                half = bytes([body[0] ^ 1]) + body[1:]
            elif fault == "page":
                half = b"<html>sign in</html>".ljust(length)
            elif fault == "gzip":
                half, extra = gzip.compress(body), {"Content-Encoding": "gzip"}
                length = len(half)
        self.send_response(status)
        for key, value in (extra if length is None else extra | {"Content-Length": str(length)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(half)
        self.wfile.flush()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault == "stall":
            server.down.wait(60)
        self.close_connection = True


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(image_shards):
    server = Server({path.name: path.read_bytes() for path in image_shards.iterdir()})
    yield server
    server.stop()


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache")


@pytest.fixture
def source(server, cache):
    return open_source(server.url, cache=cache, transfer=QUICK)


def cached(cache, suffix=".tar"):
    return sorted(path.name for path in cache.folder.glob(f"*{suffix}"))


def is_whole(source, number):
    path = source.path(number)
    return hashlib.sha256(path.read_bytes()).hexdigest() == source.manifest.shards[number].sha256


def test_remote_shards_are_those_of_the_folder(server, source, image_shards, cache):
    assert source.is_remote and source.manifest == Manifest.load(image_shards)
    source.check_cheap()
    assert server.counts == {"manifest.json": 1}  # no shard yet
    for number, name in enumerate(NAMES):
        assert source.path(number).read_bytes() == (image_shards / name).read_bytes()
    assert cached(cache) == sorted(f"{entry.sha256}.tar" for entry in source.manifest.shards) and not cached(cache, ".part")
    assert server.counts == {"manifest.json": 1} | dict.fromkeys(NAMES, 1)  # one request each, none for the size


def test_a_pattern_needs_no_listing_and_a_query_goes_along(server, cache, caplog):
    server.faults[NAMES[1]] = [503]
    source = open_source(f"{server.url}/shapes-*[12].tar?sig=a%2Fb+c%3D&se=1", cache=cache, transfer=QUICK)
    assert [entry.name for entry in source.manifest.shards] == NAMES[1:]
    assert is_whole(source, 0) and is_whole(source, 1)
    names = ["manifest.json", NAMES[1], NAMES[1], NAMES[2]]
    assert server.asked == [f"/train/{name}?sig=a%2Fb+c%3D&se=1" for name in names]  # to the letter: it is signed
    assert "sig" not in caplog.text + repr(source) + source.spec
    with pytest.raises(UsageError, match=r"lists no shapes-00003\.tar"):
        open_source(f"{server.url}/shapes-{{00002..00003}}.tar", transfer=QUICK)


def test_any_name_reaches_the_server_as_it_is(server, cache, image_shards):
    odd = "a b%20#ü&+{1}.tar"
    server.files[odd] = server.files.pop(NAMES[0])
    server.files["manifest.json"] = server.files["manifest.json"].replace(NAMES[0].encode(), odd.encode())
    assert is_whole(open_source(server.url, cache=cache, transfer=QUICK), 0)


@pytest.mark.parametrize(
    "faults",
    [
        [503, 503, 503],
        [429, 500],
        ["reset"],
        ["stall"],
        ["short"],
        ["short and sure"],
        ["short and silent"],
        ["corrupt"],
        ["page"],
        ["gzip"],
        ["reset", 502, "corrupt"],
    ],
    ids=str,
)
def test_what_passes_is_tried_again(server, source, cache, faults, caplog):
    server.faults[NAMES[1]] = list(faults)
    start = time.monotonic()
    assert is_whole(replace(source, transfer=IMPATIENT if "stall" in faults else QUICK), 1)
    assert time.monotonic() - start < QUICK.read_seconds  # nothing was waited for in vain
    assert server.counts[NAMES[1]] == len(faults) + 1
    retries = [record for record in caplog.records if record.name == "ldm.data.remote" and record.levelno == logging.WARNING]
    assert len(retries) == len(faults) and all(f"{server.url}/{NAMES[1]}" in retry.message for retry in retries)
    assert len(cached(cache)) == 1 and not cached(cache, ".part")


@pytest.mark.parametrize(
    ("fault", "requests", "words"),
    [
        (404, 1, "404 Not Found; check the address"),
        (403, 1, "403 Forbidden; give credentials"),
        (401, 1, "401 Unauthorized; give credentials"),
        ("long", 1, "has more than the .* bytes.*upload"),
        (503, 4, "in 4 attempts, the last one: 503 Service Unavailable; check the server"),
        ("stall", 4, "in 4 attempts.*Timeout"),
        ("reset", 4, "in 4 attempts"),
        ("short", 4, "in 4 attempts"),
        ("short and sure", 4, r"in 4 attempts.*ended after \d+ of \d+ bytes"),
        ("corrupt", 4, "in 4 attempts.*other bytes than the manifest's sha256"),
    ],
)
def test_what_does_not_pass_is_a_clear_stop(server, cache, fault, requests, words):
    server.faults[NAMES[2]] = [fault] * 9
    transfer = IMPATIENT if fault == "stall" else QUICK
    source = open_source(f"{server.url.replace('//', '//user:password@')}?token=secret", cache=cache, transfer=transfer)
    start = time.monotonic()
    with pytest.raises(LdmError, match=words) as error:
        source.path(2)
    assert time.monotonic() - start < QUICK.read_seconds  # nothing was waited for in vain
    assert server.counts[NAMES[2]] == requests
    said = "".join(traceback.format_exception(error.value))
    assert f"{server.url}/{NAMES[2]}" in said and "\n" not in str(error.value)
    assert not any(secret in said + repr(source) for secret in ("user", "password", "secret"))
    assert all(headers["Authorization"] == "Basic dXNlcjpwYXNzd29yZA==" for headers in server.headers)
    assert cached(cache) == cached(cache, ".part") == []
    server.faults.clear()
    assert is_whole(source, 2)


def test_no_more_is_read_than_the_size_agreed(server):
    server.faults["manifest.json"] = ["long"]
    data = server.files["manifest.json"]
    assert fetch(f"{server.url}/manifest.json", len(data), b"".join, QUICK) == data + b"\0"


def test_no_server_is_a_clear_stop(server, tmp_path):
    server.stop()
    with pytest.raises(LdmError, match="could not be fetched in 4 attempts"):
        open_source(server.url, transfer=QUICK)


def test_without_file_locks_the_cache_works_or_names_its_file_system(source, monkeypatch):
    def refuse(error):
        def flock(*_):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr("fcntl.flock", flock)

    refuse(errno.ENOSYS)
    with warnings.catch_warnings(record=True) as warned:
        assert is_whole(source, 0)
    assert not warned and source.cache is not None and not cached(source.cache, ".part")
    refuse(errno.ENOLCK)
    with pytest.raises(LdmError, match=r"cache is on a file system without file locks \(No locks .*; set LDM_CACHE"):
        source.path(1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/train", "http://[::1/train"])
def test_a_malformed_address_is_one_line(url):
    with pytest.raises(LdmError, match=r"127\.0\.0\.1:99999|several folders|\[::1"):
        open_source(url, transfer=QUICK)


def test_a_manifest_is_fetched_as_patiently_and_checked(server, cache):
    server.faults["manifest.json"] = [503, "reset"]
    assert len(open_source(server.url, cache=cache, transfer=QUICK).manifest.shards) == 3
    server.faults["manifest.json"] = ["page"]
    with pytest.raises(LdmError, match=r"/train/manifest\.json is not readable JSON"):
        open_source(server.url, transfer=QUICK)
    with pytest.raises(UsageError, match=r"/train/other has no manifest\.json; .*`ldm shards index .*/other.* --out DIR`"):
        open_source(f"{server.url}/other", transfer=QUICK)
    value = json.loads(server.files["manifest.json"])
    server.files["manifest.json"] = json.dumps(value | {"location": "/etc"}).encode()
    assert all(place.startswith(server.url) for place in open_source(server.url, transfer=QUICK).locations)
    value["shards"][0]["sha256"] = "../../" + "0" * 58
    server.files["manifest.json"] = json.dumps(value).encode()
    with pytest.raises(LdmError, match=r"shards\.0\.sha256"):
        open_source(server.url, transfer=QUICK)


def test_a_local_manifest_with_a_location_works_while_the_server_is_down(server, cache, tmp_path):
    value = json.loads(server.files["manifest.json"])
    (tmp_path / "manifest.json").write_text(json.dumps(value | {"location": server.url}))
    source = open_source(tmp_path, cache=cache, transfer=QUICK)
    assert source.is_remote and is_whole(source, 0) and server.counts == {NAMES[0]: 1}
    server.stop()
    again = open_source(tmp_path, cache=cache, transfer=QUICK)
    assert is_whole(again, 0)
    with pytest.raises(LdmError, match="4 attempts"):
        again.path(1)


def test_a_cached_shard_of_another_size_is_fetched_again(server, source):
    path = source.path(0)
    os.truncate(path, 100)
    assert source.path(0) == path and is_whole(source, 0) and server.counts[NAMES[0]] == 2


def test_the_least_recently_used_make_room_and_nothing_else(server, tmp_path):
    size = max(len(server.files[name]) for name in NAMES)
    cache = ShardCache(tmp_path / "cache", 2 * size)
    source = open_source(server.url, cache=cache, transfer=QUICK)
    cache.folder.mkdir()
    (cache.folder / "mine.tar").write_bytes(bytes(3 * size))
    (cache.folder / f"{'0' * 64}.part").write_bytes(bytes(size))  # left by a process that was killed
    for number in (0, 1, 0, 2):
        assert is_whole(source, number)
        assert sum((cache.folder / name).stat().st_size for name in cached(cache) if name != "mine.tar") <= 2 * size
        time.sleep(0.02)  # a file's time comes in ticks of some milliseconds
    assert cached(cache) == sorted([f"{source.manifest.shards[number].sha256}.tar" for number in (0, 2)] + ["mine.tar"])
    assert not cached(cache, ".part") and set(server.counts.values()) == {1}


def test_an_open_shard_outlives_its_eviction(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", max(len(server.files[name]) for name in NAMES))
    source = open_source(server.url, cache=cache, transfer=QUICK)
    with open(source.path(0), "rb") as file:
        source.path(1)
        assert len(cached(cache)) == 1 and file.read() == server.files[NAMES[0]]


def test_a_shard_larger_than_the_cache_is_refused_at_once(server, tmp_path):
    sizes = {len(server.files[name]) for name in NAMES}
    with pytest.raises(UsageError, match=rf"has {max(sizes):,} bytes, the cache .* may hold {min(sizes) - 1:,}"):
        open_source(server.url, cache=ShardCache(tmp_path / "cache", min(sizes) - 1), transfer=QUICK)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_leaves_nothing_and_says_so(source, cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ldm.data.remote.os, "fsync", full)
        with pytest.raises(LdmError, match=rf"{cache.folder}: No space left on device, while {NAMES[0]} .*LDM_CACHE"):
            source.path(0)
    assert cached(cache) == cached(cache, ".part") == []
    assert is_whole(source, 0)


def start(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def finish(processes):
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def check(source, numbers):
    if not all(is_whole(source, number) for number in numbers):
        sys.exit(3)


def test_of_many_processes_one_downloads_and_the_others_wait(server, source):
    server.delay = 0.3
    finish([start(check, source, [0]) for _ in range(4)])
    assert server.counts[NAMES[0]] == 1


def test_parent_and_child_fetch_after_a_fork(server, source, tmp_path):
    assert is_whole(source, 0)  # the parent's event loop and its thread are running now
    server.delay = 0.1
    children = [start(check, source, [0, 1]), start(check, source, [2, 1])]
    assert is_whole(source, 1) and is_whole(source, 2)
    finish(children)
    assert server.counts == {"manifest.json": 1} | dict.fromkeys(NAMES, 1)


def test_the_bound_holds_while_processes_fill_the_cache(server, tmp_path):
    size = max(len(server.files[name]) for name in NAMES)
    cache = ShardCache(tmp_path / "cache", size)  # room for one at a time
    source = open_source(server.url, cache=cache, transfer=QUICK)
    server.delay = 0.05

    def ask(first):
        for number in range(6):
            source.path((first + number) % 3)

    children, most = [start(ask, first) for first in range(3)], 0
    while any(child.is_alive() for child in children):
        with contextlib.suppress(FileNotFoundError):  # evicted or renamed while we look
            most = max(most, sum(path.stat().st_size for path in cache.folder.glob("*.[tp]ar*")))
        time.sleep(0.002)
    finish(children)
    assert 0 < most <= size and not cached(cache, ".part")


def test_a_killed_download_is_taken_over(server, source, cache):
    server.faults[NAMES[0]] = ["stall"]
    child = start(check, source, [0])
    while not server.counts[NAMES[0]]:
        time.sleep(0.01)
    child.kill()
    child.join()
    assert cached(cache, ".part")
    assert is_whole(source, 0) and not cached(cache, ".part")


def test_a_source_travels_by_pickle_after_use(server, source):
    assert is_whole(source, 0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source and copy.path(0) == source.path(0) and is_whole(copy, 1)


def test_s3_itself(server, cache, monkeypatch):
    """The real s3fs, where it is installed, against a bucket that this server plays: HEAD and ranged GET of keys."""
    pytest.importorskip("s3fs")
    for key, value in {
        "ENDPOINT_URL": server.url.removesuffix("/train"),
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    source = open_source("s3://train", cache=cache, transfer=QUICK)
    assert [is_whole(source, number) for number in range(3)] == [True] * 3
    server.faults[NAMES[0]] = [403] * 9
    (cache.folder / f"{source.manifest.shards[0].sha256}.tar").unlink()
    with pytest.raises(LdmError, match=f"s3://train/{NAMES[0]} cannot be fetched: 403"):
        source.path(0)
    with pytest.raises(UsageError, match=r"s3://train/other has no manifest\.json"):
        open_source("s3://train/other", transfer=QUICK)
