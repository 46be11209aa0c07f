"""Promise 6, forward part: add noise, perfect prediction, back; and schedules, targets, errors and times."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import many, some
from tests.lazy import Lazy
from transfusion import diffusion
from transfusion.config import DiffusionConfig

diffusers = Lazy("diffusers")

PATHS = ("cosine", "rectified_flow")
PREDICTIONS = ("epsilon", "velocity", "x0")
# the t where it can be: noise predictions divide by the signal, clean ones by the noise's scale. At t = 1
# the cosine path keeps a signal of 5e-5, the straight one none; at t = 0 neither path has noise
RANGES = {"epsilon": (0.0, 0.999), "velocity": (0.0, 1.0), "x0": (1e-3, 1.0)}


@st.composite
def configs(draw, predictions=PREDICTIONS):
    """A path, a prediction and what the loss is taken on, where that may be."""
    prediction = draw(st.sampled_from(predictions))
    on = draw(st.sampled_from(("prediction",) if prediction == "epsilon" else ("prediction", "velocity")))
    return DiffusionConfig(noise_schedule=draw(st.sampled_from(PATHS)), prediction=prediction, loss_space=on)


def latents(seed: int, N: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """clean and noise (N, C, Y, X), float64."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, N, 3, 4, 2, generator=generator, dtype=torch.float64)
    return clean * 1.5 + 0.3, noise


def times(low: float = 0.0, high: float = 1.0):
    """Three times, often at the ends."""
    one = st.sampled_from((low, high)) | st.floats(low, high)
    return st.lists(one, min_size=3, max_size=3).map(lambda found: torch.tensor(found, dtype=torch.float64))


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


# There and back


@many
@given(configs(), st.data(), st.integers(0, 2**31))
def test_a_perfect_prediction_gives_back_clean_and_noise(config, data, seed):
    t = data.draw(times(*RANGES[config.prediction]), label="t")
    clean, noise = latents(seed)
    noisy = diffusion.add_noise(clean, noise, t, config)
    said = diffusion.target(clean, noise, t, config)
    estimate = diffusion.to_x0_and_noise(noisy, said, t, config)
    torch.testing.assert_close(estimate.x0, clean, rtol=0, atol=1e-9)
    torch.testing.assert_close(estimate.noise, noise, rtol=0, atol=1e-9)


@some
@given(configs(), st.data(), st.integers(0, 2**31))
def test_there_and_back_in_single_precision(config, data, seed):
    """The precision that training and sampling have: at t <= 0.99 an error is multiplied by at most 100."""
    low, high = RANGES[config.prediction]
    t = data.draw(times(max(low, 0.01), min(high, 0.99)), label="t").float()
    clean, noise = (x.float() for x in latents(seed))
    noisy = diffusion.add_noise(clean, noise, t, config)
    estimate = diffusion.to_x0_and_noise(noisy, diffusion.target(clean, noise, t, config), t, config)
    torch.testing.assert_close(estimate.x0, clean, rtol=0, atol=2e-4)
    torch.testing.assert_close(estimate.noise, noise, rtol=0, atol=2e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_both_ends_of_the_path_stay_finite(path, prediction):
    """Where an end cannot be found by dividing, the estimate is still a number."""
    config = DiffusionConfig(noise_schedule=path, prediction=prediction)
    clean, noise = (x.float() for x in latents(0, N=2))
    t = torch.tensor([0.0, 1.0])
    noisy = diffusion.add_noise(clean, noise, t, config)
    estimate = diffusion.to_x0_and_noise(noisy, diffusion.target(clean, noise, t, config), t, config)
    assert estimate.x0.isfinite().all()
    assert estimate.noise.isfinite().all()
    torch.testing.assert_close(estimate.x0[0], clean[0])
    torch.testing.assert_close(estimate.noise[1], noise[1], rtol=0, atol=2e-4)


@some
@given(configs(), st.data(), st.integers(0, 2**31))
def test_what_an_estimate_says_makes_the_noisy_latent_again(config, data, seed):
    """Also for wrong predictions: clean and noise always lie on one path through the noisy latent."""
    low, high = RANGES[config.prediction]
    t = data.draw(times(low, high), label="t")
    noisy, said = latents(seed)
    estimate = diffusion.to_x0_and_noise(noisy, said, t, config)
    again = diffusion.add_noise(estimate.x0, estimate.noise, t, config)
    torch.testing.assert_close(again, noisy, rtol=0, atol=1e-9)


# The schedules


def test_the_cosine_path_is_diffusers_squaredcos():
    theirs = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000  # their index k is our step k + 1
    signal, scale = diffusion.alpha_sigma(t, "cosine")
    torch.testing.assert_close(signal**2, theirs.double(), rtol=2e-5, atol=5e-12)  # the last is 2.4e-9
    torch.testing.assert_close(scale**2, 1 - theirs.double(), rtol=2e-5, atol=1e-7)


@some
@given(times(), st.sampled_from(PATHS))
def test_paths_go_from_clean_to_noise(t, path):
    signal, scale = diffusion.alpha_sigma(t, path)
    ends = diffusion.alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64), path)
    torch.testing.assert_close(torch.stack(ends), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-4)
    if path == "cosine":
        torch.testing.assert_close(signal**2 + scale**2, torch.ones_like(t))
    else:
        torch.testing.assert_close(signal + scale, torch.ones_like(t))
    later = diffusion.alpha_sigma((t + 0.01).clamp(max=1), path)
    assert (later[0] <= signal).all()
    assert (later[1] >= scale).all()


def test_single_precision_times_lose_nothing_of_the_schedule():
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for path in PATHS:
        single, double = diffusion.alpha_sigma(t, path), diffusion.alpha_sigma(t.double(), path)
        assert single[0].dtype == single[1].dtype == torch.float32
        torch.testing.assert_close(torch.stack(single).double(), torch.stack(double), rtol=1e-6, atol=1e-7)


# What is predicted


@some
@given(times(), st.integers(0, 2**31), st.sampled_from(PATHS))
def test_noise_is_added_as_the_path_says(t, seed, path):
    clean, noise = latents(seed)
    signal, scale = (column(x) for x in diffusion.alpha_sigma(t, path))
    noisy = diffusion.add_noise(clean, noise, t, DiffusionConfig(noise_schedule=path))
    torch.testing.assert_close(noisy, signal * clean + scale * noise)


@some
@given(st.data(), st.integers(0, 2**31))
def test_targets_are_what_their_names_say(data, seed):
    t = data.draw(times(), label="t")
    clean, noise = latents(seed)
    for path in PATHS:
        kinds = [DiffusionConfig(noise_schedule=path, prediction=prediction) for prediction in PREDICTIONS]
        said = {config.prediction: diffusion.target(clean, noise, t, config) for config in kinds}
        assert torch.equal(said["epsilon"], noise)
        assert torch.equal(said["x0"], clean)
        if path == "rectified_flow":
            torch.testing.assert_close(said["velocity"], noise - clean)
        else:
            signal, scale = (column(x) for x in diffusion.alpha_sigma(t, path))
            torch.testing.assert_close(said["velocity"], signal * noise - scale * clean)


def test_a_straight_velocity_is_the_derivative_of_the_path():
    clean, noise = latents(0)
    config = DiffusionConfig(noise_schedule="rectified_flow", prediction="velocity")
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    ahead, behind = (diffusion.add_noise(clean, noise, t + d, config) for d in (1e-4, -1e-4))
    torch.testing.assert_close(diffusion.target(clean, noise, t, config), (ahead - behind) / 2e-4)


def test_a_cosine_velocity_is_the_derivative_by_the_angle():
    clean, noise = latents(0)
    config = DiffusionConfig(noise_schedule="cosine", prediction="velocity")
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    ends = [(diffusion.add_noise(clean, noise, t + d, config), angle(t + d)) for d in (1e-4, -1e-4)]
    (ahead, after), (behind, before) = ends
    slope = (ahead - behind) / column(after - before)
    torch.testing.assert_close(diffusion.target(clean, noise, t, config), slope, rtol=1e-6, atol=1e-6)


def angle(t: torch.Tensor) -> torch.Tensor:
    signal, scale = diffusion.alpha_sigma(t, "cosine")
    return torch.atan2(scale, signal)


# The error


@many
@given(configs(), times(), st.integers(0, 2**31))
def test_a_perfect_prediction_has_no_error(config, t, seed):
    """At any t: else training would pull the network away from the truth there."""
    clean, noise = latents(seed)
    noisy = diffusion.add_noise(clean, noise, t, config)
    said = diffusion.target(clean, noise, t, config)
    error = diffusion.squared_error(clean, noise, noisy, said, t, config)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-9)


@some
@given(configs(), st.integers(0, 2**31), st.data())
def test_the_error_is_each_images_mean_of_squares(config, seed, data):
    t = data.draw(times(0.06, 1.0), label="t")  # below, a velocity from a clean prediction is held back
    clean, noise = latents(seed)
    noisy = diffusion.add_noise(clean, noise, t, config)
    said = latents(seed + 1)[0]
    error = diffusion.squared_error(clean, noise, noisy, said, t, config)
    assert error.shape == (3,)
    for n in range(3):
        wrong = said[n] - diffusion.target(clean, noise, t, config)[n]
        if config.prediction == "x0" and config.loss_space == "velocity":
            signal, scale = (float(x[n]) for x in diffusion.alpha_sigma(t, config.noise_schedule))
            implied = (noisy[n] - signal * said[n]) / scale  # the noise that goes with what was said
            if config.noise_schedule == "rectified_flow":
                wrong = (implied - said[n]) - (noise[n] - clean[n])
            else:
                wrong = (signal * implied - scale * said[n]) - (signal * noise[n] - scale * clean[n])
        by_hand = sum(value**2 for value in wrong.flatten().tolist()) / wrong.numel()
        assert math.isclose(float(error[n]), by_hand, rel_tol=1e-5, abs_tol=1e-12)


def test_the_error_is_summed_in_single_precision():
    """Under bfloat16 a mean over a latent would lose its last digits."""
    clean = torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    config = DiffusionConfig(prediction="x0")
    error = diffusion.squared_error(clean, clean, clean, clean + 0.125, torch.tensor([0.5]), config)
    assert error.dtype == torch.float32
    assert float(error) == 0.125**2


# Time


@some
@given(
    st.sampled_from((0.0, 0.5, 1.0)),
    st.sampled_from(("uniform", "logit_normal")),
    st.floats(0.2, 8),
    st.integers(0, 2**31),
)
def test_a_time_is_at_most_max_time_and_follows_from_its_generator(max_t, law, shift, seed):
    config = DiffusionConfig(t_distribution=law, t_shift=shift)
    drawn = [diffusion.sample_t(torch.Generator().manual_seed(seed), max_t, config) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert 0 <= drawn[0] <= max_t
    generator = torch.Generator().manual_seed(seed)
    several = {diffusion.sample_t(generator, max_t, config) for _ in range(20)}
    assert len(several) == (20 if max_t else 1)


@pytest.mark.parametrize("max_t", [0.5, 1.0])
@pytest.mark.parametrize(("law", "quartiles"), [
    ("uniform", (0.25, 0.5, 0.75)),
    ("logit_normal", (0.3375, 0.5, 0.6625)),  # sigmoid of -0.6745, 0 and 0.6745
])  # fmt: skip
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_the_law_that_the_config_names(law, quartiles, shift, max_t):
    config = DiffusionConfig(t_distribution=law, t_shift=shift)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([diffusion.sample_t(generator, max_t, config) for _ in range(4000)])
    expected = [max_t * shift * q / (1 + (shift - 1) * q) for q in quartiles]
    found = drawn.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.03 * max_t)


@some
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 10))
def test_a_shift_keeps_ends_and_order_and_leans_to_noise(one, other, shift):
    moved = [diffusion.shift_t(t, shift) for t in (0.0, *sorted((one, other)), 1.0)]
    assert moved[0] == 0
    assert math.isclose(moved[-1], 1)
    assert moved == sorted(moved)
    assert math.isclose(diffusion.shift_t(one, 1.0), one)
    assert (moved[1] >= min(one, other) - 1e-12) if shift >= 1 else (moved[1] <= min(one, other) + 1e-12)
    assert math.isclose(diffusion.shift_t(diffusion.shift_t(one, shift), 1 / shift), one, abs_tol=1e-9)


# What is refused


@pytest.mark.parametrize("path", PATHS)
def test_no_velocity_loss_on_noise_predictions(path):
    with pytest.raises(ValueError, match="loss_space"):
        DiffusionConfig(noise_schedule=path, prediction="epsilon", loss_space="velocity")


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_no_shift_that_leaves_no_time(shift):
    with pytest.raises(ValueError, match="shift"):
        DiffusionConfig(t_shift=shift)
