"""The forward process: x_t = alpha(t) x0 + sigma(t) noise, its prediction targets, and how t is sampled (2.2 and 4.1).

t is continuous, from 0 (no noise) to 1 (only noise); the paper's step k of 1000 is t = k / 1000. Training (the forward
process) and inference (the reverse process) share this file. Tensors are (N, C, Y, X), t is (N,).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig

MIN_ALPHA_BAR = 2.428767e-9  # alpha^2 of the cosine schedule at t = 1: the last of 1000 steps with beta clipped at 0.999
VELOCITY_MIN_SIGMA = 0.05  # the velocity of an x0 prediction divides by sigma; smaller values would make it explode


class X0AndNoise(NamedTuple):
    """The x0 and the noise that a prediction stands for."""

    x0: Tensor
    noise: Tensor


def alpha_sigma(t: Tensor, noise_schedule: str) -> tuple[Tensor, Tensor]:
    """alpha and sigma at t, with the shape of t. cosine: Nichol and Dhariwal (2102.09672), equal to their clipped discrete
    schedule at t = k / 1000, with alpha^2 + sigma^2 = 1. rectified_flow: 1 - t and t (2209.03003)."""
    if noise_schedule == "rectified_flow":
        return 1 - t, t
    f = torch.cos((t.double() + 0.008) / 1.008 * (math.pi / 2)) ** 2 / math.cos(0.008 / 1.008 * (math.pi / 2)) ** 2
    alpha_bar = f.clamp(MIN_ALPHA_BAR, 1)
    return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, config: DiffusionConfig) -> Tensor:
    """x_t = alpha x0 + sigma noise."""
    alpha, sigma = _per_image(x0, *alpha_sigma(t, config.noise_schedule))
    return alpha * x0 + sigma * noise


def target(x0: Tensor, noise: Tensor, t: Tensor, config: DiffusionConfig) -> Tensor:
    """The training target of the image head."""
    match config.prediction:
        case "epsilon":
            return noise
        case "x0":
            return x0
        case "velocity":
            return velocity(x0, noise, t, config)


def velocity(x0: Tensor, noise: Tensor, t: Tensor, config: DiffusionConfig) -> Tensor:
    """v = alpha noise - sigma x0 (Salimans and Ho, 2202.00512); with rectified flow noise - x0."""
    if config.noise_schedule == "rectified_flow":
        return noise - x0
    alpha, sigma = _per_image(x0, *alpha_sigma(t, config.noise_schedule))
    return alpha * noise - sigma * x0


def to_x0_and_noise(x_t: Tensor, prediction: Tensor, t: Tensor, config: DiffusionConfig) -> X0AndNoise:
    """x0 and noise from x_t and the prediction of the image head."""
    alpha, sigma = _per_image(x_t, *alpha_sigma(t, config.noise_schedule))
    match config.prediction:
        case "epsilon":
            x0 = (x_t - sigma * prediction) / alpha.clamp(min=MIN_ALPHA_BAR**0.5)
            return X0AndNoise(x0, prediction)
        case "x0":
            return X0AndNoise(prediction, noise_from_x0(x_t, prediction, t, config))
        case "velocity" if config.noise_schedule == "rectified_flow":
            return X0AndNoise(x_t - sigma * prediction, x_t + alpha * prediction)
        case "velocity":
            return X0AndNoise(alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction)


def noise_from_x0(x_t: Tensor, x0: Tensor, t: Tensor, config: DiffusionConfig, min_sigma: float = 1e-6) -> Tensor:
    """The noise that with this x0 gives x_t: (x_t - alpha x0) / sigma."""
    alpha, sigma = _per_image(x_t, *alpha_sigma(t, config.noise_schedule))
    return (x_t - alpha * x0) / sigma.clamp(min=min_sigma)


def squared_error(x0: Tensor, noise: Tensor, x_t: Tensor, prediction: Tensor, t: Tensor, config: DiffusionConfig) -> Tensor:
    """Mean squared error of each image (section 3): (N, C, Y, X) -> (N,).

    `loss_space: velocity` compares the velocity of an x0 prediction (JiT, 2511.13720). It is better than `prediction` for
    patches wider than about a quarter of the model.
    """
    if config.prediction == "x0" and config.loss_space == "velocity":
        predicted, true = (
            velocity(latents, noise_from_x0(x_t, latents, t, config, VELOCITY_MIN_SIGMA), t, config)
            for latents in (prediction, x0)
        )
        error = predicted - true
    else:
        error = prediction - target(x0, noise, t, config)
    return error.float().square().flatten(1).mean(1)


def velocity_error(
    x0: Tensor, noise: Tensor, x_t: Tensor, prediction: Tensor, t: Tensor, config: DiffusionConfig
) -> Tensor:
    """Mean squared error of the velocity that the prediction of each image stands for: (N, C, Y, X) -> (N,), in the dtype of
    x_t.

    It is the same for every prediction that stands for the same x0, so it compares runs with any prediction. It is the error
    of epsilon divided by alpha^2, or the error of x0 divided by sigma^2: t must be well inside (0, 1).
    """
    prediction = prediction.to(x_t.dtype)
    if config.prediction != "velocity":
        prediction = velocity(*to_x0_and_noise(x_t, prediction, t, config), t, config)
    return (prediction - velocity(x0, noise, t, config)).square().flatten(1).mean(1)


def sample_t(generator: torch.Generator, max_t: float, config: DiffusionConfig) -> float:
    """t of one image, at most max_t."""
    match config.t_distribution:
        case "uniform":
            t = torch.rand((), generator=generator, dtype=torch.float64).item()
        case "logit_normal":  # SD3, 2403.03206
            t = torch.randn((), generator=generator, dtype=torch.float64).sigmoid().item()
    return max_t * shift_t(t, config.t_shift)


def shift_t(t, shift: float):
    """SD3's timestep shift, s t / (1 + (s - 1) t): above 1 it moves t towards noise. Numbers or tensors, from 0 to 1.

    In this form no rounding gives more than 1, 0 and 1 are unchanged, and so is every t with a shift of 1.
    """
    return shift * t / (shift * t + (1 - t))


def _per_image(latents: Tensor, *values: Tensor) -> list[Tensor]:
    """(N,) -> (N, 1, 1, 1) in the dtype of the latents."""
    return [value.to(latents.dtype).view(-1, *[1] * (latents.dim() - 1)) for value in values]
