"""The guard: when it lowers, holds and raises the discriminator's weight, and what it must survive."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.errors import UsageError
from ldm.training.adversarial import LOWEST_LEVEL, ReconstructionGuard

GOOD, BAD = (25.0, 0.20), (24.0, 0.20)  # PSNR and LPIPS, the mark and a dB below it


def marked(**settings: object) -> ReconstructionGuard:
    """A guard that has seen the good figures before the discriminator was heard."""
    guard = ReconstructionGuard(**settings)
    assert guard.update(*GOOD, active=False) is None
    return guard


def lowered(times: int = 1, **settings: object) -> ReconstructionGuard:
    guard = marked(**settings)
    for _ in range(times):
        guard.update(*BAD, active=True)
    return guard


@pytest.mark.parametrize(
    "psnr, lpips, level, named",
    [
        (25.0, 0.20, 1.0, ()),
        (24.71, 0.2099, 1.0, ()),  # both just within what is borne
        (24.69, 0.20, 0.5, ("PSNR 24.69 dB (best: 25.00)",)),
        (25.0, 0.2101, 0.5, ("LPIPS 0.2101 (best: 0.2000)",)),
        (20.0, 0.30, 0.5, ("PSNR", "LPIPS")),  # both are still one lowering
        (20.0, 0.10, 0.5, ("PSNR",)),
    ],
)
def test_it_lowers_the_level_where_figures_fall_short_by_more_than_agreed(
    psnr: float, lpips: float, level: float, named: tuple[str, ...]
) -> None:
    guard = marked(max_psnr_loss=0.3, max_lpips_rise=0.05)
    said = guard.update(psnr, lpips, active=True)
    assert guard.level == level
    assert said is None if not named else all(name in said for name in named)
    assert said is None or ("0.5" in said and "\n" not in said)


def test_before_it_is_heard_the_figures_only_set_the_mark() -> None:
    guard = ReconstructionGuard()
    for psnr, lpips in ((20.0, 0.5), (26.0, 0.3), (18.0, 0.2)):
        assert guard.update(psnr, lpips, active=False) is None
    assert guard.level == 1 and guard.best_psnr == 26 and guard.best_lpips == pytest.approx(0.2)
    assert guard.update(25.0, 0.2, active=True) is not None


def test_the_mark_is_the_best_so_far_and_not_the_last() -> None:
    guard = marked()
    guard.update(26.0, 0.15, active=True)
    guard.update(*BAD, active=True)
    assert guard.best_psnr == 26 and guard.best_lpips == pytest.approx(0.15)
    assert guard.update(25.5, 0.15, active=True) is not None and guard.level == 0.25


def test_the_first_figures_of_all_are_never_worse() -> None:
    guard = ReconstructionGuard()
    assert guard.update(5.0, 2.0, active=True) is None and guard.level == 1


def test_it_raises_the_level_by_steps_up_to_1_and_is_silent_there() -> None:
    guard, levels, said = lowered(2, lower=0.5, higher=1.5), [], []
    for _ in range(5):
        said.append(guard.update(*GOOD, active=True))
        levels.append(guard.level.item())
    assert levels == pytest.approx([0.375, 0.5625, 0.84375, 1.0, 1.0])
    assert all("raised" in line and "\n" not in line for line in said[:4]) and said[4] is None


def test_it_holds_the_level_while_the_discriminator_knows_too_much() -> None:
    guard = lowered(max_accuracy=0.9)
    guard.watch_discriminator(torch.tensor(1.0), decay=0.0)
    for _ in range(3):
        said = guard.update(*GOOD, active=True)
        assert guard.level == 0.5 and "100%" in said and "held at 0.5" in said and "\n" not in said
    guard.watch_discriminator(torch.tensor(0.8), decay=0.0)
    guard.update(*GOOD, active=True)
    assert guard.level == 0.625


def test_a_knowing_discriminator_alone_lowers_nothing_and_saves_nothing() -> None:
    guard = marked()
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
def test_figures_that_are_no_numbers_are_worse_and_leave_the_marks_alone(psnr: float, lpips: float) -> None:
    for guard in (ReconstructionGuard(), marked()):
        marks = guard.best_psnr.clone(), guard.best_lpips.clone()
        said = guard.update(psnr, lpips, active=True)
        assert guard.level == 0.5 and ("nan" in said or "inf" in said) and "\n" not in said
        guard.update(psnr, lpips, active=False)
        for mark, now, figure in zip(marks, (guard.best_psnr, guard.best_lpips), (psnr, lpips), strict=True):
            assert now == (figure if mark.isinf() and math.isfinite(figure) else mark)
        assert "raised" in guard.update(*GOOD, active=True)


def test_images_met_exactly_are_no_loss_and_no_mark() -> None:
    """A flat image can come back without any error; its PSNR is infinite, and that of a batch with it."""
    guard = marked()
    assert guard.update(math.inf, 0.2, active=True) is None
    assert guard.level == 1 and guard.best_psnr == 25
    assert guard.update(*GOOD, active=True) is None


def test_the_level_finds_its_way_back_from_any_number_of_bad_validations() -> None:
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


def test_switched_off_the_level_is_1_even_where_a_checkpoint_had_lowered_it() -> None:
    guard = marked(enabled=False)
    assert guard.update(1.0, 9.0, active=True) is None and guard.level == 1
    guard.load_state_dict(lowered().state_dict())
    assert guard.level == 1 and guard.update(*BAD, active=True) is None and guard.level == 1


@pytest.mark.parametrize("settings", [{"lower": 0.0}, {"lower": 1.0}, {"higher": 1.0}, {"lower": -1.0}])
def test_factors_that_go_the_wrong_way_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"the guard's lower .* higher"):
        ReconstructionGuard(**settings)
