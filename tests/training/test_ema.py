"""Power-function averages against their closed forms, and reconstructed averages against those kept in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ldm.errors import UsageError
from ldm.runs.posthoc_ema import combine, find_snapshots, inner_product, reconstruct
from ldm.training.ema import LONGEST_SIGMA_REL, SNAPSHOTS, Average, PowerAverages, gamma_of


class Vector(nn.Module):
    """A network of one parameter."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def become(self, value: Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(value)


def shadow(average: Average, sigma_rel: float) -> Tensor:
    return average.power[sigma_rel].shadow_params[0]


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (LONGEST_SIGMA_REL, 0.0)])
def test_the_exponent_is_that_of_the_paper(sigma_rel: float, gamma: float) -> None:
    """The first two are printed in section 3.1."""
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2])
def test_the_weights_of_a_kept_average_are_the_integrals_of_its_profile(sigma_rel: float) -> None:
    """Step k of t counts (k^(gamma + 1) − (k − 1)^(gamma + 1)) / t^(gamma + 1); their spread over t is sigma_rel."""
    steps = 400
    network = Vector(steps)
    average = Average(network, 0.9, PowerAverages([sigma_rel]))
    for row in torch.eye(steps):
        network.become(row)
        average.update()
    weights = shadow(average, sigma_rel).double().numpy()
    expected = np.diff((np.arange(steps + 1) / steps) ** (gamma_of(sigma_rel) + 1))
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    middle = (np.arange(steps) + 0.5) / steps
    mean = weights @ middle
    assert np.sqrt(weights @ (middle - mean) ** 2) == pytest.approx(sigma_rel, rel=0.01)


def test_the_inner_product_is_the_integral() -> None:
    s = (np.arange(200_000) + 0.5) / 200_000 * 3
    for (first, gamma), (second, other) in [((3, 2.0), (3, 7.5)), ((1.5, 6.9), (3, 0.5)), ((3, 6.9), (2, 17.0))]:
        profiles = [np.where(s <= t, (g + 1) * s**g / t ** (g + 1), 0) for t, g in ((first, gamma), (second, other))]
        integral = (profiles[0] * profiles[1]).mean() * 3
        found = inner_product(np.array(first), np.array(gamma), np.array(second), np.array(other))
        assert found == pytest.approx(integral, rel=1e-3)


def test_a_stored_average_is_made_of_itself_alone() -> None:
    coefficients, error = combine([100, 100, 200, 200], [0.05, 0.1] * 2, 200, 0.1)
    np.testing.assert_allclose(coefficients, [0, 0, 0, 1], atol=1e-9)
    assert error < 1e-6


def test_the_more_was_stored_the_closer_it_comes() -> None:
    errors = []
    for spacing in (250, 125, 50):
        steps = np.arange(spacing, 1001, spacing).repeat(2)
        coefficients, error = combine(steps.tolist(), [0.05, 0.1] * (len(steps) // 2), 1000, 0.07)
        assert coefficients.sum() == pytest.approx(1)
        errors.append(error)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


def random_walk(run: Path, steps: int, every: int, kept: list[float], stored: list[float]) -> tuple[Average, Tensor]:
    """Weights on a random walk, averaged at the lengths ``kept``, with snapshots of the lengths ``stored``.

    Returns the averages and the last weights.
    """
    generator = torch.Generator().manual_seed(0)
    network = Vector(2000)
    average, keeper = (Average(network, 0.9, PowerAverages(lengths)) for lengths in (stored, kept))
    for step in range(1, steps + 1):
        network.become(network.weight + torch.randn(2000, generator=generator))
        average.update()
        keeper.update()
        if step % every == 0:
            average.write_snapshots(run / SNAPSHOTS)
    return keeper, network.weight.detach()


def test_any_length_comes_out_as_if_it_had_been_kept(tmp_path: Path) -> None:
    lengths = [0.03, 0.05, 0.075, 0.15, 0.2]
    kept, trained = random_walk(tmp_path, 1000, 50, lengths, [0.05, 0.1])
    snapshots = find_snapshots(tmp_path)
    assert len(snapshots) == 40
    for sigma_rel in lengths:
        direct = shadow(kept, sigma_rel)
        made = reconstruct(snapshots, sigma_rel)[0]["weight"]
        error = (made - direct).norm() / (direct - trained).norm()  # against how far averaging takes the weights
        assert error < 0.01


def test_an_average_of_an_earlier_step_can_be_made(tmp_path: Path) -> None:
    at_600, trained = random_walk(tmp_path / "short", 600, 50, [0.08], [0.05, 0.1])
    random_walk(tmp_path / "long", 1000, 50, [0.08], [0.05, 0.1])
    made = reconstruct(find_snapshots(tmp_path / "long"), 0.08, 600)[0]["weight"]
    direct = shadow(at_600, 0.08)
    assert (made - direct).norm() < 0.01 * (direct - trained).norm()
    with pytest.raises(UsageError, match="no average was stored at step 620; give one of 50, 100"):
        reconstruct(find_snapshots(tmp_path / "long"), 0.08, 620)


def test_a_snapshot_says_what_it_is(tmp_path: Path) -> None:
    random_walk(tmp_path, 3, 3, [0.1], [0.1])
    with safe_open(tmp_path / SNAPSHOTS / "step-00000003-sigma-0.1.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"step": "3", "sigma_rel": "0.1"}
        assert tensors.keys() == ["weight"]


def test_all_averages_resume_exactly_from_a_checkpoint(tmp_path: Path) -> None:
    values = torch.randn(60, 5).cumsum(0)
    network = Vector(5)
    whole, first = (Average(network, 0.9, PowerAverages([0.05, 0.1], selected=0.1)) for _ in range(2))
    for step, value in enumerate(values):
        network.become(value)
        whole.update()
        if step < 30:
            first.update()
    torch.save(first.state_dict(), tmp_path / "state.ckpt")
    resumed = Vector(5)
    second = Average(resumed, 0.9, PowerAverages([0.05, 0.1], selected=0.1))
    second.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    for value in values[30:]:
        resumed.become(value)
        second.update()
    assert second.step == whole.step == 60
    for ours, theirs in zip(second.all(), whole.all(), strict=True):
        assert torch.equal(ours.shadow_params[0], theirs.shadow_params[0])


def test_the_selected_average_is_applied() -> None:
    network = Vector(3)
    average = Average(network, 0.5, PowerAverages([0.05, 0.1], selected=0.05))
    values = torch.randn(20, 3)
    for value in values:
        network.become(value)
        average.update()
    assert average.trained() is None
    with average.applied():
        assert torch.equal(network.weight, shadow(average, 0.05))
        (trained,) = average.trained() or []
        assert torch.equal(trained, values[-1])
    assert torch.equal(network.weight, values[-1])


def test_averages_are_diffusers_own() -> None:
    """To the bit once the rate is below one half, after eight steps; until then up to rounding."""
    torch.manual_seed(0)
    network = nn.Linear(30, 40)
    network.bias.requires_grad_(False)
    average, theirs = Average(network, 0.999), EMAModel(network.parameters(), decay=0.999, foreach=True)
    for step in range(20):
        with torch.no_grad():
            network.weight.add_(torch.randn_like(network.weight))
        if step == 9:
            theirs.shadow_params = [shadow.clone() for shadow in average.exponential.shadow_params]
        average.update()
        theirs.step(network.parameters())
        for mine, other in zip(average.exponential.shadow_params, theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, other)
            assert step < 9 or torch.equal(mine, other)


def test_an_update_is_one_operation_of_each_average_and_copies_nothing() -> None:
    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))
    average = Average(network, 0.999, PowerAverages([0.05, 0.1]))
    before = [shadow.data_ptr() for each in average.all() for shadow in each.shadow_params]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        average.update()
    operations = [event.key for event in profiled.key_averages() for _ in range(event.count) if "_foreach" in event.key]
    assert operations == ["aten::_foreach_lerp_"] * 3
    assert not [event.key for event in profiled.key_averages() if "sub" in event.key or "empty" in event.key]
    assert before == [shadow.data_ptr() for each in average.all() for shadow in each.shadow_params]


def test_an_average_cannot_begin_in_the_middle() -> None:
    state = Average(Vector(3), 0.9, PowerAverages([0.05])).state_dict()
    with pytest.raises(UsageError, match=r"has 0\.1, but the checkpoint has averages of 0\.05"):
        Average(Vector(3), 0.9, PowerAverages([0.05, 0.1])).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sigma_rel": [0.3]}, "sigma_rel is 0.3; give one above 0 and up to 0.289"),
        ({"sigma_rel": [0.1, 0.1]}, "each once"),
        ({"sigma_rel": []}, "one or more"),
        ({"selected": 0.2}, "selected is 0.2; give one of sigma_rel"),
        ({"snapshot_every": 0}, "snapshot_every is 0"),
    ],
)
def test_settings_that_do_not_serve_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        PowerAverages(**settings)


def test_averages_of_sharded_weights_are_not_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.training.ema.is_sharded", lambda _: True)
    with pytest.raises(UsageError, match="cannot be offloaded; set offload_average to false"):
        Average(Vector(3), 0.9, offload=True)


def test_a_run_without_averages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no averages; train with model\.power_averages"):
        find_snapshots(tmp_path)
