"""How likely data are under a trained model: along the probability-flow ODE, and by variational bounds. All of it in nats.

The density is that of what sampling generates without guidance: noise of the path's end, led to the data by the ODE. A denoiser
is called as :class:`ldm.diffusion.sampler.Sampler` calls it: with input_scale(t)·x_t (B, …), network_time(t) (B,) and t (B,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from ldm.diffusion.path import NUM_TRAIN_TIMESTEPS, ProbabilityPath, VariancePreserving, expand
from ldm.diffusion.prediction import Prediction, Velocity
from ldm.diffusion.sampler import Denoiser
from ldm.errors import LdmError, UsageError, first_line

# torchdiffeq's solvers, and the evaluations of a step of those that take fixed ones
SOLVERS: dict[str, int | None] = {"dopri5": None, "rk4": 4, "midpoint": 2, "euler": 1}
MARGIN = 1e-3  # from an end of the path where the prediction determines nothing


class LogLikelihood(NamedTuple):
    """Of a batch of B.

    Attributes:
        nats: ln p(x0), (B,) float64.
        standard_error: of it, by its spread over the probes, (B,); NaN where there is one.
        evaluations: of the denoiser; each with a backward pass for every probe.
    """

    nats: Tensor
    standard_error: Tensor
    evaluations: int


def time_range(path: ProbabilityPath, prediction: Prediction) -> tuple[float, float]:
    """The times between which the ODE is solved: the whole path, less :data:`MARGIN` at an end where the prediction does not
    determine x0 and eps, and on a variance-preserving path from the first of its discrete steps on."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    first, last = prediction.determines(path, ends).tolist()
    start = 1 / NUM_TRAIN_TIMESTEPS if isinstance(path, VariancePreserving) else 0.0 if first else MARGIN
    return start, 1.0 if last else 1 - MARGIN


def rademacher(shape: Sequence[int], generators: Sequence[torch.Generator], probes: int) -> Tensor:
    """Random signs (probes, B, …) for data of a ``shape`` (B, …); those of a row by its own generator."""
    rows = [torch.randint(2, (probes, *shape[1:]), generator=generator) for generator in generators]
    return (2 * torch.stack(rows, 1) - 1).float()


def check_solver(solver: str, tolerance: float, steps: int) -> None:
    """Raise UsageError for settings of :class:`FlowLikelihood` that cannot be."""
    if solver not in SOLVERS:
        raise UsageError(f"no solver {solver!r}; choose one of: {', '.join(SOLVERS)}")
    if not 1e-9 <= tolerance <= 1:
        raise UsageError(f"the solver's tolerance is {tolerance:g}; give 1e-9 to 1")
    if not 1 <= steps <= 100_000:
        raise UsageError(f"the solver's steps are {steps}; give 1 to 100,000")


@dataclass(frozen=True)
class FlowLikelihood:
    """ln p(x0) = ln p(x_1) + ∫ div v dt, v the velocity of the probability-flow ODE (Chen et al. 2018, arXiv 1806.07366; Song
    et al. 2021, arXiv 2011.13456, section 4.3), div v estimated by ξᵀ(∂v/∂x)ξ (Hutchinson; FFJORD, arXiv 1810.01367).

    x0 is taken for the mean of x_t at the ``start``: ln p(x0) = D·ln alpha + ln p(alpha·x0) there. The density of x_1 is the
    normal one of mean 0 and variance alpha²·sigma_data² + sigma², from which sampling starts.

    Attributes:
        solver: one of :data:`SOLVERS`. The steps of dopri5 are those of the batch's most demanding row.
        tolerance: of dopri5, absolute and relative, a step: for each row the root mean square over x, and of the integral nats
            per dimension.
        steps: of the others, even in t, on a variance-preserving path in the angle of (alpha, sigma).
        start: time at which the data are; :func:`time_range` by default.
    """

    path: ProbabilityPath
    prediction: Prediction
    solver: str = "dopri5"
    tolerance: float = 1e-5
    steps: int = 50
    start: float | None = None

    def __post_init__(self) -> None:
        check_solver(self.solver, self.tolerance, self.steps)

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, x0: Tensor, probes: Tensor) -> LogLikelihood:
        """
        Args:
            x0: data (B, …); normalised latents.
            probes: ξ, (K, B, …) of mean 0 and covariance 1: :func:`rademacher`. Those of B·D columns of a Hadamard matrix make
                the divergence exact.

        Raises:
            LdmError: where the ODE cannot be solved; names the way out.
        """
        start, end = time_range(self.path, self.prediction)
        start = start if self.start is None else self.start
        dimensions, evaluations = x0[0].numel(), 0

        def slope(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal evaluations
            evaluations += 1
            x, (t, rate) = state[0], self._clock(u.expand(len(x0)))
            # v = p·x + q·y of the prediction y, as in Sampler
            velocity, determinant = Velocity(), self.prediction.determinant(self.path, t)
            (c, d), (c_v, d_v) = (each.coefficients(self.path, t) for each in (self.prediction, velocity))
            p, q = (c_v * d - d_v * c) / determinant, velocity.determinant(self.path, t) / determinant
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = denoiser(expand(self.path.input_scale(t), x) * x, self.path.network_time(t), t).to(x.dtype)
                pulled = [torch.autograd.grad(y, x, probe, retain_graph=True)[0] for probe in probes]
            traces = torch.stack([_inner(*pair) for pair in zip(pulled, probes, strict=True)], 1)  # (B, K)
            p, q = p * rate, q * rate
            return expand(p, x) * x.detach() + expand(q, x) * y.detach(), p[:, None] + q[:, None] * traces / dimensions

        fixed = SOLVERS[self.solver] is not None
        ends = torch.tensor([start, end], dtype=torch.float64)
        if isinstance(self.path, VariancePreserving):
            ends = torch.atan2(self.path.sigma(ends), self.path.alpha(ends))
        ends = ends.to(x0.device)
        # torchdiffeq would try a first step of any length, and step over the end and interpolate: beyond it is no path
        bounded = {"first_step": (ends[1] - ends[0]) / 100, "step_t": ends[1:]}
        options = {"grid_constructor": self._grid} if fixed else {"norm": _worst_row, **bounded}
        state = self._alpha(start) * x0, x0.new_zeros(len(x0), len(probes))
        probes = probes.to(x0)
        try:
            x, integral = odeint(
                slope, state, ends, rtol=self.tolerance, atol=self.tolerance, method=self.solver, options=options
            )
        except AssertionError as error:  # as torchdiffeq has it for steps of no length, and for values that are not finite
            raise LdmError(
                f"{self.solver} cannot solve the probability-flow ODE ({first_line(error)[:80]}); give a larger tolerance, or "
                "a solver of fixed steps"
            ) from None
        nats = integral[-1].double() * dimensions  # (B, K)
        if not nats.isfinite().all():
            raise LdmError("the likelihood is not finite; give more steps, or dopri5")
        known = dimensions * math.log(self._alpha(start)) + self._prior(x[-1], end)
        error = nats.std(1) / math.sqrt(len(probes)) if len(probes) > 1 else torch.full_like(known, math.nan)
        return LogLikelihood(known + nats.mean(1), error, evaluations)

    def _grid(self, slope: object, state: object, times: Tensor) -> Tensor:
        return torch.linspace(float(times[0]), float(times[-1]), self.steps + 1, dtype=times.dtype, device=times.device)

    def _clock(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The time t at which the ODE's variable is u, and dt/du, (B,) each.

        On a variance-preserving path u is the angle of (alpha, sigma): in it the velocity is smooth, while the discrete steps
        of the schedule make it jump in t. Else it is t.
        """
        if not isinstance(self.path, VariancePreserving):
            return u, torch.ones_like(u)
        t = self.path.time(u.sin().log() - u.cos().clamp(min=1e-12).log())
        return t, 1 / torch.hypot(*self.path.derivatives(t))

    def _alpha(self, t: float) -> float:
        return float(self.path.alpha(torch.tensor([t], dtype=torch.float64)))

    def _prior(self, x: Tensor, t: float) -> Tensor:
        """ln p(x_1), (B,)."""
        at = torch.tensor([t], dtype=torch.float64)
        deviation = torch.hypot(self.path.alpha(at) * self.path.sigma_data, self.path.sigma(at)).to(x.device)
        return torch.distributions.Normal(0.0, deviation).log_prob(x.double()).flatten(1).sum(1)


def squared_error(
    path: ProbabilityPath, prediction: Prediction, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor
) -> Tensor:
    """‖x̂0 − x0‖² of data x0 (B, …) with noise ``eps`` at times t (B,), (B,) float64."""
    x_t = path.sample(x0, eps, t)
    y = denoiser(expand(path.input_scale(t), x_t) * x_t, path.network_time(t), t).to(x0.dtype)
    return (prediction.endpoints(path, x_t, y, t).x0 - x0).double().flatten(1).square().sum(1)


@torch.no_grad()
def ddpm_bound(
    path: VariancePreserving,
    prediction: Prediction,
    denoiser: Denoiser,
    x0: Tensor,
    generators: Sequence[torch.Generator],
    steps: int | None = None,
) -> Tensor:
    """A lower bound of ln p(x0) for the 1000 discrete steps (Ho et al. 2020, arXiv 2006.11239, eq. 5), (B,) float64:

    −KL(q(x_T | x0) ‖ N(0, 1)) − Σ_t KL(q(x_{t−1} | x_t, x0) ‖ p(x_{t−1} | x_t)) + ln p(x0 | x_1), one draw of each expectation.

    p has the posterior's variance, and at the first step beta_1; then each KL is ½(SNR(t−1) − SNR(t))·‖x̂0 − x0‖² (Kingma et
    al. 2021, arXiv 2107.00630, appendix E).

    Args:
        generators: of each row.
        steps: the sum over t is estimated from so many of its terms, without bias, in which each is drawn in proportion to what
            it would be for a denoiser that knows nothing but the variance of the data; None: all of them.
    """
    k = torch.arange(NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
    alpha, sigma = path.alpha(k), path.sigma(k)
    rows = range(len(x0))

    def error(t: Tensor) -> Tensor:
        eps = torch.stack([torch.randn(x0.shape[1:], generator=generator) for generator in generators]).to(x0)
        return squared_error(path, prediction, denoiser, x0, eps, t.to(x0)).cpu()

    x = x0.double().cpu().flatten(1)
    variance = float(sigma[-1] ** 2)
    bound = -0.5 * ((alpha[-1] * x).square() + variance - 1 - math.log(variance)).sum(1)
    first = float(sigma[1] ** 2)  # beta_1
    bound -= error(k[1].expand(len(x))) / (2 * first) + x.shape[1] / 2 * math.log(2 * math.pi * first)
    snr = (alpha[1:] / sigma[1:]).square()
    weights = (snr[:-1] - snr[1:]) / 2  # of t = 2 … T
    expected = weights / (1 + snr[1:])
    ends = expected.cumsum(0) / expected.sum()
    count = len(weights) if steps is None else min(steps, len(weights))
    for number in range(count):
        if steps is None:
            chosen, share = torch.full((len(x),), number), torch.ones(len(x), dtype=torch.float64)
        else:  # one of each of ``count`` equal parts of the sum
            drawn = torch.stack([torch.rand((), generator=generators[row], dtype=torch.float64) for row in rows])
            chosen = torch.searchsorted(ends, (number + drawn) / count).clamp(max=len(weights) - 1)
            share = count * expected[chosen] / expected.sum()
        bound -= weights[chosen] * error(k[chosen + 2]) / share
    return bound


def evidence_levels(path: ProbabilityPath, prediction: Prediction, count: int, low: float, high: float) -> tuple[Tensor, float]:
    """The times of ``count`` levels of ln SNR from ``high`` down to ``low``, as far as the path has them: the middles of as
    many equal parts, (count,) float64. And the width of a part."""
    start, end = time_range(path, prediction)
    at = torch.tensor([end, start], dtype=torch.float64)
    least, most = (2 * (path.alpha(at) / path.sigma(at)).log()).tolist()
    low, high = max(low, least), min(high, most)
    width = (high - low) / count
    levels = high - (torch.arange(count, dtype=torch.float64) + 0.5) * width
    return path.time(-levels / 2), width


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each row (B, …), (B,)."""
    return (a * b).flatten(1).sum(1)


def _worst_row(state: tuple[Tensor, Tensor]) -> Tensor:
    """The largest root mean square of a row of x and of the integral, (): whatever else is in the batch, a row keeps within the
    tolerance."""
    return torch.stack([part.flatten(1).square().mean(1).sqrt().max() for part in state]).max()
