"""Diffusion samplers. A sampler is a coroutine: it yields (x_t, t), is sent the prediction, and returns x0.

    x_t, t = next(sampler); prediction = model(x_t, t); x_t, t = sampler.send(prediction); ...

One loop can therefore run many samplers at different steps. Every sampler clips the estimate of x0 to the codec's latent
range before it steps: at t = 1 an error of an epsilon prediction is multiplied by 20,000 (1 / alpha).

A new sampler is one function below and one row of `config.SAMPLERS`. `dpm-sde` is the function `dpm_sde`.
"""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from transfusion.config import SAMPLERS, DiffusionConfig
from transfusion.diffusion import X0AndNoise, alpha_sigma, noise_from_x0, shift_t, to_x0_and_noise

Sampler = Generator[tuple[Tensor, Tensor], Tensor, Tensor]  # yields (1, C, Y, X) and (1,), is sent and returns (1, C, Y, X)
LatentRange = tuple[Tensor, Tensor]  # smallest and largest value of each channel, (C, 1, 1) each


@dataclass
class SamplingSchedule:
    """The inputs of a sampler of one image: times, alpha and sigma at each, the range of x0, and the generator."""

    steps: int
    diffusion: DiffusionConfig
    latent_range: LatentRange | None  # None: x0 is not clipped
    generator: torch.Generator
    step: int = 0  # completed steps, however many model calls each took

    def each_step(self) -> Iterator[int]:
        """0, 1, ..., steps - 1; `step` counts the completed ones."""
        for step in range(self.steps):
            yield step
            self.step = step + 1

    def times(self) -> Tensor:
        """(steps + 1,) from 1 down to 0. 250 steps are the paper's 1000, 996, ..., 4, 0, divided by 1000."""
        return shift_t(torch.linspace(1, 0, self.steps + 1, dtype=torch.float64), self.diffusion.t_shift)

    def to_x0_and_noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> X0AndNoise:
        """The clipped x0, and the noise that with it gives x_t."""
        x0 = to_x0_and_noise(x_t, prediction, t, self.diffusion).x0
        if self.latent_range is not None:
            x0 = x0.clamp(*self.latent_range)
        return X0AndNoise(x0, noise_from_x0(x_t, x0, t, self.diffusion))

    @cached_property
    def alphas_sigmas(self) -> list[tuple[float, float]]:
        """alpha and sigma at each time."""
        return list(zip(*(part.tolist() for part in alpha_sigma(self.times(), self.diffusion.noise_schedule)), strict=True))

    @cached_property
    def lambdas(self) -> list[float]:
        """log(alpha / sigma) at each time: from -9.9 (cosine) or -inf (rectified flow) up to inf."""
        return [
            math.inf if sigma == 0 else -math.inf if alpha == 0 else math.log(alpha / sigma)
            for alpha, sigma in self.alphas_sigmas
        ]

    def ancestral_step(self, step: int, x_t: Tensor, x0: Tensor) -> Tensor:
        """Sample x at the end of a step from x_t and x0, with the smaller of DDPM's two posterior variances (2006.11239)."""
        (alpha, sigma), (next_alpha, next_sigma) = self.alphas_sigmas[step : step + 2]
        ratio = alpha / next_alpha
        variance = sigma**2 - (ratio * next_sigma) ** 2  # of the noise that the forward process adds in this step
        mean = (ratio * next_sigma**2 / sigma**2) * x_t + (next_alpha * variance / sigma**2) * x0
        std = max(0.0, variance) ** 0.5 * next_sigma / sigma
        noise = torch.randn(x_t.shape, generator=self.generator).to(x_t) if std else 0.0
        return mean + std * noise

    def extrapolate_x0(self, step: int, x0: Tensor, x0_previous: Tensor | None) -> Tensor:
        """2M correction: extrapolate x0 to the middle of the step in lambda, x0 + h / (2 h_previous) (x0 - x0_previous).

        First-order, and so unchanged: the first step (no x0_previous), the last (lambda -> inf at t = 0), the second of
        rectified flow (lambda = -inf at t = 1), and steps near t = 1 where the clipped cosine schedule has h_previous = 0.
        """
        lambdas = self.lambdas
        if not 0 < step < self.steps - 1 or lambdas[step] <= lambdas[step - 1]:
            return x0
        weight = (lambdas[step + 1] - lambdas[step]) / (lambdas[step] - lambdas[step - 1]) / 2
        return x0 + weight * (x0 - x0_previous)


def ddpm(x_t: Tensor, schedule: SamplingSchedule) -> Sampler:
    """Ancestral sampling (Ho et al. 2020, 2006.11239) over any subset of the steps."""
    times = schedule.times()
    for step in schedule.each_step():
        t = times[step : step + 1].to(x_t)
        x0 = schedule.to_x0_and_noise(x_t, (yield x_t, t), t).x0
        x_t = schedule.ancestral_step(step, x_t, x0)
    return x_t


def ddim(x_t: Tensor, schedule: SamplingSchedule) -> Sampler:
    """Deterministic: x0 and the remaining noise, mixed for the next time (Song et al. 2021, 2010.02502)."""
    times = schedule.times()
    for step in schedule.each_step():
        t = times[step : step + 1].to(x_t)
        x0, noise = schedule.to_x0_and_noise(x_t, (yield x_t, t), t)
        alpha, sigma = schedule.alphas_sigmas[step + 1]
        x_t = alpha * x0 + sigma * noise
    return x_t


def dpm(x_t: Tensor, schedule: SamplingSchedule) -> Sampler:
    """DPM-Solver++ 2M (Lu et al. 2022, 2211.01095): ddim from an extrapolated x0. Equal to diffusers' scheduler with a final
    sigma of zero. x0 is clipped before the extrapolation, not after it."""
    times, x0 = schedule.times(), None
    for step in schedule.each_step():
        t = times[step : step + 1].to(x_t)  # (1,)
        x0_previous = x0
        x0 = schedule.to_x0_and_noise(x_t, (yield x_t, t), t).x0
        x0_extrapolated = schedule.extrapolate_x0(step, x0, x0_previous)  # (1, C, Y, X)
        alpha, sigma = schedule.alphas_sigmas[step + 1]
        x_t = alpha * x0_extrapolated + sigma * noise_from_x0(x_t, x0_extrapolated, t, schedule.diffusion)
    return x_t


def dpm_sde(x_t: Tensor, schedule: SamplingSchedule) -> Sampler:
    """SDE-DPM-Solver++ 2M (2211.01095): ddpm from an extrapolated x0. New noise corrects errors of earlier steps."""
    times, x0 = schedule.times(), None
    for step in schedule.each_step():
        t = times[step : step + 1].to(x_t)  # (1,)
        x0_previous = x0
        x0 = schedule.to_x0_and_noise(x_t, (yield x_t, t), t).x0
        x_t = schedule.ancestral_step(step, x_t, schedule.extrapolate_x0(step, x0, x0_previous))
    return x_t


def euler(x_t: Tensor, schedule: SamplingSchedule) -> Sampler:
    """Euler steps along the velocity of rectified flow, noise - x0."""
    times = schedule.times()
    for step in schedule.each_step():
        t = times[step : step + 1].to(x_t)
        x0, noise = schedule.to_x0_and_noise(x_t, (yield x_t, t), t)
        x_t = x_t + (times[step + 1] - times[step]).item() * (noise - x0)
    return x_t


def heun(x_t: Tensor, schedule: SamplingSchedule) -> Sampler:
    """Heun steps of rectified flow: the mean of the velocities at both ends of the step. Two model calls per step. The last
    step is an Euler step: at t = 0 a prediction no longer gives a velocity."""
    times = schedule.times()
    for step in schedule.each_step():
        t, next_t = (times[n : n + 1].to(x_t) for n in (step, step + 1))  # (1,) each
        h = (times[step + 1] - times[step]).item()
        x0, noise = schedule.to_x0_and_noise(x_t, (yield x_t, t), t)
        velocity = noise - x0  # (1, C, Y, X)
        if step + 1 < schedule.steps:
            x_euler = x_t + h * velocity  # (1, C, Y, X)
            x0, noise = schedule.to_x0_and_noise(x_euler, (yield x_euler, next_t), next_t)
            velocity = (velocity + noise - x0) / 2
        x_t = x_t + h * velocity
    return x_t


def get_sampler(name: str, noise_schedule: str) -> Callable[[Tensor, SamplingSchedule], Sampler]:
    """The sampler with this name. ValueError when it does not exist or does not support the noise schedule."""
    usable = [sampler for sampler, schedules in SAMPLERS.items() if noise_schedule in schedules]
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name!r}; use {', '.join(usable)}")
    if name not in usable:
        raise ValueError(f"the sampler {name} does not support the {noise_schedule} noise schedule; use {', '.join(usable)}")
    return globals()[name.replace("-", "_")]
