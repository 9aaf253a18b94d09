"""What the doctor finds on this machine, and on one that something is made to be wrong with."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from ldm.cli import doctor as command
from ldm.cli.parser import Parser
from ldm.doctor import installed, machine, measured
from ldm.doctor.finding import FAIL, OK, WARN, Finding
from ldm.errors import LdmError
from ldm.machine import bf16_pays


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def run(*arguments: str) -> None:
    parser = Parser("ldm")
    command.add(parser.add_subparsers(parser_class=Parser))
    options = parser.parse_args(["doctor", *arguments])
    options.run(options)


def test_a_malicious_lightning_fails_and_a_good_one_does_not() -> None:
    required = installed.requirements()
    for version, state in (("2.6.2", FAIL), ("2.6.3", FAIL), ("2.6.6", None)):
        found = by_name(installed.version_findings({"lightning": version}, required)).get("lightning")
        assert state == (found and found.state)
    assert "malicious" in by_name(installed.version_findings({"lightning": "2.6.2"}, []))["lightning"].said


def test_a_version_that_is_not_asked_for_fails_with_the_line_that_installs_another() -> None:
    found = by_name(installed.version_findings({"torch": "1.13.1", "numpy": "2.1"}, ["torch<3,>=2.9", "numpy>=2"]))
    assert found["torch"].state == FAIL and "pip install 'torch<3,>=2.9'" in found["torch"].mend
    assert "numpy" not in found and "numpy 2.1" in found["versions"].said


def test_what_is_installed_here_is_what_is_asked_for() -> None:
    found = list(installed.version_findings(installed.installed_versions(), installed.requirements()))
    assert [finding.state for finding in found] == [OK]


def test_a_torchvision_of_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "another_vision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name(installed.import_findings(["another_vision", "lightning", "no_such_package"]))
    broken = found["import another_vision"]
    assert broken.state == FAIL and "built for another torch" in broken.said and "--index-url" in broken.mend
    assert found["import no_such_package"].state == FAIL
    assert found["imports"].said == "lightning"


@pytest.fixture
def few_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_open_files(few_files: None) -> None:
    found = by_name(machine.limit_findings())["open files"]
    assert found.state == WARN and "512" in found.said and "ulimit -n" in found.mend


def test_the_disk_is_written_to_and_nothing_stays(tmp_path: Path) -> None:
    found = by_name(machine.disk_findings(tmp_path / "not" / "yet" / "there", measure=True))
    assert str(tmp_path) in found["disk"].said and "/s" in found["disk writes"].said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files_fails() -> None:
    assert by_name(machine.disk_findings(Path("/proc/runs"), measure=False))["disk writes"].state == FAIL


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = measured.compile_findings()
    assert found.state == WARN and "no C++ compiler" in found.said


def test_bf16_is_measured_beside_what_fit_takes() -> None:
    (found,) = measured.bf16_findings()
    assert ("bf16-mixed" if bf16_pays() else "32-true") in found.said and "TFLOP/s in bfloat16" in found.said


def test_extras_are_there_or_come_with_the_line_that_gets_them() -> None:
    for found in installed.extra_findings():
        assert found.said.startswith("there") or "pip install 'ldm[" in found.mend


@pytest.mark.slow
def test_two_processes_meet_and_a_wrong_interface_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = measured.rendezvous_findings()
    assert "met over gloo" in found.said
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchinterface")
    (found,) = measured.rendezvous_findings()
    assert found.state == FAIL and "GLOO_SOCKET_IFNAME" in found.mend


def test_the_command_shows_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--quick", "--out", str(tmp_path), "--json", str(tmp_path / "findings.json"))
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    names = [finding["name"] for finding in findings]
    assert {"versions", "imports", "memory", "cores", "disk", "text encoder minilm", "extra s3", "gloo"} <= set(names)
    assert FAIL not in [finding["state"] for finding in findings]
    shown = capsys.readouterr().out
    assert all(name.split()[0] in shown for name in names)
    assert all(finding["mend"] for finding in findings if finding["state"] != OK)


def test_what_fails_is_named_in_one_line_and_the_exit_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LdmError, match="disk writes") as failed:
        run("--quick", "--out", "/proc/runs")
    assert failed.value.exit_code == 1 and os.linesep not in str(failed.value)
    assert "fail" in capsys.readouterr().out
