"""What the machine has: devices, memory, cores, limits, disk."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.filesize import decimal

from ldm.doctor.finding import FAIL, OK, WARN, Finding
from ldm.errors import first_line
from ldm.machine import cpu_name


def device_findings() -> Iterator[Finding]:
    """GPUs: their memory, driver and bf16."""
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        if driver:
            mend = "pip install --force-reinstall torch torchvision, or a newer driver: see torch.cuda.init()"
            yield Finding("GPU", WARN, f"there is one (driver {driver}), but torch {torch.__version__} cannot use it", mend)
        else:
            yield Finding("GPU", OK, "none: the CPU trains")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        said = f"{device.name}, {decimal(total)}, {decimal(free)} free, driver {driver or 'unknown'}, "
        said += f"compute {device.major}.{device.minor}, {'bf16' if bf16 else 'no bf16'}"
        if free < total / 2:
            yield Finding(f"GPU {number}", WARN, said, "another program holds its memory: see nvidia-smi")
        else:
            yield Finding(f"GPU {number}", OK, said)


def _nvidia_driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(query, capture_output=True, text=True, timeout=20)
    lines = asked.stdout.split()
    return lines[0] if asked.returncode == 0 and lines else None


MEMORY = Path("/proc/meminfo")


def machine_findings() -> Iterator[Finding]:
    """Memory, cores and what worker processes share."""
    # what programs could have without anything being written to disk; only Linux tells
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available, said = total, decimal(total)
    if MEMORY.is_file():
        line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
        available = int(line.split()[1]) * 1024
        said += f", {decimal(available)} free"
    mend = "end other programs, or take a smaller recipe" if available < 4e9 else ""
    yield Finding("memory", WARN if mend else OK, said, mend)
    # Linux alone tells which of them this process may have
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    load = os.getloadavg()[0]
    said = f"{cores} of {cpu_name()}, torch uses {threads}; load {load:.1f}"
    if load > 0.5 * cores + 0.5:
        yield Finding("cores", WARN, said, "others use them too: what is measured here, and training, is slower for it")
    else:
        yield Finding("cores", OK, said)
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total
        mend = "data.workers pass batches through it: docker run --shm-size=8g, or data.workers 0" if shared < 1e9 else ""
        yield Finding("shared memory", WARN if mend else OK, decimal(shared), mend)


def limit_findings() -> Iterator[Finding]:
    """What the shell allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    mend = "ulimit -n 65536: every worker and shard needs some" if 0 <= files < 4096 else ""
    yield Finding("open files", WARN if mend else OK, "no limit" if files < 0 else f"up to {files:,}", mend)
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size != resource.RLIM_INFINITY:
        yield Finding("size of files", WARN, f"up to {decimal(size)}", "ulimit -f unlimited: checkpoints may be larger")


BLOCK, BLOCKS = 2**20, 128


def disk_findings(out: Path, measure: bool) -> Iterator[Finding]:
    """Room and speed where runs go, and what TMPDIR is."""
    folder = out.absolute()
    folder = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(folder).free
    few = free < 20e9
    yield Finding(
        "disk", WARN if few else OK, f"{decimal(free)} free in {folder}", "what a run needs: --dry-run" if few else ""
    )
    yield _write(folder, BLOCKS if measure and free > 2 * BLOCKS * BLOCK else 1)
    temporary = Path(tempfile.gettempdir())
    same, free = temporary.stat().st_dev == folder.stat().st_dev, shutil.disk_usage(temporary).free
    said = f"{temporary}, {'the same' if same else 'another'} file system, {decimal(free)} free"
    mend = "export TMPDIR=/a/folder/with/room" if free < 1e9 else ""
    yield Finding("TMPDIR", WARN if mend else OK, said, mend)


def _write(folder: Path, blocks: int) -> Finding:
    block = os.urandom(BLOCK)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ldm-doctor-") as file:
            start = time.perf_counter()
            for _ in range(blocks):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = blocks * BLOCK / (time.perf_counter() - start)
    except OSError as error:
        return Finding("disk writes", FAIL, first_line(error), "see to it, or give another folder as --out")
    if blocks == 1:  # too few to tell
        return Finding("disk writes", OK, "a file could be written")
    slow = speed < 50e6
    mend = "checkpoints.background: true, or another disk: a checkpoint of DiT-XL is 10 GB" if slow else ""
    return Finding("disk writes", WARN if slow else OK, f"{decimal(int(speed))}/s, fsync included", mend)
