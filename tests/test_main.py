"""How the process of a command ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The main thread keeps the GIL in the last of ``atexit``'s functions, so that gloo's threads still hold tensors when the
# finalisation would begin: ended by Python itself, 5 of 6 such processes abort.
PROGRAM = """
import atexit, ctypes, sys
from ldm import cli
from ldm.__main__ import main

def command():
    import torch, torch.distributed as dist
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
    atexit.register(ctypes.PyDLL(None).usleep, 100_000)
    atexit.register(lambda: [dist.all_reduce(each, async_op=True) for each in [torch.ones(1_000_000) for _ in range(50)]])
    atexit.register(print, "cleaned up")
    if code := int(sys.argv[2]):
        sys.exit(code)

cli.main = command
main()
"""


@pytest.mark.parametrize("code", [0, 0, 143])
def test_one_of_several_processes_does_not_abort_at_its_end(code: int, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store"), str(code)], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (code, "cleaned up\n"), ended.stderr
