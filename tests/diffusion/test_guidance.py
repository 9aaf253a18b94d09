from typing import Any, cast

import diffusers.guiders as guiders
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from jsonargparse import ArgumentParser
from torch import nn

from ldm.diffusion.conditioning import Condition, concatenate, denoise
from ldm.diffusion.guidance import (
    AdaptiveProjected,
    ClassifierFree,
    Conversion,
    Guidance,
    GuidedDenoiser,
    Interval,
    Rescale,
    ZeroStar,
)
from ldm.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving, expand
from ldm.diffusion.prediction import X0, Epsilon, Preconditioned, V, Velocity
from ldm.errors import UsageError

UNUSED: Any = None  # the timestep that diffusers' guiders take and do not read
RULES = [
    ClassifierFree(4.0),
    ZeroStar(4.0),
    AdaptiveProjected(4.0),
    Rescale(ClassifierFree(4.0)),
    Interval(ClassifierFree(4.0), low=0.2, high=0.7),
]
NEUTRAL = [
    ClassifierFree(1.0),
    ZeroStar(1.0),
    AdaptiveProjected(1.0),
    Rescale(ClassifierFree(1.0)),
    Interval(ClassifierFree(1.0), 0, 1),
    Interval(ClassifierFree(4.0), low=0.9, high=1.0),  # t is 0.5
]


def name(rule):
    return repr(rule)


def condition(batch, length, value=None):
    embeddings = torch.randn(batch, length, 16) if value is None else torch.full((batch, length, 16), value)
    return Condition(embeddings, torch.ones(batch, length, dtype=torch.int64))


@pytest.fixture
def inputs():
    """x_t, timestep, t."""
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.full((3,), 500.0), torch.full((3,), 0.5)


@pytest.fixture
def captions():
    torch.manual_seed(2)
    return condition(3, 5), condition(3, 2)  # captions and the null condition, of different lengths


@pytest.fixture
def predictions():
    """conditional, null, x_t, t: correlated, as two predictions of one network are."""
    torch.manual_seed(3)
    null = torch.randn(3, 4, 8, 8)
    return 0.8 * null + torch.randn(3, 4, 8, 8), null, torch.randn(3, 4, 8, 8), torch.full((3,), 0.5)


@torch.no_grad()
def guided(denoiser, captions, inputs, rule, **settings):
    (condition, null), (x_t, timestep, t) = captions, inputs
    return GuidedDenoiser(denoiser, condition, null, rule, **settings)(x_t, timestep, t)


def dot(first, second):
    return (first * second).flatten(1).sum(1)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Gaussian(nn.Module):
    """The exact velocity of rectified flow for data ~ N(mean, spread²), with the mean given by the captions' embeddings."""

    def __init__(self, spread=0.5):
        super().__init__()
        self.spread, self.batches = spread, []

    def forward(self, hidden_states, encoder_hidden_states, timestep, encoder_attention_mask, return_dict):
        self.batches.append(len(hidden_states))
        t, mean = timestep[:, None, None, None] / 1000, encoder_hidden_states[:, 0, 0][:, None, None, None]
        gain = (1 - t) * self.spread**2 / ((1 - t) ** 2 * self.spread**2 + t**2)
        x0 = mean + gain * (hidden_states - (1 - t) * mean)
        return ((hidden_states - x0) / t,)


def run(denoise_at, num_steps=8, batch=2):
    """A run of the flow Euler sampler; returns the latents."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    x = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in cast(torch.Tensor, scheduler.timesteps).unbind():
        times = timestep.expand(batch)
        step: Any = scheduler.step  # typed for FloatTensor
        x = step(denoise_at(x, times, times / 1000), timestep, x, return_dict=False)[0]
    return x


# The wrapper


@pytest.mark.parametrize("rule", NEUTRAL, ids=name)
def test_a_neutral_rule_is_the_plain_conditional_prediction_bit_for_bit_and_needs_no_null(tiny_dit, inputs, captions, rule):
    batches = []
    tiny_dit.register_forward_pre_hook(lambda *call: batches.append(len(call[2]["hidden_states"])), with_kwargs=True)
    found = guided(tiny_dit, captions, inputs, rule, conversion=Conversion(RectifiedFlow(), Velocity()))
    with torch.no_grad():
        assert torch.equal(found, denoise(tiny_dit, inputs[0], inputs[1], captions[0]))
    assert batches == [3, 3]


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_rule_gets_both_predictions_from_one_call(tiny_dit, inputs, captions, rule):
    with torch.no_grad():
        conditional, null = (denoise(tiny_dit, inputs[0], inputs[1], which) for which in captions)
    expected = rule.combiner()(conditional, null, inputs[0], inputs[2])
    batches = []
    tiny_dit.register_forward_pre_hook(lambda *call: batches.append(len(call[2]["hidden_states"])), with_kwargs=True)
    same(guided(tiny_dit, captions, inputs, rule), expected)
    assert batches == [6]


@pytest.mark.parametrize("rule", [*RULES, Rescale(AdaptiveProjected(6.0, parallel=0.3, norm_threshold=2.0))], ids=name)
def test_an_image_does_not_depend_on_its_batch_and_a_run_starts_without_state(predictions, rule):
    conditional, null, x_t, t = predictions
    conversion = Conversion(RectifiedFlow(), Velocity())
    together = rule.combiner(conversion)
    steps = [(conditional, null), (null, conditional), (conditional - null, null)]
    batch = [together(*step, x_t, t) for step in steps]
    for row in range(3):
        alone = rule.combiner(conversion)
        for step, expected in zip(steps, batch, strict=True):
            found = alone(*(prediction[row : row + 1] for prediction in step), x_t[row : row + 1], t[row : row + 1])
            torch.testing.assert_close(found, expected[row : row + 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(rule.combiner(conversion)(conditional, null, x_t, t), batch[0])


def test_predictions_are_combined_in_float32(inputs, captions):
    class Half(Gaussian):
        def forward(self, *arguments, **call):
            return (super().forward(*arguments, **call)[0].bfloat16(),)

    found = guided(Half(), captions, inputs, ClassifierFree(7.5))
    with torch.no_grad():
        conditional, null = (denoise(Half(), inputs[0], inputs[1], which).float() for which in captions)
    assert found.dtype == torch.float32
    same(found, null + 7.5 * (conditional - null))


# Classifier-free


def test_guiding_between_gaussians_gives_the_extrapolated_gaussian():
    # the velocity is linear in the mean, so null + w·(cond − null) is exactly that of the mean m0 + w·(m1 − m0)
    wanted, away, w = 0.7, -0.1, 3.0
    rule = GuidedDenoiser(Gaussian(), condition(2, 1, wanted), condition(2, 1, away), ClassifierFree(w))
    further = GuidedDenoiser(Gaussian(), condition(2, 1, away + w * (wanted - away)), condition(2, 1, 0.0), ClassifierFree(1.0))
    torch.testing.assert_close(run(rule), run(further), rtol=1e-4, atol=1e-4)
    assert run(rule).mean().sub(away + w * (wanted - away)).abs() < 0.1


@pytest.mark.parametrize(
    "rule, guider",
    [
        *((ClassifierFree(w), guiders.ClassifierFreeGuidance(guidance_scale=w)) for w in (0.0, 2.0, 6.0)),
        (Rescale(ClassifierFree(6.0), 0.7), guiders.ClassifierFreeGuidance(guidance_scale=6.0, guidance_rescale=0.7)),
        (ClassifierFree(2.5), guiders.AutoGuidance(guidance_scale=2.5, auto_guidance_layers=0, dropout=1.0)),
    ],
)
def test_a_rule_is_that_of_diffusers(predictions, rule, guider):
    guider.set_state(0, 10, UNUSED)
    same(rule.combiner()(*predictions), guider.forward(*predictions[:2]).pred)


# Interval


def test_outside_the_interval_only_the_conditional_prediction_is_computed():
    denoiser = Gaussian()
    rule = Interval(ClassifierFree(3.0), low=0.25, high=0.75)
    run(GuidedDenoiser(denoiser, condition(2, 1, 1.0), condition(2, 1, 0.0), rule))
    # t = 1, 7/8, 6/8, …, 1/8, nearly (the scheduler's own grid ends at 1/1000)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    assert denoiser.batches == [4 if 250 < timestep <= 750 else 2 for timestep in cast(torch.Tensor, scheduler.timesteps)]
    assert 0 < denoiser.batches.count(4) < 8


@pytest.mark.parametrize("rule", [ClassifierFree(3.0), ZeroStar(3.0), AdaptiveProjected(3.0), Rescale(ClassifierFree(3.0))])
def test_one_condition_is_computed_once_with_the_result_of_twice(inputs, rule):
    same_rows = condition(3, 5)
    once, twice = Gaussian(), Gaussian()
    found = guided(once, (same_rows, same_rows), inputs, rule)
    same(found, guided(twice, (same_rows, Condition(*same_rows)), inputs, rule))
    assert (once.batches, twice.batches) == ([3], [6])


def test_the_interval_is_open_below_and_closed_above_and_asks_its_inner_rule():
    rule = Rescale(Interval(ClassifierFree(3.0), low=0.25, high=0.75))
    guides = [rule.guides(torch.full((2,), t)) for t in (0.125, 0.25, 0.375, 0.75, 0.875)]
    assert guides == [False, False, True, True, False]
    assert not Interval(ClassifierFree(1.0), 0, 1).guides(torch.full((2,), 0.5))


def test_the_interval_guides_the_steps_that_diffusers_guides():
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0, start=0.25, stop=0.75)
    rule = Interval(ClassifierFree(3.0), low=0.25, high=0.75)
    for step in range(8):  # step i of diffusers is t = 1 − i/8
        guider.set_state(step, 8, UNUSED)
        assert rule.guides(torch.full((2,), 1 - step / 8)) == (guider.num_conditions == 2)


def test_an_empty_interval_is_refused():
    for low, high in ((0.8, 0.3), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(UsageError, match=r"Interval: low is .*; give 0 <= low < high <= 1"):
            Interval(ClassifierFree(3.0), low, high)


# Rescale


def test_full_rescaling_keeps_the_standard_deviation_of_the_conditional_prediction(predictions):
    conditional = predictions[0]
    rescaled = Rescale(ClassifierFree(6.0), amount=1.0).combiner()(*predictions)
    plain = ClassifierFree(6.0).combiner()(*predictions)
    assert (plain.flatten(1).std(1) > 2 * conditional.flatten(1).std(1)).all()
    same(rescaled.flatten(1).std(1), conditional.flatten(1).std(1))
    ratio = rescaled / plain  # one factor per image: the direction stays
    same(ratio, ratio[:, :1, :1, :1].expand_as(ratio))


def test_rescaling_interpolates_by_phi(predictions):
    at = {phi: Rescale(ClassifierFree(6.0), phi).combiner()(*predictions) for phi in (0.0, 0.7, 1.0)}
    assert torch.equal(at[0.0], ClassifierFree(6.0).combiner()(*predictions))
    same(at[0.7], 0.7 * at[1.0] + 0.3 * at[0.0])
    with pytest.raises(UsageError, match="Rescale: amount"):
        Rescale(ClassifierFree(6.0), 1.2)


@pytest.mark.parametrize("rule", [*RULES, Rescale(ZeroStar(4.0, zero_init_steps=1))], ids=name)
def test_predictions_of_zero_do_not_become_nan(predictions, rule):
    _, _, x_t, t = predictions
    zero = torch.zeros_like(x_t)
    assert torch.equal(rule.combiner()(zero, zero, x_t, t), zero)


# Zero-star


def test_zero_star_projects_the_null_prediction_by_least_squares(predictions):
    conditional, null, *_ = predictions
    projected = ZeroStar(0.0).combiner()(*predictions)  # w = 0 leaves s·null
    expected = []
    for row in range(3):
        fit = torch.linalg.lstsq(null[row].reshape(-1, 1), conditional[row].reshape(-1, 1)).solution
        expected.append(fit.item() * null[row])
    same(projected, torch.stack(expected))
    same(dot(conditional - projected, null), torch.zeros(3))  # the residual is orthogonal


@pytest.mark.parametrize("zero_init_steps", [0, 2])
def test_zero_star_is_that_of_diffusers(predictions, zero_init_steps):
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=zero_init_steps)
    combine = ZeroStar(5.0, zero_init_steps).combiner()
    for step in range(4):
        guider.set_state(step, 4, UNUSED)
        found = combine(*predictions)
        same(found, guider.forward(*predictions[:2]).pred)
        assert bool(found.any()) == (step >= zero_init_steps)


# APG


def test_projected_guidance_scales_the_parallel_part_as_stated(predictions):
    conditional, null, *_ = predictions
    length = dot(conditional, conditional)
    difference = (dot(conditional - null, conditional) / length)[:, None, None, None] * conditional
    for parallel in (0.0, 0.3, 1.0):
        rule = AdaptiveProjected(5.0, parallel=parallel, norm_threshold=0, momentum=0)
        update = (rule.combiner()(*predictions) - conditional) / 4
        along = (dot(update, conditional) / length)[:, None, None, None] * conditional
        same(along, parallel * difference)
        same(update - along, conditional - null - difference)


def test_projected_guidance_without_damping_is_classifier_free(predictions):
    rule = AdaptiveProjected(5.0, parallel=1.0, norm_threshold=0, momentum=0)
    conversion = Conversion(RectifiedFlow(), Velocity())
    expected = ClassifierFree(5.0).combiner()(*predictions)
    same(rule.combiner()(*predictions), expected)
    same(rule.combiner(conversion)(*predictions), expected)


def test_projected_guidance_bounds_the_update_of_each_image(predictions):
    conditional, null, *_ = predictions
    norms = (conditional - null).flatten(1).norm(dim=1)
    threshold = norms.median().item()  # one image is below it, one above
    rule = AdaptiveProjected(2.0, parallel=1.0, norm_threshold=threshold, momentum=0)
    same((rule.combiner()(*predictions) - conditional).flatten(1).norm(dim=1), norms.clamp(max=threshold))


def test_projected_guidance_remembers_the_run_by_its_momentum(predictions):
    conditional, null, *_ = predictions
    combine = AdaptiveProjected(2.0, parallel=1.0, norm_threshold=0, momentum=-0.5).combiner()
    updates = [combine(*predictions) - conditional for _ in range(3)]
    for update, weight in zip(updates, (1, 1 - 0.5, 1 - 0.5 + 0.25), strict=True):
        same(update, weight * (conditional - null))
    with pytest.raises(UsageError, match="AdaptiveProjected: momentum"):
        AdaptiveProjected(2.0, momentum=-1.0)


def test_projected_guidance_acts_on_x0_where_it_has_a_conversion(predictions):
    conditional, null, x_t, t = predictions
    rule, conversion = AdaptiveProjected(5.0, parallel=0.2, norm_threshold=9.0), Conversion(RectifiedFlow(), Velocity())
    found, conditional, null = (
        conversion.to_x0(x_t, y, t) for y in (rule.combiner(conversion)(*predictions), conditional, null)
    )
    same(found, rule.combiner()(conditional, null, x_t, t))


@pytest.mark.parametrize("settings", [{"parallel": 0.0}, {"parallel": 0.4, "norm_threshold": 0.0}, {"momentum": 0.3}], ids=str)
def test_projected_guidance_is_that_of_diffusers(predictions, settings):
    rule = AdaptiveProjected(5.0, **settings)
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=rule.scale - 1,
        adaptive_projected_guidance_momentum=rule.momentum,
        adaptive_projected_guidance_rescale=rule.norm_threshold,
        eta=rule.parallel,
        use_original_formulation=True,  # conditional + w'·update
    )
    conditional, null, *rest = predictions
    combine = rule.combiner()
    for step in range(3):
        guider.set_state(step, 3, UNUSED)
        guider.prepare_inputs({"prediction": (conditional, null)})  # makes the momentum at step 0
        same(combine(conditional, null, *rest), guider.forward(conditional, null).pred)
        conditional, null = 0.5 * conditional + null, 0.9 * null


@pytest.mark.parametrize(
    ("path", "prediction"),
    [
        (RectifiedFlow(), Velocity()),
        (RectifiedFlow(), X0()),
        (VariancePreserving(), V()),
        (VariancePreserving(), Epsilon()),
        (VariancePreserving(zero_terminal_snr=True), Velocity()),
        (VarianceExploding(), Preconditioned()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_conversion_leads_to_x0_and_back(path, prediction):
    torch.manual_seed(4)
    x0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    network_input = expand(path.input_scale(t), x0) * path.sample(x0, eps, t)
    y, conversion = prediction.target(path, x0, eps, t), Conversion(path, prediction)
    torch.testing.assert_close(conversion.to_x0(network_input, y, t), x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(conversion.from_x0(network_input, x0, t), y, rtol=1e-3, atol=1e-3)


# Autoguidance


def test_autoguidance_extrapolates_from_the_weak_model_through_the_strong_one(inputs):
    # the weak model is a poorer fit of the data: its Gaussian is too wide
    strong, weak, caption = Gaussian(0.5), Gaussian(0.9), condition(3, 1, 0.4)
    found = guided(strong, (caption, caption), inputs, ClassifierFree(2.5), weak=weak)
    good, bad = (denoise(network, inputs[0], inputs[1], caption) for network in (strong, weak))
    same(found, bad + 2.5 * (good - bad))
    same(found - good, 1.5 * (good - bad))  # beyond the strong one, away from the weak one
    assert strong.batches == weak.batches == [3, 3]  # one call each, neither of them doubled


def test_the_weak_model_may_be_unconditional_and_is_not_called_outside_the_interval(inputs):
    strong, weak, caption, null = Gaussian(0.5), Gaussian(0.9), condition(3, 1, 0.4), condition(3, 1, 0.0)
    found = guided(strong, (caption, null), inputs, ClassifierFree(2.5), weak=weak)
    x_t, timestep, _ = inputs
    good, bad = denoise(strong, x_t, timestep, caption), denoise(weak, x_t, timestep, null)
    same(found, bad + 2.5 * (good - bad))
    outside = Interval(ClassifierFree(2.5), low=0.6, high=1.0)
    weak.batches.clear()
    assert torch.equal(guided(strong, (caption, null), inputs, outside, weak=weak), good) and not weak.batches


# Choice and conditions


def test_rules_are_chosen_in_yaml_and_nest():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--guidance", type=Guidance)
    text = """
    class_path: ldm.diffusion.guidance.Interval
    init_args:
      low: 0.3
      high: 0.8
      inner:
        class_path: ldm.diffusion.guidance.Rescale
        init_args:
          inner:
            class_path: ldm.diffusion.guidance.ClassifierFree
            init_args: {scale: 5.0}
    """
    chosen = parser.instantiate_classes(parser.parse_args(["--guidance", text]))["guidance"]
    assert chosen == Interval(Rescale(ClassifierFree(5.0)), low=0.3, high=0.8)


def test_conditions_are_padded_stacked_and_repeated(tiny_dit, inputs):
    short, long = condition(1, 2), condition(2, 5)
    both = concatenate(short, long)
    assert both.embeddings.shape == (3, 5, 16) and both.mask.tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1] * 5]
    assert torch.equal(both.embeddings[1:], long.embeddings) and torch.equal(both.embeddings[:1, :2], short.embeddings)
    repeated = long.repeat(3)
    assert torch.equal(repeated.embeddings, long.embeddings[[0, 0, 0, 1, 1, 1]]) and repeated.mask.shape == (6, 5)
    x_t, timestep = inputs[0][:1], inputs[1][:1]
    with torch.no_grad():
        torch.testing.assert_close(
            denoise(tiny_dit, x_t, timestep, short), denoise(tiny_dit, x_t, timestep, short.pad(9)), rtol=1e-5, atol=1e-5
        )
