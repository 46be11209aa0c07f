"""Diffusion samplers. All of them are tables: one row for each model call, the weights of a sum that gives the next latent.

    x0 = the estimate that the prediction at t stands for, clipped to the codec's latent range
    x_t <- a x_t + b x0 + c (x0 - x0 of the call before) + std noise

One computation therefore advances many images, with different samplers and at different steps. x0 is clipped before it is
used: at t = 1 an error of an epsilon prediction is multiplied by 20,000 (1 / alpha).

A new sampler is one function below and one row of `config.SAMPLERS`. `dpm-sde` is the function `dpm_sde`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from transfusion.config import SAMPLERS, DiffusionConfig
from transfusion.diffusion import alpha_sigma, shift_t


class Update(NamedTuple):
    """A model call at t, and the weights of the update that follows it."""

    t: float
    x_t: float
    x0: float
    x0_change: float = 0.0  # of x0 - x0 of the call before
    noise: float = 0.0  # the standard deviation of new noise
    ends_step: bool = True


@dataclass(frozen=True)
class SamplingSchedule:
    """The times of a sampler, and alpha and sigma at each."""

    steps: int
    diffusion: DiffusionConfig

    @cached_property
    def times(self) -> list[float]:
        """steps + 1 times from 1 down to 0. 250 steps are the paper's 1000, 996, ..., 4, 0, divided by 1000."""
        return shift_t(torch.linspace(1, 0, self.steps + 1, dtype=torch.float64), self.diffusion.t_shift).tolist()

    @cached_property
    def alphas_sigmas(self) -> list[tuple[float, float]]:
        """alpha and sigma at each time."""
        times = torch.tensor(self.times, dtype=torch.float64)
        return list(zip(*(part.tolist() for part in alpha_sigma(times, self.diffusion.noise_schedule)), strict=True))

    @cached_property
    def lambdas(self) -> list[float]:
        """log(alpha / sigma) at each time: from -9.9 (cosine) or -inf (rectified flow) up to inf."""
        return [
            math.inf if sigma == 0 else -math.inf if alpha == 0 else math.log(alpha / sigma)
            for alpha, sigma in self.alphas_sigmas
        ]

    def deterministic_step(self, step: int) -> Update:
        """x0 and the noise (x_t - alpha x0) / sigma, mixed for the next time."""
        (alpha, sigma), (next_alpha, next_sigma) = self.alphas_sigmas[step : step + 2]
        return Update(self.times[step], next_sigma / sigma, next_alpha - alpha * next_sigma / sigma)

    def ancestral_step(self, step: int) -> Update:
        """Sample x at the end of a step, with the smaller of DDPM's two posterior variances (2006.11239)."""
        (alpha, sigma), (next_alpha, next_sigma) = self.alphas_sigmas[step : step + 2]
        ratio = alpha / next_alpha
        variance = sigma**2 - (ratio * next_sigma) ** 2  # of the noise that the forward process adds in this step
        std = max(0.0, variance) ** 0.5 * next_sigma / sigma
        x_t, x0 = ratio * next_sigma**2 / sigma**2, next_alpha * variance / sigma**2
        return Update(self.times[step], x_t, x0, noise=std)

    def second_order(self, step: int, update: Update) -> Update:
        """2M correction: extrapolate x0 to the middle of the step in lambda, x0 + h / (2 h_previous) (x0 - x0_previous).

        First-order, and so unchanged: the first step (no x0_previous), the last (lambda -> inf at t = 0), the second of
        rectified flow (lambda = -inf at t = 1), and steps near t = 1 where the clipped cosine schedule has h_previous = 0.
        """
        lambdas = self.lambdas
        if not 0 < step < self.steps - 1 or lambdas[step] <= lambdas[step - 1]:
            return update
        weight = (lambdas[step + 1] - lambdas[step]) / (lambdas[step] - lambdas[step - 1]) / 2
        return update._replace(x0_change=update.x0 * weight)


def ddpm(schedule: SamplingSchedule) -> Iterator[Update]:
    """Ancestral sampling (Ho et al. 2020, 2006.11239) over any subset of the steps."""
    return map(schedule.ancestral_step, range(schedule.steps))


def ddim(schedule: SamplingSchedule) -> Iterator[Update]:
    """Deterministic: x0 and the remaining noise, mixed for the next time (Song et al. 2021, 2010.02502)."""
    return map(schedule.deterministic_step, range(schedule.steps))


def dpm(schedule: SamplingSchedule) -> Iterator[Update]:
    """DPM-Solver++ 2M (Lu et al. 2022, 2211.01095): ddim from an extrapolated x0. Equal to diffusers' scheduler with a final
    sigma of zero. x0 is clipped before the extrapolation, not after it."""
    return map(schedule.second_order, range(schedule.steps), ddim(schedule))


def dpm_sde(schedule: SamplingSchedule) -> Iterator[Update]:
    """SDE-DPM-Solver++ 2M (2211.01095): ddpm from an extrapolated x0. New noise corrects errors of earlier steps."""
    return map(schedule.second_order, range(schedule.steps), ddpm(schedule))


def euler(schedule: SamplingSchedule) -> Iterator[Update]:
    """Euler steps along the velocity of rectified flow, noise - x0. They are the steps of ddim: x_t is linear in t."""
    return ddim(schedule)


def heun(schedule: SamplingSchedule) -> Iterator[Update]:
    """Heun steps of rectified flow: the mean of the velocities at both ends of the step. Two model calls per step. The last
    step is an Euler step: at t = 0 a prediction no longer gives a velocity.

    Both velocities are (x - x0) / t. Their mean therefore moves the end of the Euler step by (t / next_t - 1) / 2 times the
    change of x0.
    """
    for step, update in enumerate(euler(schedule)):
        t, next_t = schedule.times[step : step + 2]
        if step + 1 == schedule.steps:
            yield update
        else:
            yield update._replace(ends_step=False)
            yield Update(next_t, 1.0, 0.0, x0_change=(t / next_t - 1) / 2)


def get_sampler(name: str, noise_schedule: str) -> Callable[[SamplingSchedule], Iterator[Update]]:
    """The sampler with this name. ValueError when it does not exist or does not support the noise schedule."""
    usable = [sampler for sampler, schedules in SAMPLERS.items() if noise_schedule in schedules]
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name!r}; use {', '.join(usable)}")
    if name not in usable:
        raise ValueError(f"the sampler {name} does not support the {noise_schedule} noise schedule; use {', '.join(usable)}")
    return globals()[name.replace("-", "_")]


@lru_cache(maxsize=64)
def get_updates(name: str, steps: int, diffusion: DiffusionConfig) -> tuple[Update, ...]:
    """All model calls of a sampler, in order."""
    return tuple(get_sampler(name, diffusion.noise_schedule)(SamplingSchedule(steps, diffusion)))


def apply_updates(
    updates: Sequence[Update], x_t: Tensor, x0: Tensor, x0_previous: Tensor, noise: Tensor | None = None
) -> Tensor:
    """The next latents of several images, all (N, C, Y, X), by one update each. noise: not needed if all have weight 0."""
    weights = x_t.new_tensor([update[1:5] for update in updates])  # (N, 4)
    on_x_t, on_x0, on_change, on_noise = weights.T[..., None, None, None]  # (N, 1, 1, 1) each
    next_x_t = on_x_t * x_t + on_x0 * x0
    if any(update.x0_change for update in updates):
        next_x_t += on_change * (x0 - x0_previous)
    if noise is not None:
        next_x_t += on_noise * noise
    return next_x_t
