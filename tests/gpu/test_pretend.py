"""What the pretended GPU does as CUDA does, and what it counts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.launch import needs_pretended_gpu, on_pretended_gpu

pytestmark = needs_pretended_gpu


def everything(counts: Any) -> list[str]:
    """Checks in one process, since it takes seconds to start; the waits of each in turn, and the last ones' lags."""
    import torch
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    found: list[str] = []

    def waits(of: Any) -> None:
        before = counts.copy()
        of()
        found.append(" ".join(why.partition(" at ")[0] for why in counts.since(before).waits.elements()))

    x, host = torch.ones(3, 4, device="cuda"), torch.ones(3, 4)
    pinned = host.pin_memory()
    assert pinned[1:].is_pinned() and not host.is_pinned()

    waits(lambda: x @ x.T + 1 - torch.tensor(2.0))
    waits(lambda: float(x.sum()))
    waits(lambda: x.cpu())
    waits(lambda: host.to("cuda"))
    waits(lambda: host.to("cuda", non_blocking=True))
    waits(lambda: pinned.to("cuda", non_blocking=True))
    waits(lambda: pinned.copy_(x, non_blocking=True))
    waits(lambda: torch.tensor([1.0], device="cuda"))
    waits(lambda: x[x > 0])
    waits(lambda: x.masked_fill(x > 0, 0.0))
    waits(lambda: x[torch.tensor([0, 1])])
    waits(lambda: torch.cuda.synchronize())

    for wrong in (lambda: x + host, lambda: torch.cat([x, host]), lambda: x.normal_(generator=torch.Generator())):
        with pytest.raises(RuntimeError, match="host"):
            wrong()

    layer = nn.Linear(4, 4)
    weight, before = layer.weight, layer.weight.tolist()
    assert layer.to("cuda").weight is weight and weight.is_cuda and weight.tolist() == before
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    optimiser = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(x).sum().backward()
    optimiser.step()
    assert weight.tolist() != before

    q, k, v = torch.randn(3, 2, 4, 16, 8, device="cuda").unbind()
    mask = torch.arange(16, device="cuda") < torch.tensor([9, 16], device="cuda")[:, None]
    kernels = []
    for dtype in (torch.float32, torch.bfloat16):
        before, leaf = counts.copy(), q.detach().to(dtype).requires_grad_()
        scaled_dot_product_attention(leaf, k.to(dtype), v.to(dtype), mask[:, None, None]).square().sum().backward()
        kernels.append(next(name for name in counts.since(before).launches if name.startswith("_scaled_dot")))
        host_leaf = q.detach().cpu().requires_grad_()
        scaled_dot_product_attention(host_leaf, k.cpu(), v.cpu(), mask[:, None, None].cpu()).square().sum().backward()
        assert leaf.grad is not None and host_leaf.grad is not None
        torch.testing.assert_close(
            leaf.grad.cpu().float(), host_leaf.grad, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0.1
        )

    event = torch.cuda.Event()
    event.record()
    x.mul_(2).mul_(3)
    waits(event.synchronize)
    x.double()
    return [*found, *kernels, str(counts.lags[-1][1]), str(sum(counts.doubles.values()))]


def test_it_does_what_cuda_does() -> None:
    to_host, to_device = "copy to the host, blocking,", "copy to the device, blocking,"
    assert on_pretended_gpu(everything) == [
        *("", "_local_scalar_dense", to_host, to_device, "copy to the device, not page-locked,", "", "", to_device),
        *("index", "", "index", "synchronize", ""),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "2", "1"),
    ]
