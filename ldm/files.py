"""Atomic writes, hashes, format versions, and checks of input and output folders."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, overload

from ldm.errors import LdmError, UsageError
from ldm.terminal import printable

if TYPE_CHECKING:
    import pydantic
    import pydantic_core


LOCK_NAME = ".lock"  # in a folder that a process works on; see ldm.locks
MAX_JSON_BYTES = 256 * 2**20
# the largest config of ours has 100 values
MAX_YAML_BYTES, MAX_YAML_VALUES, MAX_YAML_DEPTH = 4 * 2**20, 20_000, 50

RESTORE = "write it again or restore it"


@contextlib.contextmanager
def open_regular(path: str | os.PathLike, fix: str = "give a regular file") -> Iterator[io.BufferedReader]:
    """Open a file to read its bytes, without ever waiting for a pipe or a device.

    Raises:
        LdmError: there is no such file, it is not a regular one, or it cannot be read; ``fix`` follows the reason.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # else the open of a pipe waits for its writer
    except (OSError, ValueError) as error:  # ValueError: NUL in the name, or half a surrogate pair
        raise LdmError(f"{printable(path)} cannot be read ({_reason(error)}); {fix}") from None
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LdmError(f"{printable(path)} is {_kind(mode)}; {fix}")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: str | os.PathLike, limit: int, fix: str = "give a regular file") -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes. Raises :class:`LdmError` as :func:`open_regular` does."""
    with open_regular(path, fix) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise LdmError(f"{printable(path)} cannot be read ({_reason(error)}); {fix}") from None
    if len(data) > limit:
        raise LdmError(f"{printable(path)} is larger than the limit of {limit} bytes; {fix}")
    return data


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or printable(error)


def _kind(mode: int) -> str:
    """What a path is, of those that were not expected there: ``a folder``."""
    kinds = {"-": "a file", "d": "a folder", "l": "a link", "p": "a named pipe", "s": "a socket"}
    kinds |= dict.fromkeys("cb", "a device")
    return kinds.get(stat.filemode(mode)[0], "not a regular file")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb", replaces_folder: bool = False) -> Iterator[IO]:
    """Open a temporary file in the target's own folder; on success fsync it and rename it to ``path``.

    A link is followed: the file that it points to is replaced. On an exception the temporary file is removed and ``path`` keeps
    its previous content. Raises :class:`UsageError` where something else than a regular file stands at ``path``.
    ``replaces_folder``: the block itself removes a folder that stands there.
    """
    path = _followed(path)
    if not (replaces_folder and path.is_dir()):
        _require_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_output_file(path: str | os.PathLike, inputs: Iterable[str | os.PathLike | None] = ()) -> Path:
    """``path``, or what it links to, if a file can be written there, else raise :class:`UsageError`.

    Args:
        inputs: files and folders that are read. What stands in them is not overwritten, but for an HTML page: none is read.
    """
    path = _followed(path)
    _require_replaceable(path)
    for read in inputs:
        if (
            os.path.exists(path)
            and read is not None
            and path.suffix != ".html"
            and path.resolve().is_relative_to(os.path.realpath(read))
        ):
            raise UsageError(f"{path} is a file of {read}, which is read; give another name")
    _require_possible(path)
    return path


@contextlib.contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """SIGTERM raises ``SystemExit`` inside the block, so that temporary files are removed; exit code 143.

    Only in the main thread, and where nothing else handles the signal.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success rename it to ``path``, which must be absent or empty.

    On an exception inside the block, and on SIGTERM, the temporary folder is removed. If the rename fails, because something
    came to stand at ``path`` meanwhile, the work is kept and the :class:`LdmError` says where.
    """
    path = require_new_folder(path, "the output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with exiting_on_sigterm():
            yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.chmod(0o755)
    try:
        os.rename(temporary, path)  # replaces an empty folder
    except OSError as error:
        raise LdmError(
            f"{path} cannot be made ({error.strerror}); the work is complete and kept in {temporary}: rename that folder"
        ) from None
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


T = TypeVar("T")


@overload
def read_json(path: str | os.PathLike) -> Any: ...
@overload
def read_json(path: str | os.PathLike, schema: type[T], limit: int = MAX_JSON_BYTES) -> T: ...
def read_json(path: str | os.PathLike, schema: Any = Any, limit: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file of at most ``limit`` bytes. See :func:`parse_json`. A missing file is an :class:`LdmError` too."""
    if not os.path.lexists(path):
        raise LdmError(f"{printable(path)} does not exist")
    return parse_json(read_bytes(path, limit, RESTORE), os.fspath(path), schema)


@overload
def parse_json(data: bytes, source: str) -> Any: ...
@overload
def parse_json(data: bytes, source: str, schema: type[T]) -> T: ...
def parse_json(data: bytes, source: str, schema: Any = Any) -> Any:
    """Parse JSON, and check it against a type: every artifact is untrusted, it may be of another program or half written.

    Args:
        source: where the bytes are from, for the message.
        schema: a dataclass, a ``typing_extensions.TypedDict`` or any type that pydantic knows, strictly: a whole number is not
            a text, a boolean is not a number, and no number is NaN or infinite. ``Annotated[int, Field(ge=0)]`` sets bounds.
            Unknown keys are dropped from a dataclass and a TypedDict.

    Raises:
        LdmError: one line with the source, the key and what is wrong there.
    """
    import pydantic_core

    try:
        # json.loads would accept NaN, and numbers of any length; this parses twice, but these files are small
        data = data.removeprefix(b"\xef\xbb\xbf")
        pydantic_core.from_json(data, allow_inf_nan=False)
        return _adapter(schema).validate_json(data, strict=True)
    except pydantic_core.ValidationError as error:
        raise _explained(error, source) from None
    except ValueError as error:
        raise LdmError(printable(f"{source} is not readable JSON ({error}); {RESTORE}")) from None


def check_type(value: object, source: str, schema: type[T]) -> T:
    """``value``, checked as by :func:`parse_json`, but for NaN and infinity: ``pydantic.FiniteFloat`` refuses those."""
    import pydantic_core

    try:
        return _adapter(schema).validate_python(value, strict=True)
    except pydantic_core.ValidationError as error:
        raise _explained(error, source) from None


def _explained(error: pydantic_core.ValidationError, source: str) -> LdmError:
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(map(str, first["loc"])) or "the whole file"
    found = "" if first["type"] == "missing" else f", not {repr(first['input'])[:60]}"
    said = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return LdmError(printable(f"{source}: {key}: {said[:1].lower()}{said[1:]}{found}; {RESTORE}"))


@functools.cache
def _adapter(schema: Any) -> pydantic.TypeAdapter[Any]:
    import pydantic  # here, because it takes 0.1 s to import

    return pydantic.TypeAdapter(schema)


@overload
def read_yaml(path: str | os.PathLike) -> Any: ...
@overload
def read_yaml(path: str | os.PathLike, schema: type[T]) -> T: ...
def read_yaml(path: str | os.PathLike, schema: Any = Any) -> Any:
    """Read a YAML file of plain values. Raises :class:`LdmError` as :func:`read_json` does."""
    import yaml

    data = read_bytes(path, MAX_YAML_BYTES, RESTORE)
    try:
        check_yaml(data)
        value = yaml.safe_load(data)
    except Exception as error:  # a date or a number that Python cannot represent raises anything
        raise LdmError(printable(f"{path} is not readable YAML ({' '.join(str(error).split())}); {RESTORE}")) from None
    return check_type(value, os.fspath(path), schema)


def check_yaml(text: bytes | str) -> None:
    """Raise :class:`yaml.YAMLError` for YAML with more values, its aliases written out, or more levels than the limits.

    Aliases of aliases can stand for more values than fit into memory, in a few lines. Nothing is built here.
    """
    import yaml

    sizes: dict[str, int] = {}  # of what each anchor names
    stack: list[tuple[str | None, int]] = [(None, 0)]  # anchor and size of the open collections
    for event in yaml.parse(text, Loader=yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
        size = 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"*{event.anchor} stands before the end of &{event.anchor}")
            size = sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            stack.append((event.anchor, 1))
        elif isinstance(event, yaml.ScalarEvent | yaml.CollectionEndEvent):
            anchor, size = (event.anchor, 1) if isinstance(event, yaml.ScalarEvent) else stack.pop()
            if anchor is not None:
                sizes[anchor] = size
        stack[-1] = stack[-1][0], stack[-1][1] + size
        if stack[-1][1] > MAX_YAML_VALUES or len(stack) > MAX_YAML_DEPTH:
            raise yaml.YAMLError(
                f"more than {MAX_YAML_VALUES:,} values, aliases written out, or {MAX_YAML_DEPTH} levels of nesting"
            )


def require_version(found: object, known: int, what: str) -> None:
    """Refuse a file of a newer format than this ldm reads; the caller handles older ones.

    Args:
        found: the version that the file carries; None in files written before formats had versions, which count as 0.
        known: the newest version that the caller reads.
        what: the file and its kind, for the message, such as ``shards/manifest.json: the manifest``.

    Raises:
        LdmError: when ``found`` is newer, or no version at all.
    """
    if found is None:
        return
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise LdmError(f"{what} has format version {found!r}, which is not a whole number; {RESTORE}")
    if found > known:
        raise LdmError(
            f"{what} has format version {found}, and this ldm reads up to {known}; install the newer ldm that wrote it"
        )


def sha256_file(path: str | os.PathLike) -> str:
    """Hex sha256 of a regular file. Raises :class:`LdmError` as :func:`open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: str | os.PathLike, suffixes: tuple[str, ...] = (".json", ".safetensors")) -> str:
    """Hex sha256 over names and contents of a folder's files with these suffixes (a model's weights and config)."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        if file.is_file() and file.suffix in suffixes:
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def require_new_folder(path: str | os.PathLike, what: str, in_place: bool = False) -> Path:
    """``path``, or what it links to, if it is absent or an empty folder and can be made, else raise :class:`UsageError`.

    Args:
        in_place: files will be written into it one by one, so that it may be a mount point or the current folder.
    """
    path = _followed(path)
    if os.path.exists(path):  # unlike Path.exists it never raises
        if not path.is_dir():
            raise UsageError(f"{path} is {_kind(path.stat().st_mode)}; give a new folder for {what}")
        if any(entry.name != LOCK_NAME for entry in os.scandir(path)):
            raise UsageError(f"{path} already holds other work; give a new folder for {what}")
        if in_place:
            if not os.access(path, os.W_OK | os.X_OK):  # a trial would look like work to another process that begins now
                raise UsageError(f"{path} cannot be written; give another folder for {what}")
            return path
        if path.is_mount() or path.samefile("."):
            place = "a mount point" if path.is_mount() else "the current folder"
            raise UsageError(f"{path} is {place}, which cannot be replaced; give a new folder inside it for {what}")
    _require_possible(path)
    return path


def _require_replaceable(path: Path) -> None:
    if os.path.exists(path) and not path.is_file():
        raise UsageError(f"{path} is {_kind(path.stat().st_mode)}, which is not overwritten; give the name of a file")


def _followed(path: str | os.PathLike) -> Path:
    if not os.fspath(path):
        raise UsageError("the output has no name; give one")
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def _require_possible(path: Path) -> None:
    """Raise :class:`UsageError` unless ``path`` can be made: in its folder, or in a new one inside the nearest that exists."""
    try:
        parent = next(folder for folder in path.absolute().parents if os.path.exists(folder))
        os.rmdir(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=parent))
    except (OSError, ValueError) as error:  # ValueError: NUL in the name, or half a surrogate pair
        raise UsageError(f"{printable(path)} cannot be made ({_reason(error)}); give another name") from None


def require_folder(path: str | os.PathLike, what: str) -> Path:
    """Return ``path`` if it is a folder, else raise :class:`UsageError`."""
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir it never raises
        raise UsageError(f"{printable(path)} is not a folder; expected {what}")
    return path
