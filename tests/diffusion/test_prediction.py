import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion.path import RectifiedFlow, VariancePreserving
from ldm.diffusion.prediction import Epsilon, Sample, V, Velocity

PATHS = [
    RectifiedFlow(),
    VariancePreserving("linear"),
    VariancePreserving("scaled_linear"),
    VariancePreserving("squaredcos_cap_v2"),
]
PREDICTIONS = [Epsilon(), Sample(), V(), Velocity()]


def named(value):
    return getattr(value, "scheduler_config", {}).get("beta_schedule", type(value).__name__)


def data(count):
    return torch.randn(2, count, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
@pytest.mark.parametrize("path", PATHS, ids=named)
def test_endpoints_come_back_from_the_target(path, prediction):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    x0, eps = data(50)
    found = prediction.endpoints(path, path.sample(x0, eps, t), prediction.target(path, x0, eps, t), t)
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_endpoints_lie_on_the_path_whatever_the_network_says(path):
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    x_t, said = data(20)
    for prediction in PREDICTIONS:
        x0, eps = prediction.endpoints(path, x_t, said, t)
        torch.testing.assert_close(path.sample(x0, eps, t), x_t)
        torch.testing.assert_close(prediction.target(path, x0, eps, t), said)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_the_data_target_is_blind_at_data(path):
    x = torch.zeros(2, 4, 1, 1)
    with pytest.raises(ValueError, match="Sample does not determine x0 and eps at t = 0 "):
        Sample().endpoints(path, x, x, torch.tensor([0.5, 0.0]))


def test_the_noise_target_is_blind_at_noise():
    x = torch.zeros(2, 4, 1, 1)
    with pytest.raises(ValueError, match="Epsilon does not determine x0 and eps at t = 1 "):
        Epsilon().endpoints(RectifiedFlow(), x, x, torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("path, prediction", [(RectifiedFlow(), Velocity()), *((path, V()) for path in PATHS)], ids=named)
def test_v_and_the_flow_velocity_are_never_blind(path, prediction):
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x0, eps = data(2)
    found = prediction.endpoints(path, path.sample(x0, eps, t), prediction.target(path, x0, eps, t), t)
    torch.testing.assert_close(found.x0, x0)
    torch.testing.assert_close(found.eps, eps)


def test_targets_by_name():
    t = torch.rand(8, dtype=torch.float64)
    x0, eps = data(8)
    assert torch.equal(Epsilon().target(PATHS[1], x0, eps, t), eps)
    assert torch.equal(Sample().target(PATHS[1], x0, eps, t), x0)
    assert torch.equal(Velocity().target(RectifiedFlow(), x0, eps, t), eps - x0)


@pytest.mark.parametrize("path", PATHS[1:], ids=named)
def test_v_is_the_velocity_of_diffusers(path):
    scheduler = DDPMScheduler(**path.scheduler_config)
    steps = torch.arange(0, 1000, 9)
    x0, eps = data(len(steps))
    ours = V().target(path, x0, eps, (steps + 1).double() / 1000)
    torch.testing.assert_close(ours, scheduler.get_velocity(x0, eps, steps), rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_velocity_is_the_derivative_of_the_path(path):
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64) + 0.00035
    x0, eps = data(20)
    _, derivative = torch.func.jvp(lambda t: path.sample(x0, eps, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(Velocity().target(path, x0, eps, t), derivative)
