"""Which device an accelerator stands for, on machines with one or another."""

from __future__ import annotations

import pytest
import torch

from ldm.machine import bf16_is_faster, device_type


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ((), {"auto": "cpu", "gpu": "cpu", "cuda": "cpu", "mps": "cpu", "cpu": "cpu"}),
        (("cuda",), {"auto": "cuda", "gpu": "cuda", "cuda": "cuda", "mps": "cpu", "cpu": "cpu"}),
        (("mps",), {"auto": "mps", "gpu": "mps", "cuda": "cpu", "mps": "mps", "cpu": "cpu"}),
    ],
)
def test_the_device_of_an_accelerator(has: tuple[str, ...], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in has)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in has)
    assert {accelerator: device_type(accelerator) for accelerator in expected} == expected


def test_precision_follows_the_device_and_not_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = bf16_is_faster("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert (bf16_is_faster("cuda"), bf16_is_faster("cpu"), bf16_is_faster("mps")) == (supported, on_cpu, False)
