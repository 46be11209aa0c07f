"""The samplers, compared with diffusers' schedulers, and with perfect predictions."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import get_type_hints

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.schedulers import scheduling_ddpm, scheduling_dpmsolver_multistep
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests import tiny
from tests.profile import examples
from tests.tiny import run_sampler
from transfusion import config
from transfusion.config import DiffusionConfig
from transfusion.diffusion import add_noise, alpha_sigma, noise_from_x0, target, to_x0_and_noise
from transfusion.inference import samplers
from transfusion.inference.image_mode import LatentImageState, update_latents
from transfusion.inference.samplers import SamplingSchedule, Update, get_sampler

torch.set_num_threads(1)  # small tensors: a second thread would be slower

few = examples(12, quick=6)
some = examples(15, quick=8)

SHAPE = (1, 3, 2, 2)
STEP_COUNTS = (1, 2, 4, 5, 10, 50, 250, 1000)  # steps; they divide 1000, because diffusers' timesteps are integers
THEIR_NAMES = {"epsilon": "epsilon", "velocity": "v_prediction", "x0": "sample"}
RECTIFIED_FLOW = [("rectified_flow", name) for name in ("ddpm", "ddim", "dpm", "dpm-sde", "euler", "heun")]
SAMPLERS = [("cosine", name) for name in ("ddpm", "ddim", "dpm", "dpm-sde")] + RECTIFIED_FLOW
STOCHASTIC = ("ddpm", "dpm-sde")

prediction_types = st.sampled_from(("epsilon", "velocity", "x0"))
step_counts = st.sampled_from(STEP_COUNTS)
seeds = st.integers(0, 2**32 - 1)
bounds = st.none() | st.just(1.0)


@dataclass(frozen=True)
class Schedule(SamplingSchedule):
    """A schedule, the range of x0 and the seed of the noise."""

    latent_range: tuple[Tensor, Tensor] | None = None
    seed: int = 0


def make_schedule(
    steps: int, diffusion: DiffusionConfig, bound: float | None = None, seed: int = 0, dtype=torch.float64
) -> Schedule:
    """A schedule with the bound (-bound, bound) for every channel."""
    sides = None if bound is None else tuple(torch.full((3, 1, 1), s * bound, dtype=dtype) for s in (-1, 1))
    return Schedule(steps, diffusion, sides, seed)


def start_sampler(name: str, x_t: Tensor, schedule: Schedule) -> LatentImageState:
    return tiny.start_sampler(name, x_t, schedule, schedule.latent_range, schedule.seed)


def count_calls(name: str, steps: int) -> int:
    """Model calls of a sampler."""
    return 2 * steps - 1 if name == "heun" else steps


def random(seed: int, number: int, dtype=torch.float64) -> Tensor:
    """Noise tensor `number` of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((number + 1, *SHAPE), generator=generator, dtype=dtype)[number]


def in_double(scheduler) -> None:
    """Recompute a scheduler's table in float64: in float32 its last alpha-bar has a relative error of 5e-5."""
    steps = torch.arange(1001, dtype=torch.float64) / 1000
    cosine = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - cosine[1:] / cosine[:-1]).clamp(max=0.999)
    exact = (1 - betas).cumprod(0)
    torch.testing.assert_close(exact.float(), scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
    scheduler.alphas_cumprod = exact


def scheduler_of(kind, steps: int, prediction: str, bound: float | None, **more):
    """diffusers' scheduler with the noise schedule and timesteps of the paper (section 4.1)."""
    scheduler = kind(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=bound is not None,
        prediction_type=THEIR_NAMES[prediction], clip_sample_range=bound or 1.0, **more,
    )  # fmt: skip
    in_double(scheduler)
    scheduler.set_timesteps(steps)
    return scheduler


def their_trajectory(scheduler, x_t: Tensor, predictions: list[Tensor], seed: int = 0) -> list[Tensor]:
    """x_t before the first step and after each step of diffusers' loop with these predictions.

    It uses our random numbers: float32 noise from one generator.
    """
    generator, trajectory = torch.Generator().manual_seed(seed), [x_t]

    def randn_tensor(shape, **_):
        return torch.randn(shape, generator=generator).double()

    with pytest.MonkeyPatch.context() as patch:
        for module in (scheduling_ddpm, scheduling_dpmsolver_multistep):
            patch.setattr(module, "randn_tensor", randn_tensor)
        for t, prediction in zip(scheduler.timesteps, predictions, strict=True):
            trajectory.append(scheduler.step(prediction, t, trajectory[-1]).prev_sample)
    return trajectory


def our_trajectory(
    name: str, schedule: Schedule, x_t: Tensor, predictions: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same of our sampler, and the t (1,) of each model call."""
    sampler = start_sampler(name, x_t, schedule)
    answers = iter(predictions)
    image, yielded = run_sampler(sampler, lambda *_: next(answers))
    return [*(x_t for x_t, _ in yielded), image], [t for _, t in yielded]


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Relative to the largest absolute value: without clipping, an error at t = 1 is multiplied by 20,000."""
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


# Compared with diffusers


@some
@given(step_counts, prediction_types, bounds, seeds)
def test_ddpm_equals_diffusers(steps, prediction, bound, seed):
    assume(bound is not None or prediction != "epsilon")  # see the test below
    diffusion = DiffusionConfig(prediction=prediction)
    predictions = [random(seed, 2 + n % 8) for n in range(steps)]
    answers = iter(predictions)
    sampler = start_sampler("ddpm", random(seed, 0), make_schedule(steps, diffusion, bound, seed))
    ours, yielded = run_sampler(sampler, lambda x_t, t: next(answers))
    scheduler = scheduler_of(DDPMScheduler, steps, prediction, bound, variance_type="fixed_small")
    assert [round(1000 * t.item()) - 1 for _, t in yielded] == scheduler.timesteps.tolist()
    assert_near(ours, their_trajectory(scheduler, random(seed, 0), predictions, seed)[-1], 1e-5)


@some
@given(step_counts, prediction_types, bounds, seeds)
def test_ddim_equals_diffusers(steps, prediction, bound, seed):
    assume(bound is not None or prediction != "epsilon")
    diffusion = DiffusionConfig(prediction=prediction)
    predictions = [random(seed, 2 + n % 8) for n in range(steps)]
    answers = iter(predictions)
    sampler = start_sampler("ddim", random(seed, 0), make_schedule(steps, diffusion, bound))
    ours, yielded = run_sampler(sampler, lambda x_t, t: next(answers))
    scheduler = scheduler_of(DDIMScheduler, steps, prediction, bound)
    assert [round(1000 * t.item()) - 1 for _, t in yielded] == scheduler.timesteps.tolist()
    theirs = random(seed, 0)
    for t, prediction in zip(scheduler.timesteps, predictions, strict=True):
        theirs = scheduler.step(prediction, t, theirs, eta=0.0, use_clipped_model_output=True).prev_sample
    assert_near(ours, theirs, 1e-5)


@few
@given(step_counts, st.sampled_from(("ddpm", "ddim")), seeds)
def test_unclipped_epsilon_predictions_equal_diffusers(steps, name, seed):
    """Only here diffusers' alpha-bar at t = 1, 2.4288e-9, matters: predictions are divided by its root."""
    diffusion = DiffusionConfig()
    predictions = [random(seed, 2 + n % 8) for n in range(steps)]
    answers = iter(predictions)
    sampler = start_sampler(name, random(seed, 0), make_schedule(steps, diffusion, None, seed))
    ours, _ = run_sampler(sampler, lambda *_: next(answers))
    theirs = random(seed, 0)
    if name == "ddpm":
        scheduler = scheduler_of(DDPMScheduler, steps, "epsilon", None, variance_type="fixed_small")
        theirs = their_trajectory(scheduler, theirs, predictions, seed)[-1]
    else:
        scheduler = scheduler_of(DDIMScheduler, steps, "epsilon", None)
        for t, prediction in zip(scheduler.timesteps, predictions, strict=True):
            theirs = scheduler.step(prediction, t, theirs).prev_sample
    assert_near(ours, theirs)


@some
@given(st.integers(1, 60), st.sampled_from((1.0, 0.5, 3.0)), seeds)
def test_euler_equals_diffusers(steps, shift, seed):
    diffusion = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity", t_shift=shift)
    predictions = [random(seed, 2 + n % 8, torch.float32) for n in range(steps)]
    answers = iter(predictions)
    start = random(seed, 0, torch.float32)
    sampler = start_sampler("euler", start, make_schedule(steps, diffusion))
    ours, yielded = run_sampler(sampler, lambda *_: next(answers))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - n / steps for n in range(steps)])
    torch.testing.assert_close(torch.cat([t for _, t in yielded]), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    theirs = start
    for t, prediction in zip(scheduler.timesteps, predictions, strict=True):
        theirs = scheduler.step(prediction, t, theirs).prev_sample
    assert_near(ours, theirs)


@pytest.mark.parametrize(("name", "theirs"), [("dpm", "dpmsolver++"), ("dpm-sde", "sde-dpmsolver++")])
@some
@given(step_counts, prediction_types, bounds, seeds)
def test_dpm_equals_diffusers(name, theirs, steps, prediction, bound, seed):
    """After every step, not only at the end: the last step is first-order and returns the last x0."""
    diffusion = DiffusionConfig(prediction=prediction)
    predictions = [random(seed, 2 + n % 8) for n in range(steps)]
    ours, times = our_trajectory(name, make_schedule(steps, diffusion, bound, seed), random(seed, 0), predictions)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type=THEIR_NAMES[prediction],
        algorithm_type=theirs, solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
        thresholding=bound is not None, sample_max_value=bound or 1.0,  # at 1, dynamic thresholding is plain clipping
    )  # fmt: skip
    in_double(scheduler)
    scheduler.set_timesteps(steps)
    assert [round(1000 * t.item()) - 1 for t in times] == scheduler.timesteps.tolist()
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]  # (steps,)
    exact = torch.cat([(1 / alpha_bar - 1).sqrt(), torch.zeros(1)])  # (steps + 1,)
    torch.testing.assert_close(exact.float(), scheduler.sigmas, rtol=1e-5, atol=1e-6)
    scheduler.sigmas = exact
    for actual, expected in zip(ours, their_trajectory(scheduler, random(seed, 0), predictions, seed), strict=True):
        assert_near(actual, expected, 3e-5)  # diffusers rounds to float32 in each of up to 1,000 steps


class DiffusersSchedule(Schedule):
    """The times of diffusers' flow matching, which begin at 0.999: at 1, lambda would be -inf."""

    @cached_property
    def times(self) -> list[float]:
        times = 0.999 * torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)  # (steps + 1,)
        shift = self.diffusion.t_shift
        return (shift * times / (1 + (shift - 1) * times)).tolist()


@some
@given(st.integers(1, 60), st.sampled_from((1.0, 0.5, 3.0)), st.booleans(), bounds, seeds)
def test_dpm_with_rectified_flow_equals_diffusers(steps, shift, starts_at_0_999, bound, seed):
    """With diffusers' times, and with ours, which begin at t = 1: alpha is 0, and the first step in lambda is infinite."""
    diffusion = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity", t_shift=shift)
    predictions = [random(seed, 2 + n % 8) for n in range(steps)]
    schedule = make_schedule(steps, diffusion, bound)
    if starts_at_0_999:
        schedule = DiffusersSchedule(steps, diffusion, schedule.latent_range)
    ours, times = our_trajectory("dpm", schedule, random(seed, 0), predictions)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", solver_order=2,
        thresholding=bound is not None, sample_max_value=bound or 1.0,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    if starts_at_0_999:
        torch.testing.assert_close(torch.cat(times).float(), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    scheduler.sigmas = torch.tensor(schedule.times, dtype=torch.float64)
    for actual, expected in zip(ours, their_trajectory(scheduler, random(seed, 0), predictions), strict=True):
        assert_near(actual, expected, 1e-5)


@some
@given(st.integers(1, 60), st.sampled_from((1.0, 0.5, 3.0)), seeds)
def test_heun_equals_diffusers(steps, shift, seed):
    """With our times: diffusers' last time is always 0.001, and its times are shifted twice."""
    diffusion = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity", t_shift=shift)
    predictions = [random(seed, 2 + n % 8, torch.float32) for n in range(count_calls("heun", steps))]
    start = random(seed, 0, torch.float32)
    ours, times = our_trajectory("heun", make_schedule(steps, diffusion), start, predictions)
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    assert len(scheduler.timesteps) == len(times)
    first, *others = torch.tensor(make_schedule(steps, diffusion).times)
    scheduler.sigmas = torch.stack([first, *(t for t in others[:-1] for _ in range(2)), others[-1]])
    torch.testing.assert_close(torch.cat(times), scheduler.sigmas[:-1], rtol=0, atol=0)
    for actual, expected in zip(ours, their_trajectory(scheduler, start, predictions), strict=True):
        assert_near(actual, expected, 1e-5)


# With perfect predictions


@pytest.mark.parametrize(("noise_schedule", "name"), SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(st.integers(2, 40), prediction_types, st.booleans(), st.sampled_from((1.0, 2.0)), seeds)
def test_perfect_predictions_give_x0(noise_schedule, name, dtype, steps, prediction, clipped, shift, seed):
    """The predictor has the true x0 and computes the noise from x_t."""
    diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction=prediction, t_shift=shift)
    x0 = random(seed, 1, dtype).clamp(-2, 2)

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return target(x0, noise_from_x0(x_t, x0, t, diffusion), t, diffusion)

    schedule = make_schedule(steps, diffusion, 2.0 if clipped else None, seed, dtype)
    image, yielded = run_sampler(start_sampler(name, random(seed, 0, dtype), schedule), predict)
    assert len(yielded) == count_calls(name, steps)
    assert image.dtype == dtype
    # At t = 1 float32's own error is multiplied by 20,000, but only that of t = 1 / steps is left at the end.
    torch.testing.assert_close(image, x0, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-4)


@few
@given(st.integers(1, 40), prediction_types, seeds)
def test_deterministic_samplers_pass_through_the_forward_process(steps, prediction, seed):
    """With perfect predictions, every x_t is alpha x0 + sigma noise."""
    for noise_schedule, name in SAMPLERS:
        if name in STOCHASTIC or (noise_schedule, prediction) == ("rectified_flow", "epsilon"):
            continue  # at t = 1 of rectified flow, epsilon does not determine x0
        diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction=prediction)
        x0, noise = random(seed, 1), random(seed, 0)
        start = add_noise(x0, noise, torch.ones(1, dtype=torch.float64), diffusion)
        _, yielded = run_sampler(
            start_sampler(name, start, make_schedule(steps, diffusion)),
            lambda x_t, t, x0=x0, noise=noise, diffusion=diffusion: target(x0, noise, t, diffusion),
        )
        for x_t, t in yielded:
            torch.testing.assert_close(x_t, add_noise(x0, noise, t, diffusion), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", STOCHASTIC)
@few
@given(st.integers(5, 60), seeds)
def test_stochastic_samplers_keep_the_noise_level_of_the_schedule(name, steps, seed):
    """With a known x0, (x_t - alpha x0) / sigma is standard normal at every step."""
    for noise_schedule in ("cosine", "rectified_flow"):
        diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction="x0")
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(1, 1, 100, 100, generator=generator)
        x0 = torch.full_like(start, 0.5)
        sampler = start_sampler(name, start, make_schedule(steps, diffusion, None, seed))
        _, yielded = run_sampler(sampler, lambda *_, x0=x0: x0)
        for x_t, t in yielded:
            noise = noise_from_x0(x_t, x0, t, diffusion)
            assert abs(noise.mean()) < 0.06  # 10,000 values: six standard deviations of their mean
            assert abs(noise.std() - 1) < 0.05


# With a known data distribution


def posterior_mean(x_t: Tensor, t: Tensor, noise_schedule: str) -> Tensor:
    """E[x0 | x_t] when each value of x0 comes from a mixture of three normal distributions."""
    centres = torch.tensor([-1.2, 0.3, 1.0], dtype=torch.float64)  # (3,)
    std, weights = 0.3, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)  # (3,)
    alpha, sigma = alpha_sigma(t, noise_schedule)
    variance = (alpha * std) ** 2 + sigma**2
    offset = x_t[..., None] - alpha * centres  # (1, C, Y, X, 3)
    responsibilities = (weights.log() - offset**2 / (2 * variance)).softmax(-1)  # (1, C, Y, X, 3)
    return (responsibilities * (centres + alpha * std**2 / variance * offset)).sum(-1)


def sample_known(name: str, noise_schedule: str, steps: int, start: Tensor) -> Tensor:
    """The image that a sampler makes of this noise for this data distribution."""
    diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction="x0")
    sampler = start_sampler(name, start, make_schedule(steps, diffusion))
    return run_sampler(sampler, lambda x_t, t: posterior_mean(x_t, t, noise_schedule))[0]


@pytest.mark.parametrize(("noise_schedule", "name", "steps", "first_order", "ratio"), [
    ("cosine", "dpm", 20, "ddim", 3), ("rectified_flow", "dpm", 20, "ddim", 3), ("rectified_flow", "heun", 10, "euler", 3),
])  # fmt: skip
def test_second_order_samplers_are_more_accurate_with_as_many_model_calls(noise_schedule, name, steps, first_order, ratio):
    """The reference is ddim with 1,000 steps. Both samplers use 20 model calls (heun 19)."""
    start = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = sample_known("ddim", noise_schedule, 1000, start)
    error = (sample_known(name, noise_schedule, steps, start) - end).abs().mean()
    first_order_error = (sample_known(first_order, noise_schedule, 20, start) - end).abs().mean()
    assert error * ratio < first_order_error


# The schedule


def test_250_steps_equal_the_papers():
    times = make_schedule(250, DiffusionConfig()).times
    assert [1000 * t for t in times] == pytest.approx(range(1000, -1, -4), rel=0, abs=1e-9)


@some
@given(st.integers(1, 1000), st.floats(0.1, 10))
def test_times_decrease_from_1_to_0(steps, shift):
    times = make_schedule(steps, DiffusionConfig(noise_schedule="rectified_flow", t_shift=shift)).times
    assert (len(times), times[0], times[-1]) == (steps + 1, 1, 0)
    assert all(t > next_t for t, next_t in pairwise(times))


@pytest.mark.parametrize(("noise_schedule", "name"), SAMPLERS)
def test_every_shift_can_be_sampled(noise_schedule, name):
    noise = random(0, 0)
    for shift in (0.001, *torch.logspace(-2, 2, 81, dtype=torch.float64).tolist(), 1000.0):
        diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction="velocity", t_shift=shift)
        x0, yielded = run_sampler(start_sampler(name, noise, make_schedule(5, diffusion, 1.0)), lambda x_t, t: 0 * x_t)
        assert x0.isfinite().all()
        assert all(0 <= float(t) <= 1 for _, t in yielded)


@pytest.mark.parametrize(("noise_schedule", "name"), SAMPLERS)
@few
@given(st.integers(1, 20), prediction_types, st.floats(0.1, 3), seeds)
def test_clipping_keeps_x0_inside_the_bound(noise_schedule, name, steps, prediction, bound, seed):
    """For each channel and any prediction; the last step returns the last x0."""
    diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction=prediction)
    low = -bound * torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64).view(3, 1, 1)
    high = bound * torch.tensor([0.2, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    image = start_sampler(name, random(seed, 0), Schedule(steps, diffusion, (low, high), seed))
    predictions = iter(10 * random(seed, 1 + n % 8) for n in range(count_calls(name, steps)))
    estimates = []

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        prediction = next(predictions)
        estimates.append((image.x0, to_x0_and_noise(x_t, prediction, t, diffusion).x0[0].clamp(low, high)))
        return prediction

    end, _ = run_sampler(image, predict)
    for (_, expected), (x0, _) in zip(estimates, [*estimates[1:], (image.x0, None)], strict=True):
        assert ((low <= x0) & (x0 <= high)).all()
        assert torch.equal(x0, expected)
    torch.testing.assert_close(end[0], image.x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("noise_schedule", "name"), SAMPLERS)
@few
@given(st.integers(1, 20))
def test_steps_are_counted_not_model_calls(noise_schedule, name, steps):
    diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction="velocity")
    image, steps_at_calls = start_sampler(name, random(0, 0), make_schedule(steps, diffusion)), []

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        steps_at_calls.append(image.step)
        return 0 * x_t

    run_sampler(image, predict)
    calls_per_step = 2 if name == "heun" else 1
    assert steps_at_calls == [n for n in range(steps) for _ in range(calls_per_step)][: count_calls(name, steps)]
    assert image.step == steps


@pytest.mark.parametrize(("second", "first"), [("dpm", "ddim"), ("dpm-sde", "ddpm")])
@few
@given(st.sampled_from(("cosine", "rectified_flow")), st.integers(1, 3), seeds)
def test_dpm_steps_without_history_are_first_order(second, first, noise_schedule, steps, seed):
    """In the first and last step, and after the infinite first step of rectified flow."""
    assume(noise_schedule == "rectified_flow" or steps < 3)
    diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction="velocity")
    predictions = [random(seed, n) for n in range(1, steps + 1)]
    ours, theirs = (
        our_trajectory(name, make_schedule(steps, diffusion, 1.0), random(seed, 0), predictions)[0]
        for name in (second, first)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise_schedule", ["cosine", "rectified_flow"])
def test_dpm_supports_steps_of_length_0(noise_schedule):
    """With so large a shift, the cosine alpha is at its minimum for several times."""
    diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction="velocity", t_shift=1000.0)
    schedule = make_schedule(100, diffusion, 1.0)
    alphas = [alpha for alpha, _ in schedule.alphas_sigmas]
    assert noise_schedule == "rectified_flow" or alphas[0] == alphas[1]
    image, yielded = run_sampler(start_sampler("dpm", random(0, 0), schedule), lambda x_t, t: random(0, 1))
    assert all(x_t.isfinite().all() and x_t.abs().max() < 10 for x_t, _ in yielded)
    assert image.abs().max() <= 1


@few
@given(st.integers(1, 20), seeds)
def test_wide_bound_changes_nothing(steps, seed):
    for noise_schedule, name in SAMPLERS:
        diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction="velocity")
        images = []
        for bound in (None, 1e6):
            predictions = iter(random(seed, 1 + n % 8) for n in range(count_calls(name, steps)))
            sampler = start_sampler(name, random(seed, 0), make_schedule(steps, diffusion, bound, seed))
            images.append(run_sampler(sampler, lambda *_, predictions=predictions: next(predictions))[0])
        torch.testing.assert_close(*images, rtol=0, atol=1e-9)


@few
@given(st.integers(2, 20), seeds, seeds)
def test_only_stochastic_samplers_depend_on_the_seed(steps, seed, other_seed):
    assume(seed != other_seed)
    for noise_schedule, name in SAMPLERS:
        diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction="velocity")
        schedules = [make_schedule(steps, diffusion, 1.0, s) for s in (seed, seed, other_seed)]
        images = [run_sampler(start_sampler(name, random(0, 0), s), lambda x_t, t: 0 * x_t)[0] for s in schedules]
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2]) == (name not in STOCHASTIC)


def test_unknown_and_unsupported_samplers_are_refused():
    with pytest.raises(ValueError, match="no sampler 'magic'.*ddpm, ddim, dpm, dpm-sde"):
        get_sampler("magic", DiffusionConfig().noise_schedule)
    for name in ("euler", "heun"):
        with pytest.raises(ValueError, match=f"{name} does not support the cosine noise schedule; use ddpm"):
            get_sampler(name, DiffusionConfig().noise_schedule)
    for noise_schedule, name in SAMPLERS:
        assert callable(get_sampler(name, DiffusionConfig(noise_schedule=noise_schedule).noise_schedule))


def test_table_of_samplers_and_functions_are_the_same():
    functions = {
        name.replace("_", "-") for name, function in vars(samplers).items()
        if inspect.isfunction(function) and get_type_hints(function).get("return") == Iterator[Update]
    }  # fmt: skip
    assert functions == set(config.SAMPLERS)
    for name, noise_schedules in config.SAMPLERS.items():
        assert all(get_sampler(name, noise_schedule) for noise_schedule in noise_schedules)


# Several images at once


@some
@given(
    st.sampled_from(("cosine", "rectified_flow")), prediction_types,
    st.lists(st.tuples(st.sampled_from([name for _, name in RECTIFIED_FLOW]), st.integers(1, 8), bounds, seeds),
             min_size=2, max_size=5), st.integers(0, 3),
)  # fmt: skip
def test_images_with_any_samplers_at_any_steps_advance_together(noise_schedule, prediction, specs, head_start):
    """Each gets what it gets alone. The first has made some calls before the others begin; those that end leave."""
    diffusion = DiffusionConfig(noise_schedule=noise_schedule, prediction=prediction)
    specs = [spec for spec in specs if noise_schedule in config.SAMPLERS[spec[0]]]

    def start(number: int) -> LatentImageState:
        name, steps, bound, seed = specs[number]
        return start_sampler(name, random(seed, 0), make_schedule(steps, diffusion, bound, seed))

    def predict(number: int, call: int) -> Tensor:
        return random(number, call)

    together = [start(number) for number in range(len(specs))]
    for tick in range(30):
        active = [n for n, image in enumerate(together) if not image.is_finished and (n == 0 or tick >= head_start)]
        if active:
            images = [together[n] for n in active]
            x_t = torch.stack([image.x_t for image in images])
            t = x_t.new_tensor([image.update.t for image in images])
            predictions = torch.cat([predict(n, together[n].num_calls) for n in active])
            for image, latents in zip(images, update_latents(images, x_t, t, predictions), strict=True):
                image.advance(latents)
    for number, image in enumerate(together):
        calls = iter(range(100))
        expected, _ = run_sampler(start(number), lambda *_, number=number, calls=calls: predict(number, next(calls)))
        assert torch.equal(image.x_t, expected[0])
        assert image.step == specs[number][1]
