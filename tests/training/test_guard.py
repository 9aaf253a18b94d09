"""The guard: when it lowers, holds and raises the adversarial weight, and which values it must cope with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldm.errors import UsageError
from ldm.training.adversarial import LOWEST_LEVEL, ReconstructionGuard

GOOD, BAD = (25.0, 0.20), (24.0, 0.20)  # PSNR and LPIPS: the best values, and a dB below


def with_best(**settings: Any) -> ReconstructionGuard:
    """A guard that has seen the good values before the adversarial loss began."""
    guard = ReconstructionGuard(**settings)
    assert guard.update(*GOOD, active=False) is None
    return guard


def update(guard: ReconstructionGuard, psnr: float, lpips: float) -> str:
    """Update while the adversarial loss is active; returns the message, one line or none."""
    message = guard.update(psnr, lpips, active=True) or ""
    assert "\n" not in message
    return message


def lowered(times: int = 1, **settings: Any) -> ReconstructionGuard:
    guard = with_best(**settings)
    for _ in range(times):
        guard.update(*BAD, active=True)
    return guard


@pytest.mark.parametrize(
    "psnr, lpips, level, named",
    [
        (25.0, 0.20, 1.0, ()),
        (24.71, 0.2099, 1.0, ()),  # both just within the limits
        (24.69, 0.20, 0.5, ("PSNR 24.69 dB (best: 25.00)",)),
        (25.0, 0.2101, 0.5, ("LPIPS 0.2101 (best: 0.2000)",)),
        (20.0, 0.30, 0.5, ("PSNR", "LPIPS")),  # both are still one lowering
        (20.0, 0.10, 0.5, ("PSNR",)),
    ],
)
def test_it_lowers_the_level_when_a_value_is_worse_by_more_than_the_limit(
    psnr: float, lpips: float, level: float, named: tuple[str, ...]
) -> None:
    guard = with_best(max_psnr_loss=0.3, max_lpips_rise=0.05)
    message = update(guard, psnr, lpips)
    assert guard.level == level
    assert bool(message) == ("0.5" in message) == bool(named) and all(name in message for name in named)


def test_before_the_adversarial_loss_begins_only_the_best_values_change() -> None:
    guard = ReconstructionGuard()
    for psnr, lpips in ((20.0, 0.5), (26.0, 0.3), (18.0, 0.2)):
        assert guard.update(psnr, lpips, active=False) is None
    assert guard.level == 1 and guard.best_psnr == 26 and guard.best_lpips == pytest.approx(0.2)
    assert guard.update(25.0, 0.2, active=True) is not None


def test_values_are_compared_to_the_best_so_far_and_not_to_the_last() -> None:
    guard = with_best()
    guard.update(26.0, 0.15, active=True)
    guard.update(*BAD, active=True)
    assert guard.best_psnr == 26 and guard.best_lpips == pytest.approx(0.15)
    assert guard.update(25.5, 0.15, active=True) is not None and guard.level == 0.25


def test_the_first_values_are_never_worse() -> None:
    guard = ReconstructionGuard()
    assert guard.update(5.0, 2.0, active=True) is None and guard.level == 1


def test_it_raises_the_level_by_steps_up_to_1_and_is_silent_there() -> None:
    guard, levels, messages = lowered(2, lower=0.5, higher=1.5), [], []
    for _ in range(5):
        messages.append(update(guard, *GOOD))
        levels.append(guard.level.item())
    assert levels == pytest.approx([0.375, 0.5625, 0.84375, 1.0, 1.0])
    assert all("raised" in message for message in messages[:4]) and not messages[4]


def test_it_holds_the_level_while_the_discriminator_is_too_accurate() -> None:
    guard = lowered(max_accuracy=0.9)
    guard.watch_discriminator(torch.tensor(1.0), decay=0.0)
    for _ in range(3):
        message = update(guard, *GOOD)
        assert guard.level == 0.5 and "100%" in message and "held at 0.5" in message
    guard.watch_discriminator(torch.tensor(0.8), decay=0.0)
    guard.update(*GOOD, active=True)
    assert guard.level == 0.625


def test_an_accurate_discriminator_alone_lowers_nothing_and_prevents_no_lowering() -> None:
    guard = with_best()
    guard.watch_discriminator(torch.tensor(1.0), decay=0.0)
    assert guard.update(*GOOD, active=True) is None and guard.level == 1
    guard.update(*BAD, active=True)
    assert guard.level == 0.5


def test_the_accuracy_is_a_moving_average_from_chance() -> None:
    guard = ReconstructionGuard()
    for _ in range(10):
        guard.watch_discriminator(torch.tensor(1.0))
    assert guard.accuracy == pytest.approx(1 - 0.5 * 0.98**10)


@pytest.mark.parametrize(
    "psnr, lpips", [(math.nan, 0.2), (-math.inf, 0.2), (25.0, math.nan), (25.0, math.inf), (math.nan,) * 2]
)
def test_values_that_are_not_finite_are_worse_and_do_not_become_the_best(psnr: float, lpips: float) -> None:
    for guard in (ReconstructionGuard(), with_best()):
        before = guard.best_psnr.clone(), guard.best_lpips.clone()
        message = update(guard, psnr, lpips)
        assert guard.level == 0.5 and ("nan" in message or "inf" in message)
        guard.update(psnr, lpips, active=False)
        for best, now, value in zip(before, (guard.best_psnr, guard.best_lpips), (psnr, lpips), strict=True):
            assert now == (value if best.isinf() and math.isfinite(value) else best)
        assert "raised" in update(guard, *GOOD)


def test_an_infinite_psnr_is_neither_worse_nor_the_best() -> None:
    """A flat image can be reconstructed without any error; its PSNR is infinite, and so is its batch's."""
    guard = with_best()
    assert guard.update(math.inf, 0.2, active=True) is None
    assert guard.level == 1 and guard.best_psnr == 25
    assert guard.update(*GOOD, active=True) is None


def test_the_level_recovers_from_any_number_of_bad_validations() -> None:
    guard = lowered(200)  # 0.5 to this power is 0 in fp32
    assert guard.level == pytest.approx(LOWEST_LEVEL)
    for _ in range(40):
        guard.update(*GOOD, active=True)
    assert guard.level == 1


def test_its_state_is_in_checkpoints() -> None:
    guard, again = lowered(2), ReconstructionGuard()
    guard.watch_discriminator(torch.tensor(0.7))
    again.load_state_dict(guard.state_dict())
    for name in ("level", "best_psnr", "best_lpips", "accuracy"):
        assert getattr(again, name) == getattr(guard, name) != getattr(ReconstructionGuard(), name)
    assert again.update(*BAD, active=True) == guard.update(*BAD, active=True)
    assert again.level == guard.level == 0.125
    assert not list(guard.parameters())


def test_disabled_the_level_is_1_even_if_a_checkpoint_had_lowered_it() -> None:
    guard = with_best(enabled=False)
    assert guard.update(1.0, 9.0, active=True) is None and guard.level == 1
    guard.load_state_dict(lowered().state_dict())
    assert guard.level == 1 and guard.update(*BAD, active=True) is None and guard.level == 1


@pytest.mark.parametrize("settings", [{"lower": 0.0}, {"lower": 1.0}, {"higher": 1.0}, {"lower": -1.0}])
def test_factors_in_the_wrong_direction_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"the guard's lower .* higher"):
        ReconstructionGuard(**settings)
