"""Starts a process in which torch sees one GPU (:mod:`tests.gpu.pretend`), and calls a function there.

def steps(counts, folder):  # on the module's top level
    ...
    return {"waits": counts.waits}

@needs_pretended_gpu
def test_steps(tmp_path):
    assert on_pretended_gpu(steps, str(tmp_path))["waits"] == {}
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# what a C compiler would find in a header of nvcc, which torch does not install
MACROS = (
    *("__device_builtin__=", "__device_builtin_texture_type__=", "__device_builtin_surface_type__=", "__cudart_builtin__="),
    *("__host__=", "__device__=", "CUDARTAPI=", "__no_return__=", "__inline_hint__=", "__location__(what)="),
    *("__builtin_align__(size)=__attribute__((aligned(size)))", "__align__(size)=__attribute__((aligned(size)))"),
)


def cuda_headers() -> Path | None:
    """The folder of the CUDA runtime's headers, which comes with torch's wheels for CUDA."""
    site = Path(torch.__file__).parents[1]
    return next((file.parent for file in sorted(site.glob("nvidia/*/include/cuda_runtime_api.h"))), None)


def why_not() -> str:
    """Why no GPU can be pretended here; empty where one can."""
    if not sys.platform.startswith("linux"):
        return "a library is preloaded, which needs Linux"
    if torch.version.cuda is None or cuda_headers() is None:
        return "needs a torch built for CUDA, and the headers of its wheel"
    return "" if shutil.which("gcc") else "needs gcc"


needs_pretended_gpu = pytest.mark.skipif(bool(why_not()), reason=why_not() or "a GPU can be pretended")


@functools.cache
def library() -> Path:
    """``runtime.c``, compiled."""
    folder = Path(tempfile.mkdtemp(prefix="ldm-pretended-gpu-"))
    (folder / "crt").mkdir()
    (folder / "crt" / "host_defines.h").touch()
    built = folder / "libcuda.so.1"  # torch opens the driver by this name
    options = ["-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{built.name}", *(f"-D{macro}" for macro in MACROS)]
    subprocess.run(["gcc", *options, f"-I{folder}", f"-I{cuda_headers()}", HERE / "runtime.c", "-o", built], check=True)
    return built


def on_pretended_gpu(function: Callable[..., Any], *arguments: Any, seconds: float = 600) -> Any:
    """``function(counts, *arguments)`` in a process with a pretended GPU; arguments and result go through JSON."""
    built = library()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        task = [function.__code__.co_filename, function.__name__, json.dumps(arguments), str(result)]
        environment = {
            "LD_PRELOAD": str(built),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "LDM_DEBUG": "1",
        }
        command = [sys.executable, "-m", "tests.gpu.launch", *task]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads(result.read_text())


def main(file: str, name: str, arguments: str, result: str) -> None:
    """In that process."""
    from tests.gpu.pretend import pretended_gpu

    spec = importlib.util.spec_from_file_location("task", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pretended_gpu() as counts:
        spec.loader.exec_module(module)
        found = getattr(module, name)(counts, *json.loads(arguments))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
