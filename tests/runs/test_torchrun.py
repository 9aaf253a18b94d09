"""When a command starts torchrun by itself, and what it leaves with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ldm.errors import UsageError
from ldm.runs.torchrun import ProcessFailed, processes_asked, run_under_torchrun

LAUNCHED = {"LOCAL_RANK": "0"}, {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}


def settings(devices: Any = "auto", accelerator: str = "auto", num_nodes: int = 1) -> SimpleNamespace:
    return SimpleNamespace(devices=devices, accelerator=accelerator, num_nodes=num_nodes)


def test_how_many_processes_a_config_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for devices, processes in ((1, 1), (2, 2), ("3", 3), ([0, 2], 2), ("0,", 1), ("1,3", 2), ("auto", 4), (-1, 4), ("-1", 4)):
        assert processes_asked(settings(devices)) == processes
    assert processes_asked(settings("auto", "cpu")) == 1


@pytest.mark.parametrize("environment", LAUNCHED, ids=["torchrun", "slurm"])
def test_under_a_launcher_nothing_is_launched(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "run", lambda options: pytest.fail("launched"))
    run_under_torchrun(["denoiser", "fit"], settings(2, num_nodes=2))


def test_one_process_is_this_one_and_several_machines_are_told_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run", lambda options: pytest.fail("launched"))
    run_under_torchrun(["denoiser", "fit"], settings(1))
    with pytest.raises(UsageError, match=r"torchrun --nnodes 2 --nproc-per-node 8 .* -m ldm denoiser fit --title 'a b'$"):
        run_under_torchrun(["denoiser", "fit", "--title", "a b"], settings(8, num_nodes=2))


@pytest.mark.parametrize(("ended", "status"), [(0, 0), (143, 143), (130, 130), (1, 1), (2, 2), (-9, 1)])
def test_it_leaves_with_the_status_of_the_first_process_that_failed(
    ended: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def launch(options: Any) -> None:
        asked.append((options.nproc_per_node, options.standalone, options.training_script, options.training_script_args))
        if ended:
            raise ChildFailedError("ldm", {1: ProcessFailure(1, 4711, ended, "")})

    monkeypatch.setattr(run, "run", launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises((SystemExit, ProcessFailed)) as raised:
        run_under_torchrun(["denoiser", "fit", "--out", "run"], settings(2))
    assert asked == [("2", True, "ldm", ["denoiser", "fit", "--out", "run"])]
    found = raised.value.exit_code if isinstance(raised.value, ProcessFailed) else raised.value.code
    assert found == status
