"""What ldm doctor finds on this machine, and on one with something broken."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from ldm.cli import dispatch
from ldm.doctor import Finding, installed, machine, measured
from ldm.errors import LdmError
from ldm.machine import bf16_is_faster


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_malicious_lightning_fails_and_a_good_one_does_not() -> None:
    required = installed.requirements()
    for version, state in (("2.6.2", "fail"), ("2.6.3", "fail"), ("2.6.6", None)):
        found = by_name(installed.check_versions({"lightning": version}, required)).get("lightning")
        assert state == (found and found.state)
    assert "malicious" in by_name(installed.check_versions({"lightning": "2.6.2"}, []))["lightning"].found


def test_a_version_out_of_range_fails_with_the_command_that_fixes_it() -> None:
    found = by_name(installed.check_versions({"torch": "1.13.1", "numpy": "2.1"}, ["torch<3,>=2.9", "numpy>=2"]))
    assert found["torch"].failed and "pip install 'torch<3,>=2.9'" in found["torch"].fix
    assert "numpy" not in found and "numpy 2.1" in found["versions"].found


def test_the_versions_installed_here_are_in_range() -> None:
    found = list(installed.check_versions(installed.installed_versions(), installed.requirements()))
    assert [finding.state for finding in found] == ["ok"]


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "another_vision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name(installed.check_imports(["another_vision", "lightning", "no_such_package"]))
    broken = found["import another_vision"]
    assert broken.failed and "built for another torch" in broken.found and "--index-url" in broken.fix
    assert found["import no_such_package"].failed
    assert found["imports"].found == "lightning"


@pytest.fixture
def few_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_open_files(few_files: None) -> None:
    found = by_name(machine.check_limits())["open files"]
    assert found.state == "warn" and "512" in found.found and "ulimit -n" in found.fix


def test_disk_speed_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    found = by_name(machine.check_disk(tmp_path / "not" / "yet" / "there", measure=True))
    assert str(tmp_path) in found["disk"].found and "/s" in found["disk writes"].found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails() -> None:
    assert by_name(machine.check_disk(Path("/proc/runs"), measure=False))["disk writes"].failed


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = measured.check_compile()
    assert found.state == "warn" and "no C++ compiler" in found.found


def test_bf16_is_compared_with_the_default_precision_of_fit() -> None:
    (found,) = measured.check_bf16()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert ("bf16-mixed" if bf16_is_faster(device) else "32-true") in found.found and "TFLOP/s in bfloat16" in found.found


def test_extras_are_installed_or_named_with_the_command_that_installs_them() -> None:
    for finding in installed.check_extras():
        assert finding.found.startswith("installed") or "pip install 'ldm[" in finding.found


@pytest.mark.slow
def test_two_processes_connect_and_a_wrong_interface_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = measured.check_two_processes()
    assert "connected over gloo" in found.found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchinterface")
    (found,) = measured.check_two_processes()
    assert found.failed and "GLOO_SOCKET_IFNAME" in found.fix


@pytest.mark.slow
def test_an_all_reduce_is_checked_and_timed() -> None:
    found = measured.all_reduce("gloo", 2, size=2**20, timeout=20)
    assert not found.error and 0 < found.seconds < found.connected
    found = measured.all_reduce("gloo", 2, size=0, timeout=20)  # nothing to look at afterwards
    assert "IndexError" in found.error


def test_the_gpus_of_a_machine_exchange_256_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def answer(*given: object) -> measured.AllReduce:
        asked.append(given)
        return measured.AllReduce(connected=3.0, seconds=1e-3)

    monkeypatch.setattr(measured, "all_reduce", answer)
    for gpus in (0, 1):  # with nobody to exchange with
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert not list(measured.check_gpus_exchange())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    (found,) = measured.check_gpus_exchange()
    assert asked == [("nccl", 8, 256_000_000, measured.NCCL_TIMEOUT)]
    assert found.state == "ok" and "448.0 GB/s" in found.found  # 2 * 7/8 of 256 MB in a millisecond


def test_a_slow_connection_of_gpus_is_a_warning_and_a_broken_one_fails() -> None:
    seconds = 256e6 / measured.SLOW_BANDWIDTH  # of two GPUs, which send as much as they have
    assert measured.describe_exchange(measured.AllReduce(1.0, seconds), 2, 256_000_000).state == "ok"
    slow = measured.describe_exchange(measured.AllReduce(1.0, 1.01 * seconds), 2, 256_000_000)
    assert slow.state == "warn" and "nvidia-smi topo" in slow.fix
    broken = measured.describe_exchange(measured.AllReduce(error="did not connect within 120 s"), 2, 256_000_000)
    assert broken.failed and "NCCL_DEBUG" in broken.fix


def test_the_command_prints_and_writes_every_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dispatch(["doctor", "--quick", "--out", str(tmp_path), "--json", str(tmp_path / "findings.json")])
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    names = [finding["name"] for finding in findings]
    assert {"versions", "imports", "memory", "cores", "disk", "text encoder minilm", "extra s3", "gloo"} <= set(names)
    assert "fail" not in [finding["state"] for finding in findings]
    shown = capsys.readouterr().out
    assert all(name.split()[0] in shown for name in names)
    assert all(finding["fix"] for finding in findings if finding["state"] != "ok")


def test_failed_checks_are_named_in_one_line_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LdmError, match="disk writes") as failed:
        dispatch(["doctor", "--quick", "--out", "/proc/runs"])
    assert failed.value.exit_code == 1 and os.linesep not in str(failed.value)
    assert "fail" in capsys.readouterr().out
