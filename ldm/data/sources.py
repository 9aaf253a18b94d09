"""Where shards are read from: a local folder, some of a folder's shards by pattern, or a URL whose shards are cached.

A source is named by a *spec*:

- ``data/train``: a local folder with its ``manifest.json``. Where that manifest has a ``location`` (a URL or a path),
  the shards are there and only the manifest here.
- ``data/train-{00000..00009}.tar``, ``data/*.tar``: those of the folder's shards, in the manifest's order.
- ``https://host/train`` and ``https://host/train/train-{00..09}.tar``, also ``http``, ``s3``, ``gs`` and ``hf``: the same,
  with the manifest at ``<folder>/manifest.json``. Patterns are matched with the manifest: nothing is ever listed.
- ``https://host/train?token=...``: the query goes to the manifest and to every shard, as folder-wide tokens (Azure SAS, a
  gateway's token) need it. A signature for one single object (S3 or GCS presigned) cannot serve a folder. As ``?`` starts
  the query, patterns in URLs have ``*`` and ``[...]`` only.

Credentials are those of the scheme's own library (AWS profile or environment, ``~/.netrc``, ...), fsspec's configuration
(``FSSPEC_S3_ANON=true`` for public buckets), or ``https://user:password@host``. They never reach a message or a log.
"""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from urllib.parse import quote, unquote

from ldm.data.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, Problem, ShardEntry
from ldm.data.remote import DEFAULT_TRANSFER, TRANSPORTS, MissingError, ShardCache, Transfer, fetch, redact, transport
from ldm.errors import LdmError, UsageError
from ldm.files import read_bytes

MAX_EXPANDED = 10**6  # names that the braces of a pattern may mean

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_MAGIC = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class ShardSource:
    """Shards to read, local or remote. Holds no connection and no lock: may be pickled and forked at any time.

    ``spec`` is what the user gave, less user, password and query, for messages. ``locations`` has an absolute path or
    a URL for each shard of ``manifest``. ``cache`` is None for local shards. ``restricted``: a pattern chose the shards.
    """

    spec: str
    manifest: Manifest = field(repr=False)
    locations: tuple[str, ...] = field(repr=False)  # these may carry credentials, as the manifest's location may
    cache: ShardCache | None = None
    restricted: bool = False
    transfer: Transfer = DEFAULT_TRANSFER
    beside: str = field(default="", repr=False)  # the manifest's own path or URL

    def __post_init__(self) -> None:
        if self.cache is None:
            return
        for entry in self.manifest.shards:
            if entry.bytes > self.cache.max_bytes:
                raise UsageError(
                    f"{self.spec}: {entry.name} has {entry.bytes:,} bytes, the cache {self.cache.folder} may hold "
                    f"{self.cache.max_bytes:,}; allow the cache more bytes"
                )

    @property
    def is_remote(self) -> bool:
        """Whether shards are downloaded before they are read."""
        return self.cache is not None

    def path(self, number: int) -> Path:
        """Local path of shard ``number`` of the manifest: a remote one is fetched, verified and cached first.

        Any number of processes may ask at once; see :class:`ShardCache`. Raises :class:`LdmError` where it cannot be had.
        """
        if self.cache is None:
            return Path(self.locations[number])
        return self.cache.get(self.manifest.shards[number], self.locations[number], self.transfer)

    def name(self, number: int) -> str:
        """Where shard ``number`` is, for messages: its path, or its URL without credentials."""
        return redact(self.locations[number])

    def read(self, name: str, limit: int = MAX_MANIFEST_BYTES) -> bytes:
        """The bytes of a file of at most ``limit`` bytes beside the manifest. Raises :class:`LdmError`, a
        :class:`MissingError` if it is missing."""
        file = name.join(self.beside.rsplit(MANIFEST_NAME, 1))
        again = "restore it, or write the shards again"
        try:
            if "://" in file:
                return fetch(file, limit, b"".join, self.transfer)
        except MissingError:
            raise MissingError(f"{redact(file)} does not exist; {again}") from None
        if not os.path.lexists(file):
            raise MissingError(f"{file} does not exist; {again}")
        return read_bytes(file, limit, again)

    def cheap_problems(self) -> list[Problem]:
        """What names and sizes of local shards show; nothing of remote ones, which are verified when they are fetched."""
        if self.cache is not None:
            return []
        return [*self.manifest.cheap_problems(Path(self.locations[0]).parent, unlisted=not self.restricted)]

    def check_cheap(self) -> None:
        """Raise :class:`LdmError` unless local shards have their names and sizes."""
        for problem in self.cheap_problems():
            raise LdmError(f"{Path(self.locations[0]).parent}: {problem}")


def open_source(
    spec: str | os.PathLike, format: str | None = None, cache: ShardCache | None = None, transfer: Transfer = DEFAULT_TRANSFER
) -> ShardSource:
    """Find the shards that ``spec`` means (see above) by their manifest, which is read anew each time.

    ``format`` is the one the caller can use (None: either); ``cache`` is for remote shards (None: the default one).
    Raises :class:`UsageError` for what is not a spec, other schemes, unknown shards and a missing manifest, and
    :class:`LdmError` where the manifest is broken or cannot be fetched. Reads no shard: see ``check_cheap``.
    """
    text = os.fspath(spec)
    shown = redact(text) if _SCHEME.match(text) else text
    place = _place(text, shown)
    manifest = _fetch_manifest(place, format, transfer) if place.is_remote else Manifest.load(place.folder, format)
    if not manifest.shards:
        raise LdmError(f"{shown}: {MANIFEST_NAME} lists no shard; write the shards again")
    if place.pattern:
        manifest = replace(manifest, shards=_choose(manifest, place.pattern, shown))
    # A remote manifest's shards are beside it: it must not send its reader elsewhere, least of all to local files.
    base = place if place.is_remote or manifest.location is None else _location(place.folder, manifest.location)
    if base.is_remote:
        transport(base.folder)
    locations = tuple(base.file(entry.name) for entry in manifest.shards)
    cache = (cache or ShardCache()) if base.is_remote else None
    return ShardSource(shown, manifest, locations, cache, bool(place.pattern), transfer, place.file(MANIFEST_NAME))


def remote_files(spec: str) -> tuple[str, list[tuple[str, str]]]:
    """For a URL of tars without a manifest (``https://host/train-{000..099}.tar``): its folder's URL without credentials, and
    name and URL of each tar. Raises :class:`UsageError` for anything else: nothing is listed, so nothing can be found by ``*``.
    """
    shown = redact(spec) if _SCHEME.match(spec) else spec
    place = _place(spec, shown)
    names = _expand(place.pattern, shown) if place.is_remote and place.pattern else []
    if not names or any(re.search(r"[*?\[]", name) for name in names):
        raise UsageError(f"{shown} names no tars at a URL; write them with braces: https://HOST/FOLDER/train-{{000..099}}.tar")
    transport(place.folder)
    return redact(place.folder), [(name, place.file(name)) for name in names]


@dataclass(frozen=True)
class _Place:
    """A folder (an absolute path, or a URL), the pattern of names chosen there ("": all), and a URL's query."""

    folder: str
    pattern: str = ""
    query: str = ""

    @property
    def is_remote(self) -> bool:
        return "://" in self.folder

    def file(self, name: str) -> str:
        if not self.is_remote:
            return os.path.join(self.folder, name)
        # In an object store the name is the key; in an http URL it is one part of a path.
        return f"{self.folder}/{quote(name) if self.folder.startswith('http') else name}{self.query}"


def _place(text: str, shown: str) -> _Place:
    """Read a spec; ``shown`` begins the messages."""
    if not text:
        raise UsageError("the place of the shards is empty; give a folder, a pattern of .tar files or a URL")
    if _SCHEME.match(text) is None:
        return _local_place(text, shown)
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme not in TRANSPORTS or not rest.startswith("//"):
        known = ", ".join(f"{name}://" for name in TRANSPORTS)
        raise UsageError(f"{shown} is neither a local path nor one of {known}; begin a local path with a colon in it with ./")
    path, mark, query = rest[2:].partition("?")
    host = path.partition("/")[0]
    is_http = scheme.startswith("http")
    if not host:
        raise UsageError(f"{shown} names no host or bucket; give {scheme}://HOST/FOLDER")
    if "::" in path[len(host) :]:
        raise UsageError(f"{shown} chains file systems (::), which is not supported; give the folder's own URL")
    if mark and not (is_http and "=" in query):
        raise UsageError(f"{shown}: ? begins a query (key=value, http only) in a URL; as a pattern use * or [0-9]")
    if is_http and "#" in path + query:
        raise UsageError(f"{shown} holds a #; write it as %23")
    if "@" in host and not is_http:
        raise UsageError(f"{shown} must not hold credentials; {scheme}:// takes them from its own settings or environment")
    folder, slash, name = path.rpartition("/")
    if not slash or not (name.endswith(".tar") or _MAGIC.search(name)):
        folder, name = path.rstrip("/"), ""
    if _MAGIC.search(folder[len(host) :]):
        raise _several_folders(shown)
    return _Place(f"{scheme}://{folder}", unquote(name) if is_http else name, mark + query)


def _local_place(text: str, shown: str) -> _Place:
    path = Path(os.path.abspath(text))
    is_pattern = path.suffix == ".tar" or _MAGIC.search(path.name)
    if path.is_dir() or text.endswith("/") or not is_pattern:
        return _Place(str(path))
    if _MAGIC.search(str(path.parent)) and not path.parent.is_dir():
        raise _several_folders(shown)
    return _Place(str(path.parent), path.name)


def _several_folders(shown: str) -> UsageError:
    return UsageError(f"{shown} reaches into several folders; a pattern is for names in one folder, give folders as a list")


def _location(folder: str, location: str) -> _Place:
    """Where a local manifest says that its shards are; a path is relative to the manifest's folder."""
    is_url = _SCHEME.match(location) is not None
    shown = f'{folder}/{MANIFEST_NAME}: "location" {redact(location) if is_url else location}'
    place = _place(location if is_url else os.path.join(os.path.realpath(folder), location), shown)
    if place.pattern:
        raise UsageError(f"{shown} is a pattern; write the folder of the shards there")
    if not (is_url or os.path.isdir(place.folder)):
        raise UsageError(f"{shown} is no folder here ({place.folder}); mount or move the shards there, or correct it")
    return place


def _choose(manifest: Manifest, pattern: str, shown: str) -> tuple[ShardEntry, ...]:
    """The manifest's shards that a brace and glob pattern means, in the manifest's order."""
    names = [entry.name for entry in manifest.shards]
    chosen: set[str] = set()
    for alternative in [pattern] if pattern in names else _expand(pattern, shown):
        found = [alternative] if alternative in names else fnmatch.filter(names, alternative)
        if not found:
            among = f"{len(names)} shards, {names[0]} to {names[-1]}"
            raise UsageError(f"{shown}: the manifest lists no {alternative}; choose among its {among}")
        chosen.update(found)
    return tuple(entry for entry in manifest.shards if entry.name in chosen)


def _expand(pattern: str, shown: str) -> list[str]:
    """``train-{00..02}.tar`` => its three names."""
    from braceexpand import braceexpand

    many = f"{shown} means more than {MAX_EXPANDED:,} names; write fewer"
    for first, last in re.findall(r"\{-?(\d+)\.\.-?(\d+)", pattern):  # braceexpand makes each range before the first name
        if max(len(first), len(last)) > 18 or abs(int(first) - int(last)) > MAX_EXPANDED:
            raise UsageError(many)
    try:
        names = list(islice(braceexpand(pattern), MAX_EXPANDED + 1))
    except ValueError:  # unbalanced braces
        raise UsageError(f"{shown} has a brace without its partner; write e.g. train-{{00000..00009}}.tar") from None
    if len(names) > MAX_EXPANDED:
        raise UsageError(many)
    return names


def _fetch_manifest(place: _Place, format: str | None, transfer: Transfer) -> Manifest:
    folder = redact(place.folder)
    try:
        data = fetch(place.file(MANIFEST_NAME), MAX_MANIFEST_BYTES, b"".join, transfer)
    except MissingError:
        fix = f"make one with `ldm shards index '{folder}/NAME-{{000..099}}.tar' --out DIR` and give DIR"
        raise UsageError(f"{folder} has no {MANIFEST_NAME}; {fix}") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise LdmError(f"{folder}/{MANIFEST_NAME} has more than {MAX_MANIFEST_BYTES} bytes; check the address")
    return Manifest.parse(data, folder, format)
