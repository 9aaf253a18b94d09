"""Checks that measure: bf16, JPEG decoding, exchange between processes and between GPUs, torch.compile."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from rich.filesize import decimal
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
    faster = bf16_is_faster(device.type)
    default, other = ("bf16-mixed", "32-true") if faster else ("32-true", "bf16-mixed")
    wrong = gain < 0.8 if faster else gain > 1.5
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


# a first compilation for a GPU also builds Triton's launcher, and on a network drive it takes longer still
COMPILE_SECONDS, SLOW_COMPILE_SECONDS = 120, 30
LONG_RUNS = "set model.compile only for long runs: it takes minutes to begin"
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
            yield Finding("torch.compile", found, LONG_RUNS)
            return
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        yield Finding("torch.compile", lines[-1], "leave model.compile false")
    else:
        slow = float(done.stdout) > SLOW_COMPILE_SECONDS
        yield Finding(
            "torch.compile", f"a small function in {done.stdout.strip()} s, with {compilers[0]}", LONG_RUNS if slow else ""
        )


ALL_REDUCES = 5
ALL_REDUCE = f"""
import os, sys, time, torch, torch.distributed as dist
from datetime import timedelta
backend, size, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
start = time.perf_counter()
dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
numbers = torch.ones(size // 4, device=device)
dist.all_reduce(numbers)
assert (numbers == processes).all(), "the sum over the processes is wrong"
connected = time.perf_counter() - start
seconds = []
for _ in range({ALL_REDUCES}):
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(numbers)
    numbers[0].item()  # waits for a GPU
    seconds.append(time.perf_counter() - start)
print(connected, min(seconds))
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class AllReduce:
    """What :func:`all_reduce` measured: seconds to connect, of the slowest process, and of one all-reduce; or why it failed."""

    connected: float = 0.0
    seconds: float = 0.0
    error: str = ""


def all_reduce(backend: Literal["gloo", "nccl"], processes: int, size: int, timeout: float) -> AllReduce:
    """All-reduces of ``size`` bytes between processes of this machine, each with a GPU of its own under NCCL.

    ``timeout``: seconds to connect, and for each exchange.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALL_REDUCE, backend, str(size), str(timeout)],
            env=os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=2 * timeout) for process in started]
    except subprocess.TimeoutExpired:
        return AllReduce(error=f"did not connect within {2 * timeout:.0f} s")
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        lines = next(error for process, (_, error) in zip(started, outputs, strict=True) if process.returncode).splitlines()
        return AllReduce(error=lines[-1] if lines else "ended without a message")
    connected, seconds = zip(*(map(float, output.split()) for output, _ in outputs), strict=True)
    return AllReduce(max(connected), max(seconds))


SLOW_SECONDS, GLOO_TIMEOUT = 10, 20


def check_two_processes() -> Iterator[Finding]:
    """An all-reduce between two processes of this machine."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return
    found = all_reduce("gloo", 2, size=4, timeout=GLOO_TIMEOUT)
    fix = "export GLOO_SOCKET_IFNAME=lo on one machine; with several, the interface that connects them"
    if found.error:
        yield Finding("two processes", found.error, fix, failed=True)
        return
    slow = found.connected > SLOW_SECONDS
    yield Finding("two processes", f"connected over gloo in {found.connected:.1f} s", fix if slow else "")


# of fp32 gradients; with fewer bytes the time is latency
NCCL_BYTES, NCCL_TIMEOUT = 256 * 10**6, 60
# what PCI Express 3 with 16 lanes gives; less is a copy through the host's memory, or a link of fewer lanes
SLOW_BANDWIDTH = 10e9


def check_gpus_exchange() -> Iterator[Finding]:
    """An all-reduce of 256 MB over all GPUs of this machine, as DDP sends gradients in every step."""
    gpus = torch.cuda.device_count()
    if gpus < 2 or not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return
    yield describe_exchange(all_reduce("nccl", gpus, NCCL_BYTES, NCCL_TIMEOUT), gpus, NCCL_BYTES)


def describe_exchange(found: AllReduce, gpus: int, size: int) -> Finding:
    """What an all-reduce of ``size`` bytes says about the connection of the GPUs."""
    if found.error:
        fix = "export NCCL_DEBUG=INFO and run ldm doctor again: it says where; NCCL_P2P_DISABLE=1 avoids links that are broken"
        return Finding("NCCL", found.error, fix, failed=True)
    bandwidth = 2 * (gpus - 1) / gpus * size / found.seconds  # bytes that a process sends in a ring, a second
    fix = "nvidia-smi topo -m shows how the GPUs are connected; with a slow link a larger data.batch_size helps"
    found_text = (
        f"all-reduce of {decimal(size)} over {gpus} GPUs in {1000 * found.seconds:.3g} ms, {decimal(int(bandwidth))}/s; "
        f"connected in {found.connected:.1f} s"
    )
    return Finding("NCCL", found_text, fix if bandwidth < SLOW_BANDWIDTH else "")
