"""Checks that measure, a few seconds each: bf16, JPEG decoding, two processes, torch.compile."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import Timer

from ldm.doctor import Finding
from ldm.images import open_image
from ldm.machine import bf16_is_faster


def check_bf16() -> Iterator[Finding]:
    """Speed of a matrix product in fp32 and bf16, compared with the default precision of ``fit``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 8192 if device.type == "cuda" else 512
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        timer = Timer("torch.mm(matrix, matrix)", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
        seconds[dtype] = min(timer.blocked_autorange(min_run_time=1.0).times)
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    rates = " and ".join(
        f"{2 * side**3 / time / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}" for dtype, time in seconds.items()
    )
    default, other = ("bf16-mixed", "32-true") if bf16_is_faster() else ("32-true", "bf16-mixed")
    wrong = gain < 0.8 if bf16_is_faster() else gain > 1.5
    found = f"{rates}: {gain:.2g}x; the default precision of fit is {default}"
    yield Finding("bf16", found, f"set trainer.precision: {other}" if wrong else "")


def check_jpeg() -> Iterator[Finding]:
    """JPEG decoding on one core, with simplejpeg (used by stage one) and with Pillow."""
    import simplejpeg

    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=90)
    data = file.getvalue()

    def decode_with_pillow() -> np.ndarray:
        with open_image(data) as image:
            return np.asarray(image.convert("RGB"))

    decoders = (lambda: simplejpeg.decode_jpeg(data, "RGB"), decode_with_pillow)
    timers = [Timer("decode()", globals={"decode": decode}) for decode in decoders]
    ours, pillow = (1 / timer.blocked_autorange(min_run_time=0.5).mean for timer in timers)
    fix = "pip install --force-reinstall simplejpeg: its wheel includes the fast decoder" if ours < pillow else ""
    yield Finding("JPEG", f"{ours:,.0f} images of 256 px per second and core, {ours / pillow:.1f}x Pillow", fix)


COMPILE_SECONDS = 15
COMPILED = """
import time, torch
start = time.perf_counter()
x = torch.ones(64, device="cuda" if torch.cuda.is_available() else "cpu")
result = torch.compile(lambda x: torch.nn.functional.gelu(x) * 2)(x)
assert torch.allclose(result, torch.nn.functional.gelu(x) * 2)
print(f"{time.perf_counter() - start:.1f}")
"""


def check_compile() -> Iterator[Finding]:
    """Whether a small function can be compiled, and how long that takes."""
    compilers = [name for name in (os.environ.get("CXX", "g++"), "clang++") if shutil.which(name)]
    if not compilers:
        yield Finding("torch.compile", "no C++ compiler", "apt install g++, or leave model.compile false")
        return
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        try:
            done = subprocess.run(
                [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=COMPILE_SECONDS
            )
        except subprocess.TimeoutExpired:
            found = f"a small function takes more than {COMPILE_SECONDS} s"
            yield Finding("torch.compile", found, "set model.compile only for long runs: it takes minutes to begin")
            return
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        yield Finding("torch.compile", lines[-1], "leave model.compile false")
    else:
        yield Finding("torch.compile", f"a small function in {done.stdout.strip()} s, with {compilers[0]}")


SLOW_SECONDS, TIMEOUT_SECONDS = 10, 40
ALL_REDUCE = """
import time, torch, torch.distributed as dist
from datetime import timedelta
start = time.perf_counter()
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
number = torch.ones(1)
dist.all_reduce(number)
assert number == 2
print(f"{time.perf_counter() - start:.2f}")
dist.destroy_process_group()
"""


def check_two_processes() -> Iterator[Finding]:
    """An all-reduce between two processes of this machine."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALL_REDUCE],
            env=os.environ | address | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    fix = "export GLOO_SOCKET_IFNAME=lo on one machine; with several, the interface that connects them"
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        yield Finding("two processes", f"did not connect within {TIMEOUT_SECONDS} s", fix, failed=True)
        return
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        lines = next(error for process, (_, error) in zip(processes, outputs, strict=True) if process.returncode).splitlines()
        yield Finding("two processes", lines[-1] if lines else "ended without a message", fix, failed=True)
        return
    seconds = max(float(output) for output, _ in outputs)
    yield Finding("two processes", f"connected over gloo in {seconds:.1f} s", fix if seconds > SLOW_SECONDS else "")
