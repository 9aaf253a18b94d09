"""Checks of the machine: devices, memory, cores, limits, disk."""

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

from ldm.doctor import Finding
from ldm.errors import first_line
from ldm.machine import cpu_name


def check_devices() -> Iterator[Finding]:
    """GPUs: memory, driver, bf16."""
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        if driver:
            fix = "pip install --force-reinstall torch torchvision, or install a newer driver; torch.cuda.init() says why"
            yield Finding("GPU", f"present (driver {driver}), but torch {torch.__version__} cannot use it", fix)
        else:
            yield Finding("GPU", "none; training runs on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found = f"{device.name}, {decimal(total)}, {decimal(free)} free, driver {driver or 'unknown'}, "
        found += f"compute {device.major}.{device.minor}, {'bf16' if bf16 else 'no bf16'}"
        yield Finding(f"GPU {number}", found, "another program uses its memory; see nvidia-smi" if free < total / 2 else "")


def _nvidia_driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


MEMORY = Path("/proc/meminfo")


def check_machine() -> Iterator[Finding]:
    """Memory, cores, and shared memory for worker processes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available, found = total, decimal(total)
    if MEMORY.is_file():  # Linux; MemAvailable is what programs can get without swapping
        line = next(line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
        available = int(line.split()[1]) * 1024
        found += f", {decimal(available)} free"
    yield Finding("memory", found, "end other programs, or use a smaller recipe" if available < 4e9 else "")
    # only Linux knows which of them this process may use
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    found = f"{cores} of {cpu_name()}, torch uses {torch.get_num_threads()}; load {load:.1f}"
    busy = load > 0.5 * cores + 0.5
    yield Finding("cores", found, "end other programs: they slow down training and the measurements below" if busy else "")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total
        fix = "docker run --shm-size=8g, or data.workers 0: workers pass batches through it" if shared < 1e9 else ""
        yield Finding("shared memory", decimal(shared), fix)


def check_limits() -> Iterator[Finding]:
    """Limits set by the shell."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = "ulimit -n 65536: every worker and shard needs some" if 0 <= files < 4096 else ""
    yield Finding("open files", "no limit" if files < 0 else f"up to {files:,}", fix)
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size != resource.RLIM_INFINITY:
        yield Finding("size of files", f"up to {decimal(size)}", "ulimit -f unlimited: checkpoints may be larger")


BLOCK, BLOCKS = 2**20, 128


def check_disk(out: Path, measure: bool) -> Iterator[Finding]:
    """Free space and write speed in the output folder, and TMPDIR."""
    folder = out.absolute()
    folder = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(folder).free
    fix = "free some space; fit --dry-run says how much a run needs" if free < 20e9 else ""
    yield Finding("disk", f"{decimal(free)} free in {folder}", fix)
    yield _measure_writes(folder, BLOCKS if measure and free > 2 * BLOCKS * BLOCK else 1)
    temporary = Path(tempfile.gettempdir())
    same, free = temporary.stat().st_dev == folder.stat().st_dev, shutil.disk_usage(temporary).free
    found = f"{temporary}, {'same' if same else 'another'} file system, {decimal(free)} free"
    yield Finding("TMPDIR", found, "export TMPDIR=/a/folder/with/space" if free < 1e9 else "")


def _measure_writes(folder: Path, blocks: int) -> Finding:
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
        return Finding("disk writes", first_line(error), "fix that, or give another folder as --out", failed=True)
    if blocks == 1:  # too few to measure
        return Finding("disk writes", "possible")
    fix = "checkpoints.background: true, or another disk: a checkpoint of DiT-XL is 10 GB" if speed < 50e6 else ""
    return Finding("disk writes", f"{decimal(int(speed))}/s, fsync included", fix)
