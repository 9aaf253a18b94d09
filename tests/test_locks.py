"""Locks that keep a second process out, with and without locks of the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.errors import UsageError
from ldm.files import LOCK_NAME
from ldm.locks import hold, hold_folder

HOLD = """
import sys
from ldm.locks import hold_folder
with hold_folder(sys.argv[1], "training"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_another_process_is_kept_out_and_told_who_holds_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "new" / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdin and other.stdout.readline() == "held\n"
        said = rf"another ldm is training \(process {other.pid} on {socket.gethostname()}\)"
        for _ in range(2):  # a refused process leaves the lock and what it says
            with pytest.raises(UsageError, match=said), hold_folder(tmp_path / "new" / "run", "training"):
                pass
        other.stdin.write("\n")
    assert other.returncode == 0 and not (tmp_path / "new").exists()
    with hold_folder(tmp_path / "run", "training"):
        (tmp_path / "run" / "work").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["work"]


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        other.kill()
    assert (tmp_path / LOCK_NAME).exists()
    with hold_folder(tmp_path, "training"):
        assert (tmp_path / LOCK_NAME).read_text().split()[0] == str(os.getpid())


def test_without_locks_of_the_file_system_the_file_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path / LOCK_NAME, "training"):
        said = rf"another ldm is training \(process {os.getpid()} on {socket.gethostname()}\); .* gone, remove .*{LOCK_NAME}"
        with pytest.raises(UsageError, match=said), hold(tmp_path / LOCK_NAME, "training"):
            pass
    assert not list(tmp_path.iterdir())
    with hold(tmp_path / LOCK_NAME, "training"):
        pass
