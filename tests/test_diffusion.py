"""The forward process (promise 6): noise schedules, targets, inversion of perfect predictions, errors, sampling of t."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import many, some
from tests.lazy import Lazy
from transfusion import diffusion
from transfusion.config import DiffusionConfig

diffusers = Lazy("diffusers")

SCHEDULES = ("cosine", "rectified_flow")
PREDICTIONS = ("epsilon", "velocity", "x0")
# The t at which a prediction can be inverted: epsilon divides by alpha, x0 by sigma. At t = 1 alpha is 5e-5 (cosine) or 0
# (rectified flow); at t = 0 sigma is 0.
T_RANGES = {"epsilon": (0.0, 0.999), "velocity": (0.0, 1.0), "x0": (1e-3, 1.0)}


@st.composite
def configs(draw, predictions=PREDICTIONS):
    """A noise schedule, a prediction and a loss space that it supports."""
    prediction = draw(st.sampled_from(predictions))
    loss_space = draw(st.sampled_from(("prediction",) if prediction == "epsilon" else ("prediction", "velocity")))
    return DiffusionConfig(noise_schedule=draw(st.sampled_from(SCHEDULES)), prediction=prediction, loss_space=loss_space)


def latents(seed: int, N: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and noise (N, C, Y, X), float64."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, N, 3, 4, 2, generator=generator, dtype=torch.float64)
    return x0 * 1.5 + 0.3, noise


def t_values(low: float = 0.0, high: float = 1.0):
    """t of three images, often at the ends."""
    value = st.sampled_from((low, high)) | st.floats(low, high)
    return st.lists(value, min_size=3, max_size=3).map(lambda values: torch.tensor(values, dtype=torch.float64))


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


# Inversion


@many
@given(configs(), st.data(), st.integers(0, 2**31))
def test_perfect_prediction_gives_x0_and_noise(config, data, seed):
    t = data.draw(t_values(*T_RANGES[config.prediction]), label="t")
    x0, noise = latents(seed)
    x_t = diffusion.add_noise(x0, noise, t, config)
    prediction = diffusion.target(x0, noise, t, config)
    inverted = diffusion.to_x0_and_noise(x_t, prediction, t, config)
    torch.testing.assert_close(inverted.x0, x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverted.noise, noise, rtol=0, atol=1e-9)


@some
@given(configs(), st.data(), st.integers(0, 2**31))
def test_perfect_prediction_gives_x0_and_noise_in_float32(config, data, seed):
    """The precision of training and sampling. For t <= 0.99 an error is multiplied by at most 100."""
    low, high = T_RANGES[config.prediction]
    t = data.draw(t_values(max(low, 0.01), min(high, 0.99)), label="t").float()
    x0, noise = (x.float() for x in latents(seed))
    x_t = diffusion.add_noise(x0, noise, t, config)
    inverted = diffusion.to_x0_and_noise(x_t, diffusion.target(x0, noise, t, config), t, config)
    torch.testing.assert_close(inverted.x0, x0, rtol=0, atol=2e-4)
    torch.testing.assert_close(inverted.noise, noise, rtol=0, atol=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_and_noise_are_finite_at_both_ends(schedule, prediction):
    """Also where the inversion would divide by 0."""
    config = DiffusionConfig(noise_schedule=schedule, prediction=prediction)
    x0, noise = (x.float() for x in latents(0, N=2))
    t = torch.tensor([0.0, 1.0])
    x_t = diffusion.add_noise(x0, noise, t, config)
    inverted = diffusion.to_x0_and_noise(x_t, diffusion.target(x0, noise, t, config), t, config)
    assert inverted.x0.isfinite().all()
    assert inverted.noise.isfinite().all()
    torch.testing.assert_close(inverted.x0[0], x0[0])
    torch.testing.assert_close(inverted.noise[1], noise[1], rtol=0, atol=2e-4)


@some
@given(configs(), st.data(), st.integers(0, 2**31))
def test_x0_and_noise_of_any_prediction_give_x_t(config, data, seed):
    """Also for wrong predictions: add_noise of the returned x0 and noise gives x_t."""
    low, high = T_RANGES[config.prediction]
    t = data.draw(t_values(low, high), label="t")
    x_t, prediction = latents(seed)
    inverted = diffusion.to_x0_and_noise(x_t, prediction, t, config)
    again = diffusion.add_noise(inverted.x0, inverted.noise, t, config)
    torch.testing.assert_close(again, x_t, rtol=0, atol=1e-9)


# The schedules


def test_cosine_schedule_equals_diffusers_squaredcos():
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000  # diffusers' index k is our step k + 1
    alpha, sigma = diffusion.alpha_sigma(t, "cosine")
    torch.testing.assert_close(alpha**2, theirs.double(), rtol=2e-5, atol=5e-12)  # the last is 2.4e-9
    torch.testing.assert_close(sigma**2, 1 - theirs.double(), rtol=2e-5, atol=1e-7)


@some
@given(t_values(), st.sampled_from(SCHEDULES))
def test_schedules_go_from_x0_to_noise(t, schedule):
    alpha, sigma = diffusion.alpha_sigma(t, schedule)
    ends = diffusion.alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64), schedule)
    torch.testing.assert_close(torch.stack(ends), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-4)
    if schedule == "cosine":
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    else:
        torch.testing.assert_close(alpha + sigma, torch.ones_like(t))
    later = diffusion.alpha_sigma((t + 0.01).clamp(max=1), schedule)
    assert (later[0] <= alpha).all()
    assert (later[1] >= sigma).all()


def test_schedules_are_exact_for_float32_t():
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for schedule in SCHEDULES:
        single, double = diffusion.alpha_sigma(t, schedule), diffusion.alpha_sigma(t.double(), schedule)
        assert single[0].dtype == single[1].dtype == torch.float32
        torch.testing.assert_close(torch.stack(single).double(), torch.stack(double), rtol=1e-6, atol=1e-7)


# Targets


@some
@given(t_values(), st.integers(0, 2**31), st.sampled_from(SCHEDULES))
def test_add_noise_is_alpha_x0_plus_sigma_noise(t, seed, schedule):
    x0, noise = latents(seed)
    alpha, sigma = (column(x) for x in diffusion.alpha_sigma(t, schedule))
    x_t = diffusion.add_noise(x0, noise, t, DiffusionConfig(noise_schedule=schedule))
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)


@some
@given(st.data(), st.integers(0, 2**31))
def test_targets_match_their_definitions(data, seed):
    t = data.draw(t_values(), label="t")
    x0, noise = latents(seed)
    for schedule in SCHEDULES:
        configs_ = [DiffusionConfig(noise_schedule=schedule, prediction=prediction) for prediction in PREDICTIONS]
        targets = {config.prediction: diffusion.target(x0, noise, t, config) for config in configs_}
        assert torch.equal(targets["epsilon"], noise)
        assert torch.equal(targets["x0"], x0)
        if schedule == "rectified_flow":
            torch.testing.assert_close(targets["velocity"], noise - x0)
        else:
            alpha, sigma = (column(x) for x in diffusion.alpha_sigma(t, schedule))
            torch.testing.assert_close(targets["velocity"], alpha * noise - sigma * x0)


def test_rectified_flow_velocity_is_the_derivative_by_t():
    x0, noise = latents(0)
    config = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity")
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    x_after, x_before = (diffusion.add_noise(x0, noise, t + d, config) for d in (1e-4, -1e-4))
    torch.testing.assert_close(diffusion.target(x0, noise, t, config), (x_after - x_before) / 2e-4)


def test_cosine_velocity_is_the_derivative_by_the_angle():
    x0, noise = latents(0)
    config = DiffusionConfig(noise_schedule="cosine", prediction="velocity")
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    ends = [(diffusion.add_noise(x0, noise, t + d, config), angle(t + d)) for d in (1e-4, -1e-4)]
    (x_after, angle_after), (x_before, angle_before) = ends
    slope = (x_after - x_before) / column(angle_after - angle_before)
    torch.testing.assert_close(diffusion.target(x0, noise, t, config), slope, rtol=1e-6, atol=1e-6)


def angle(t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = diffusion.alpha_sigma(t, "cosine")
    return torch.atan2(sigma, alpha)


# The error


@many
@given(configs(), t_values(), st.integers(0, 2**31))
def test_perfect_prediction_has_no_error(config, t, seed):
    """At any t; otherwise the loss would be biased there."""
    x0, noise = latents(seed)
    x_t = diffusion.add_noise(x0, noise, t, config)
    prediction = diffusion.target(x0, noise, t, config)
    error = diffusion.squared_error(x0, noise, x_t, prediction, t, config)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-9)


@some
@given(configs(), st.integers(0, 2**31), st.data())
def test_error_is_the_mean_square_of_each_image(config, seed, data):
    t = data.draw(t_values(0.06, 1.0), label="t")  # below, VELOCITY_MIN_SIGMA limits the velocity of an x0 prediction
    x0, noise = latents(seed)
    x_t = diffusion.add_noise(x0, noise, t, config)
    prediction = latents(seed + 1)[0]
    error = diffusion.squared_error(x0, noise, x_t, prediction, t, config)
    assert error.shape == (3,)
    for n in range(3):
        difference = prediction[n] - diffusion.target(x0, noise, t, config)[n]
        if config.prediction == "x0" and config.loss_space == "velocity":
            alpha, sigma = (float(x[n]) for x in diffusion.alpha_sigma(t, config.noise_schedule))
            implied_noise = (x_t[n] - alpha * prediction[n]) / sigma  # the noise of this x0 prediction
            if config.noise_schedule == "rectified_flow":
                difference = (implied_noise - prediction[n]) - (noise[n] - x0[n])
            else:
                difference = (alpha * implied_noise - sigma * prediction[n]) - (alpha * noise[n] - sigma * x0[n])
        expected = sum(value**2 for value in difference.flatten().tolist()) / difference.numel()
        assert math.isclose(float(error[n]), expected, rel_tol=1e-5, abs_tol=1e-12)


def test_error_is_computed_in_float32():
    """A bfloat16 mean over a latent would lose precision."""
    x0 = torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    config = DiffusionConfig(prediction="x0")
    error = diffusion.squared_error(x0, x0, x0, x0 + 0.125, torch.tensor([0.5]), config)
    assert error.dtype == torch.float32
    assert float(error) == 0.125**2


# Sampling of t


@some
@given(
    st.sampled_from((0.0, 0.5, 1.0)),
    st.sampled_from(("uniform", "logit_normal")),
    st.floats(0.2, 8),
    st.integers(0, 2**31),
)
def test_t_is_at_most_max_t_and_depends_on_the_generator(max_t, distribution, shift, seed):
    config = DiffusionConfig(t_distribution=distribution, t_shift=shift)
    values = [diffusion.sample_t(torch.Generator().manual_seed(seed), max_t, config) for _ in range(2)]
    assert values[0] == values[1]
    assert 0 <= values[0] <= max_t
    generator = torch.Generator().manual_seed(seed)
    different_values = {diffusion.sample_t(generator, max_t, config) for _ in range(20)}
    assert len(different_values) == (20 if max_t else 1)


@pytest.mark.parametrize("max_t", [0.5, 1.0])
@pytest.mark.parametrize(("distribution", "quartiles"), [
    ("uniform", (0.25, 0.5, 0.75)),
    ("logit_normal", (0.3375, 0.5, 0.6625)),  # sigmoid of -0.6745, 0 and 0.6745
])  # fmt: skip
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_t_has_the_configured_distribution(distribution, quartiles, shift, max_t):
    config = DiffusionConfig(t_distribution=distribution, t_shift=shift)
    generator = torch.Generator().manual_seed(0)
    samples = torch.tensor([diffusion.sample_t(generator, max_t, config) for _ in range(4000)])
    expected = [max_t * shift * q / (1 + (shift - 1) * q) for q in quartiles]
    sample_quartiles = samples.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(sample_quartiles, torch.tensor(expected), rtol=0, atol=0.03 * max_t)


@some
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 10))
def test_shift_keeps_ends_and_order_and_moves_t_to_noise(first, second, shift):
    shifted = [diffusion.shift_t(t, shift) for t in (0.0, *sorted((first, second)), 1.0)]
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert shifted == sorted(shifted)
    assert diffusion.shift_t(first, 1.0) == first
    assert (shifted[1] >= min(first, second) - 1e-12) if shift >= 1 else (shifted[1] <= min(first, second) + 1e-12)
    assert math.isclose(diffusion.shift_t(diffusion.shift_t(first, shift), 1 / shift), first, abs_tol=1e-9)


shifts = st.floats(0, exclude_min=True, allow_infinity=False) | st.floats(0.01, 100)


@many
@given(st.floats(0, 1), shifts, st.sampled_from((float, np.float64, torch.float64, torch.float32)))
def test_shifted_t_is_between_0_and_1_for_every_shift(t, shift, dtype):
    """1 + 2^-52 would give rectified flow a negative alpha: dpm would fail in the middle of an image."""
    if dtype == torch.float32:
        shift = min(max(shift, 1e-37), 1e37)  # what float32 holds
    convert = dtype if callable(dtype) else lambda number: torch.tensor(number, dtype=dtype)
    shifted = [diffusion.shift_t(convert(number), shift) for number in (0.0, t, 1.0)]
    assert (shifted[0], shifted[2]) == (0, 1)
    assert 0 <= shifted[1] <= 1


# Refused configs


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_velocity_loss_of_epsilon_predictions_is_refused(schedule):
    with pytest.raises(ValueError, match="loss_space"):
        DiffusionConfig(noise_schedule=schedule, prediction="epsilon", loss_space="velocity")


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_shift_of_0_or_less_is_refused(shift):
    with pytest.raises(ValueError, match="shift"):
        DiffusionConfig(t_shift=shift)
