"""What only trying tells, a few seconds each: bf16, the decoding of images, two processes, torch.compile."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from ldm.doctor.finding import FAIL, OK, WARN, Finding
from ldm.machine import bf16_pays


def bf16_findings() -> Iterator[Finding]:
    """A product of matrices in fp32 and in bf16, against what ``fit`` takes by default."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 8192 if device.type == "cuda" else 512
    seconds = {dtype: _product_seconds(device, side, dtype) for dtype in (torch.float32, torch.bfloat16)}
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    rates = " and ".join(
        f"{2 * side**3 / time / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}" for dtype, time in seconds.items()
    )
    said, default = f"{rates}: {gain:.2g}x", "bf16-mixed" if bf16_pays() else "32-true"
    wrong = gain < 0.8 if bf16_pays() else gain > 1.5
    mend = f"fit takes {default} here; give trainer.precision {'32-true' if bf16_pays() else 'bf16-mixed'}" if wrong else ""
    yield Finding("bf16", WARN if wrong else OK, f"{said}; fit takes {default}", mend)


def _product_seconds(device: torch.device, side: int, dtype: torch.dtype, budget: float = 1.0) -> float:
    """Of the fastest of some, within about ``budget`` seconds, but at least one after the first."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    for number in range(20):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
            if time.perf_counter() - begin > budget:
                break
    return best


def jpeg_findings() -> Iterator[Finding]:
    """Images of 256 px decoded in a second on one core, by what stage one reads with and by Pillow."""
    import simplejpeg

    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=90)
    data = file.getvalue()
    ours = _per_second(lambda: simplejpeg.decode_jpeg(data, "RGB"))
    pillow = _per_second(lambda: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    slow = ours < pillow
    mend = "pip install --force-reinstall simplejpeg: its wheel carries the fast decoder" if slow else ""
    said = f"{ours:,.0f} images of 256 px a second on a core, {ours / pillow:.1f}x Pillow"
    yield Finding("JPEG", WARN if slow else OK, said, mend)


def _per_second(work: Callable[[], object], budget: float = 0.5) -> float:
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < budget:
        work()
        done += 1
    return done / (time.perf_counter() - start)


COMPILE_SECONDS = 15
COMPILED = """
import time, torch
start = time.perf_counter()
x = torch.ones(64, device="cuda" if torch.cuda.is_available() else "cpu")
result = torch.compile(lambda x: torch.nn.functional.gelu(x) * 2)(x)
assert torch.allclose(result, torch.nn.functional.gelu(x) * 2)
print(f"{time.perf_counter() - start:.1f}")
"""


def compile_findings() -> Iterator[Finding]:
    """Whether a small function can be compiled anew, and in how long."""
    compilers = [name for name in (os.environ.get("CXX", "g++"), "clang++") if shutil.which(name)]
    if not compilers:
        yield Finding("torch.compile", WARN, "no C++ compiler", "apt install g++, or leave model.compile false")
        return
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        try:
            done = subprocess.run(
                [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=COMPILE_SECONDS
            )
        except subprocess.TimeoutExpired:
            said = f"a small function is not compiled after {COMPILE_SECONDS} s"
            yield Finding("torch.compile", WARN, said, "model.compile takes minutes at first: for long runs alone")
            return
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        yield Finding("torch.compile", WARN, lines[-1], "leave model.compile false; LDM_DEBUG=1 shows more")
    else:
        yield Finding("torch.compile", OK, f"a small function in {done.stdout.strip()} s, with {compilers[0]}")


RENDEZVOUS_SECONDS, WHOLE_SECONDS = 10, 40
MEETING = """
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


def rendezvous_findings() -> Iterator[Finding]:
    """Two processes of this machine that find each other and add a number up."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    mend = "export GLOO_SOCKET_IFNAME=lo on one machine; of several, the interface between them"
    try:
        said = [process.communicate(timeout=WHOLE_SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        yield Finding("two processes", FAIL, f"did not meet within {WHOLE_SECONDS} s", mend)
        return
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        lines = next(error for process, (_, error) in zip(processes, said, strict=True) if process.returncode).splitlines()
        yield Finding("two processes", FAIL, lines[-1] if lines else "ended without a word", mend)
        return
    seconds = max(float(output) for output, _ in said)
    slow = seconds > RENDEZVOUS_SECONDS
    yield Finding("two processes", WARN if slow else OK, f"met over gloo in {seconds:.1f} s", mend if slow else "")
