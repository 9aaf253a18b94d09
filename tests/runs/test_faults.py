"""The messages of failed runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from ldm.errors import LdmError, UsageError, is_out_of_memory
from ldm.runs.faults import explain, explained
from ldm.runs.preemption import Interrupted, Preempted


class WithoutCheckpointing(LightningModule):
    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()


class WithCheckpointing(LightningModule):
    def __init__(self, gradient_checkpointing: bool = False) -> None:
        super().__init__()


def trainer(module: LightningModule | None = None, **options: Any) -> Trainer:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)
    trainer.strategy.connect(module or WithCheckpointing())
    return trainer


def of_the_cpu() -> BaseException:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


OUT_OF_MEMORY = (
    of_the_cpu(),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_names_the_settings_of_the_stage(error: BaseException) -> None:
    for module, settings in (
        (WithoutCheckpointing(), {"data.batch_size", "model.accumulate", "trainer.precision"}),
        (WithCheckpointing(), {"data.batch_size", "model.accumulate", "model.gradient_checkpointing", "trainer.precision"}),
    ):
        said = str(explain(error, trainer(module)))
        assert said.startswith("out of memory at step 0: ") and "\n" not in said
        assert set(re.findall(r"\b(?:data|model|trainer)\.\w+", said)) == settings


def test_a_setting_that_is_in_use_is_not_named() -> None:
    assert "trainer.precision" not in str(explain(MemoryError(), trainer(precision="bf16-mixed")))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4711"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv"),
        torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2000, remote process exited"),
        torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
    ],
    ids=["closed", "timeout", "nccl", "store"],
)
def test_a_lost_process_is_named(error: BaseException) -> None:
    said = str(explain(error, trainer()))
    assert "a process of this run has gone or does not answer" in said and "--resume latest" in said and str(error) in said


def test_a_lost_loader_process_too() -> None:
    said = str(explain(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), trainer()))
    assert "loader process was lost" in said and "data.workers" in said and "\n" not in said


@pytest.mark.parametrize("error", [ValueError("a defect"), RuntimeError("shapes differ"), OSError(28, "No space left")])
def test_anything_else_keeps_its_traceback(error: BaseException) -> None:
    assert explain(error, trainer()) is None and not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, explained(trainer()):
        raise error
    assert raised.value is error


def test_it_replaces_the_error_of_torch() -> None:
    with pytest.raises(LdmError, match="out of memory") as raised, explained(trainer()):
        raise MemoryError
    assert type(raised.value) is LdmError and isinstance(raised.value.__cause__, MemoryError)
    for error in (UsageError("fix it"), Preempted("saved"), Interrupted("saved"), SystemExit(143)):
        with pytest.raises(type(error)) as raised, explained(trainer()):
            raise error
        assert raised.value is error


def test_a_callback_of_lightning_that_does_not_fit_is_one_line() -> None:
    """As BatchSizeFinder, which calls the training's own code, and BackboneFinetuning, which fails in torch's."""
    module: dict[str, Any] = {"__name__": "lightning.pytorch.callbacks.finetuning", "fail": lambda: getattr(1, "backbone")}  # noqa: B009
    exec("def setup():\n    fail()", module)
    with pytest.raises(AttributeError) as failure:
        module["setup"]()
    refusal = explain(failure.value, trainer(WithoutCheckpointing()))
    assert isinstance(refusal, UsageError)
    assert "no attribute 'backbone' (AttributeError in lightning.pytorch.callbacks.finetuning, at step 0)" in str(refusal)
