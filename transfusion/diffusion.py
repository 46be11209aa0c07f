"""Between clean and noise: the path, what the image head predicts, and how t is drawn (sections 2.2 and 4.1).

t is continuous, 0 = clean and 1 = noise; the paper's step k of 1000 is t = k / 1000. A noisy latent is
`signal(t) * clean + scale(t) * noise`. This is ground that training (forward) and inference (backward) share.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig

SMALLEST = 2.428767e-9  # of the cosine path's signal squared: beta clipped at 0.999 leaves this of the last of 1000 steps
VELOCITY_FLOOR = 0.05  # a clean prediction's velocity divides by the noise's scale; below this it would explode


class Estimate(NamedTuple):
    """What a prediction says of both ends of the path."""

    clean: Tensor
    noise: Tensor


def signal_and_scale(t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """How much of the clean latent and of the noise is in the noisy one at t. Same shape as t.

    cosine: Nichol and Dhariwal's schedule; at t = k / 1000 it equals their clipped discrete one. straight: rectified flow.
    """
    if path == "straight":
        return 1 - t, t
    f = torch.cos((t.double() + 0.008) / 1.008 * (math.pi / 2)) ** 2 / math.cos(0.008 / 1.008 * (math.pi / 2)) ** 2
    alpha_bar = f.clamp(SMALLEST, 1)
    return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)


def add_noise(clean: Tensor, noise: Tensor, t: Tensor, config: DiffusionConfig) -> Tensor:
    """clean, noise (N, C, Y, X), t (N,) -> noisy (N, C, Y, X)."""
    signal, scale = _over(clean, *signal_and_scale(t, config.path))
    return signal * clean + scale * noise


def target(clean: Tensor, noise: Tensor, t: Tensor, config: DiffusionConfig) -> Tensor:
    """What the image head should say (N, C, Y, X)."""
    match config.prediction:
        case "noise":
            return noise
        case "clean":
            return clean
        case "velocity":
            return velocity(clean, noise, t, config)


def velocity(clean: Tensor, noise: Tensor, t: Tensor, config: DiffusionConfig) -> Tensor:
    """The way the path runs: straight, noise - clean; cosine, Salimans and Ho's signal * noise - scale * clean."""
    if config.path == "straight":
        return noise - clean
    signal, scale = _over(clean, *signal_and_scale(t, config.path))
    return signal * noise - scale * clean


def read_prediction(noisy: Tensor, prediction: Tensor, t: Tensor, config: DiffusionConfig) -> Estimate:
    """Both ends of the path, from the noisy latent and what the image head said (all (N, C, Y, X), t (N,))."""
    signal, scale = _over(noisy, *signal_and_scale(t, config.path))
    match config.prediction:
        case "noise":
            clean = (noisy - scale * prediction) / signal.clamp(min=SMALLEST**0.5)
            return Estimate(clean, prediction)
        case "clean":
            return Estimate(prediction, noise_beside(noisy, prediction, t, config))
        case "velocity" if config.path == "straight":
            return Estimate(noisy - scale * prediction, noisy + signal * prediction)
        case "velocity":
            return Estimate(signal * noisy - scale * prediction, scale * noisy + signal * prediction)


def noise_beside(noisy: Tensor, clean: Tensor, t: Tensor, config: DiffusionConfig, floor: float = 1e-6) -> Tensor:
    """The noise that, with this clean latent, makes this noisy one."""
    signal, scale = _over(noisy, *signal_and_scale(t, config.path))
    return (noisy - signal * clean) / scale.clamp(min=floor)


def squared_error(
    clean: Tensor, noise: Tensor, noisy: Tensor, prediction: Tensor, t: Tensor, config: DiffusionConfig
) -> Tensor:
    """Mean over each image's numbers (section 3): (N, C, Y, X) -> (N,).

    `loss_on: velocity` turns a clean prediction into a velocity first (JiT, 2511.13720): right for patches wider than
    about a quarter of the model.
    """
    if config.prediction == "clean" and config.loss_on == "velocity":
        said, true = (
            velocity(latent, noise_beside(noisy, latent, t, config, VELOCITY_FLOOR), t, config)
            for latent in (prediction, clean)
        )
        error = said - true
    else:
        error = prediction - target(clean, noise, t, config)
    return error.float().square().flatten(1).mean(1)


def draw_time(generator: torch.Generator, max_time: float, config: DiffusionConfig) -> float:
    """One image's t, at most max_time."""
    match config.time_law:
        case "uniform":
            t = torch.rand((), generator=generator, dtype=torch.float64).item()
        case "logit_normal":
            t = torch.randn((), generator=generator, dtype=torch.float64).sigmoid().item()
    return max_time * shift_time(t, config.shift)


def shift_time(t, shift: float):
    """The same walk from 0 to 1, leaning towards noise when shift > 1. Numbers or tensors."""
    return shift * t / (1 + (shift - 1) * t)


def _over(latent: Tensor, *per_image: Tensor) -> list[Tensor]:
    return [value.to(latent.dtype).view(-1, *[1] * (latent.dim() - 1)) for value in per_image]
