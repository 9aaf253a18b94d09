"""Averages in the host's memory, of a network on a pretended GPU."""

from __future__ import annotations

from typing import Any

from tests.gpu.launch import needs_pretended_gpu, on_pretended_gpu

pytestmark = needs_pretended_gpu


def averages(counts: Any) -> dict[str, Any]:
    """The waits of updates, whether offloaded averages are those on the device, and where they are."""
    import torch
    from torch import nn

    from ldm.training.ema import Average, PowerAverages

    torch.manual_seed(0)
    network, layer = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    network.append(layer)
    both = [Average(network, 0.9, PowerAverages([0.1]), offload) for offload in (False, True)]
    device = torch.device("cuda", 0)
    network.to(device)
    for average in both:
        average.to(device)
    before = counts.copy()
    for _ in range(12):
        with torch.no_grad():
            layer.weight.mul_(1.5)
        for average in both:
            average.update()
    waits = dict(counts.since(before).waits)
    on_device, offloaded = ([shadow for each in average.all() for shadow in each.shadow_params] for average in both)
    same = all(torch.equal(shadow.cpu(), other) for shadow, other in zip(on_device, offloaded, strict=True))
    before = counts.copy()
    both[1].state_dict()
    with both[1].applied():
        applied = torch.equal(layer.weight.cpu(), both[1].exponential.shadow_params[4])
    return {
        "waits": waits,
        "same": same,
        "devices": [sorted({shadow.device.type for shadow in shadows}) for shadows in (on_device, offloaded)],
        "pinned": all(shadow.is_pinned() for shadow in offloaded),
        "waits before the host reads": sum("synchronize" in why for why in counts.since(before).waits),
        "applied": applied,
    }


def test_offloaded_averages_are_those_on_the_device_and_no_update_waits() -> None:
    assert on_pretended_gpu(averages) == {
        "waits": {},
        "same": True,
        "devices": [["cuda"], ["cpu"]],
        "pinned": True,
        "waits before the host reads": 1,
        "applied": True,
    }
