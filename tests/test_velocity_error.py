"""The held-out velocity error: equal for equal predictions, whatever a run predicts, weighs and trains; by t."""

from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.documents import batches, some
from tests.test_training import metrics_of, new_trainer
from tests.tiny import prepared, small_run
from transfusion import diffusion
from transfusion.config import DiffusionConfig
from transfusion.data.loader import heldout_batches
from transfusion.data.sources import open_sources
from transfusion.model.transfusion import Prediction
from transfusion.objective import NoiseSample, TextLoss, velocity_errors_by_t
from transfusion.parallel import SINGLE_PROCESS, Ranks

SCHEDULES, PREDICTIONS = ("cosine", "rectified_flow"), ("epsilon", "velocity", "x0")
GRID = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]


def alpha_sigma(t: np.ndarray, noise_schedule: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the paper's schedules, as (N, 1, 1, 1)."""
    t = np.asarray(t, np.float64).reshape(-1, 1, 1, 1)
    if noise_schedule == "rectified_flow":
        return 1 - t, t
    alpha = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    return alpha, np.sqrt(1 - alpha**2)


def true_velocity(x0: np.ndarray, noise: np.ndarray, t: np.ndarray, noise_schedule: str) -> np.ndarray:
    alpha, sigma = alpha_sigma(t, noise_schedule)
    return noise - x0 if noise_schedule == "rectified_flow" else alpha * noise - sigma * x0


def as_prediction(x0: np.ndarray, x_t: np.ndarray, t: np.ndarray, config: DiffusionConfig) -> np.ndarray:
    """What a model that takes this x0 for true predicts at x_t."""
    alpha, sigma = alpha_sigma(t, config.noise_schedule)
    noise = (x_t - alpha * x0) / sigma
    return {"x0": x0, "epsilon": noise, "velocity": true_velocity(x0, noise, t, config.noise_schedule)}[config.prediction]


def arrays(seed: int, N: int = 10) -> list[np.ndarray]:
    """x0, noise and an error of x0, (N, 2, 3, 2) each."""
    return [*np.random.default_rng(seed).standard_normal((3, N, 2, 3, 2)) * np.array([1.5, 1, 0.3]).reshape(3, 1, 1, 1, 1)]


def measure(x0, noise, prediction, t, config: DiffusionConfig) -> np.ndarray:
    x0, noise, prediction, t = (torch.from_numpy(np.asarray(value, np.float64)) for value in (x0, noise, prediction, t))
    x_t = diffusion.add_noise(x0, noise, t, config)
    return diffusion.velocity_error(x0, noise, x_t, prediction, t, config).numpy()


# One prediction


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_error_is_that_of_the_velocity_for_every_prediction_and_setting(noise_schedule):
    x0, noise, error = arrays(0)
    alpha, sigma = alpha_sigma(GRID, noise_schedule)
    x_t = alpha * x0 + sigma * noise
    guess = x0 + error
    guessed = true_velocity(guess, (x_t - alpha * guess) / sigma, GRID, noise_schedule)
    expected = np.square(guessed - true_velocity(x0, noise, GRID, noise_schedule)).mean((1, 2, 3))
    np.testing.assert_allclose(expected, np.square(error / sigma).mean((1, 2, 3)))  # for both schedules
    for prediction, t_shift, distribution in product(PREDICTIONS, (1.0, 3.0), ("uniform", "logit_normal")):
        loss_space = "prediction" if prediction == "epsilon" or t_shift == 1 else "velocity"
        config = DiffusionConfig(noise_schedule, prediction, loss_space, distribution, t_shift)
        np.testing.assert_allclose(measure(x0, noise, as_prediction(guess, x_t, GRID, config), GRID, config), expected)
        truth = measure(x0, noise, as_prediction(x0, x_t, GRID, config), GRID, config)
        np.testing.assert_allclose(truth, 0, atol=1e-20)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_error_of_a_model_that_predicts_zeros(noise_schedule):
    """Without noise (epsilon) x0 is x_t / alpha, without x0 the noise is x_t / sigma."""
    x0, noise, _ = arrays(1)
    alpha, sigma = alpha_sigma(GRID, noise_schedule)
    slope = {"epsilon": noise / alpha, "x0": x0 / sigma, "velocity": true_velocity(x0, noise, GRID, noise_schedule)}
    for prediction, error in slope.items():
        config = DiffusionConfig(noise_schedule, prediction)
        found = measure(x0, noise, 0 * x0, GRID, config)
        np.testing.assert_allclose(found, np.square(error).mean((1, 2, 3)))


def test_error_of_a_prediction_in_bfloat16_is_computed_in_float32():
    x0, noise, error = (torch.from_numpy(value).float() for value in arrays(2))
    t = torch.tensor(GRID)
    for prediction in PREDICTIONS:
        config = DiffusionConfig(prediction=prediction)
        x_t = diffusion.add_noise(x0, noise, t, config)
        guess = error.to(torch.bfloat16)
        found = diffusion.velocity_error(x0, noise, x_t, guess, t, config)
        assert found.dtype == torch.float32
        expected = diffusion.velocity_error(*(v.double() for v in (x0, noise, x_t, guess, t)), config)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


# A batch


@some
@given(
    batches(min_images=1), st.builds(DiffusionConfig, st.sampled_from(SCHEDULES), st.sampled_from(PREDICTIONS)),
    st.integers(1, 10), st.integers(0, 99),
)  # fmt: skip
def test_sums_by_t_equal_slow_sums_and_have_only_images_with_a_loss(packed, config, bins, seed):
    batch = packed[1]
    generator = torch.Generator().manual_seed(seed)
    samples, predictions, expected = [], [], np.zeros((2, bins))
    for group in batch.groups:
        t = torch.rand(len(group.keys), generator=generator) * (group.max_t > 0)
        noise, predicted = torch.randn(2, *group.x0.shape, generator=generator)
        samples.append(NoiseSample(t, noise))
        predictions.append(predicted.index_fill(0, torch.nonzero(~group.loss)[:, 0], torch.nan))  # never read
        errors = measure(group.x0, noise, predicted, t, config)
        for error, time, has_loss in zip(errors, t.tolist(), group.loss.tolist(), strict=True):
            expected[:, min(int(time * bins), bins - 1)] += has_loss * np.array([error, 1])
    found = velocity_errors_by_t(batch, samples, predictions, config, bins).numpy()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3, atol=1e-9)
    assert np.array_equal(found[1], expected[1])


# A run


class Guesser(torch.nn.Module):
    """A model whose x0 is wrong by `size` * sigma in every value of an image: a velocity error of size^2."""

    @staticmethod
    def size(t: float, key: int) -> float:
        return 0.1 * (1 + t) * (1 + key % 3)

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config, self.seen = config, defaultdict(list)

    def forward(self, batch, x_t, t, text_loss) -> Prediction:
        predictions = []
        for group, noisy, time in zip(batch.groups, x_t, t, strict=True):
            has_loss = group.loss.numpy()
            _, sigma = alpha_sigma(time.double().clamp(min=0.01), self.config.noise_schedule)
            sizes = [*map(self.size, time.tolist(), group.keys)]
            guess = group.x0.double().numpy() + sigma * np.reshape(sizes, (-1, 1, 1, 1))
            predicted = as_prediction(guess, noisy.double().numpy(), time.clamp(min=0.01), self.config)
            predictions.append(torch.from_numpy(np.where(has_loss.reshape(-1, 1, 1, 1), predicted, 9.0)))
            for key, value, image, loss in zip(group.keys, time.tolist(), noisy, has_loss, strict=True):
                if loss:
                    self.seen[round(value, 4)].append((key, image.numpy().tobytes()))
        zero = torch.zeros(len(batch.text_index))
        return Prediction(TextLoss(zero.sum(), zero), predictions)


def evaluate_guesser(
    ranks: Ranks, folder: Path, seed: int = 0, data: dict | None = None, **diffusion_
) -> tuple[dict, dict]:
    """The held-out figures of a run whose averaged model is a Guesser, and what it has seen."""
    run = small_run(steps=1, seed=seed)
    run = replace(run, data=replace(run.data, **data or {}), diffusion=DiffusionConfig(**diffusion_))
    trainer = new_trainer(folder, run, ranks=ranks)
    (source,), (run, encoder) = open_sources(run.data, "heldout"), prepared(run)
    batches = heldout_batches(source, encoder, 120, 4)
    trainer.heldout = {"digits": batches[: len(batches) - 1 | 1]}  # odd: the second of two ranks has none in the last round
    trainer.ema = Guesser(run.diffusion)
    values, _ = trainer.evaluate_heldout(lambda: None)
    return {name: value for name, value in values.items() if "text" not in name}, dict(trainer.ema.seen)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_figures_of_equal_models_are_equal_for_all_settings(tmp_path, noise_schedule):
    """Also the noise, the t and the images are the same."""
    settings = {
        "velocity": {}, "epsilon": {"t_shift": 3.0}, "x0": {"loss_space": "velocity", "t_distribution": "logit_normal"},
    }  # fmt: skip
    changes = [{}, {"seed": 1}, {"data": {"image_first_max_t": 1.0, "caption_dropout": 1.0}}]
    outcomes = [
        evaluate_guesser(SINGLE_PROCESS, tmp_path / prediction, prediction=prediction, noise_schedule=noise_schedule,
                         **options, **change)
        for (prediction, options), change in zip(settings.items(), changes, strict=True)
    ]  # fmt: skip
    seen = outcomes[0][1]
    assert {*seen} == {*GRID}
    by_t = {t: np.mean([Guesser.size(t, key) ** 2 for key, _ in seen[t]]) for t in GRID}
    expected = {f"velocity_error_by_t/digits/t{t:.2f}": error for t, error in by_t.items()}
    expected["velocity_error/digits"] = np.mean([*by_t.values()])
    for values, seen_too in outcomes:
        del values["image_loss/digits"]  # it differs: that is why there are velocity errors
        assert values == pytest.approx(expected, rel=1e-3)
        assert {t: sorted(images) for t, images in seen_too.items()} == {t: sorted(images) for t, images in seen.items()}


def test_names_in_metrics_and_no_figures_without_images(tmp_path):
    run = small_run(steps=1)
    run = replace(run, data=replace(run.data, sources=("digits", "topics"), seq_len=128))
    new_trainer(tmp_path, run).train()
    names = [name for name in metrics_of(tmp_path)[-1] if "velocity" in name]
    assert "heldout_velocity_error/digits" in names
    by_t = [name.removeprefix("heldout_velocity_error_by_t/digits/t") for name in names[1:]]
    assert by_t == sorted(by_t) and {*map(float, by_t)} <= {*GRID}
    assert not [name for name in names if "topics" in name]
