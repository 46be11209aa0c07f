"""Noise to image. A sampler is a coroutine: it yields what the model should see, is sent the prediction, returns the image.

    noisy, t = next(sampler); prediction = model(noisy, t); noisy, t = sampler.send(prediction); ...

so one loop can drive many at once, each at its own step. Every one recovers the clean estimate, clips it to the codec's
bound, then steps: at t = 1 an error in a noise prediction is multiplied by 20,000 before it is clipped.

All ask once per step, but heun: twice in every step but the last.
"""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig
from transfusion.diffusion import Estimate, noise_beside, read_prediction, shift_time, signal_and_scale

Sampler = Generator[tuple[Tensor, Tensor], Tensor, Tensor]  # yields (1, C, Y, X) and (1,), is sent and returns (1, C, Y, X)
Bound = tuple[Tensor, Tensor]  # smallest and largest value of each channel, (C, 1, 1) each


@dataclass
class Walk:
    """What all samplers need: how many steps over which path, the bound of a clean latent, and chance. For one image."""

    steps: int
    diffusion: DiffusionConfig
    bound: Bound | None
    generator: torch.Generator
    step: int = 0  # how many are behind, however often the model was asked in each

    def each_step(self) -> Iterator[int]:
        """0, 1, ..., steps - 1; `step` counts those that are done."""
        for step in range(self.steps):
            yield step
            self.step = step + 1

    def times(self) -> Tensor:
        """(steps + 1,) from 1 down to 0. 250 steps are the paper's 1000, 996, ..., 4, 0, divided by 1000."""
        return shift_time(torch.linspace(1, 0, self.steps + 1, dtype=torch.float64), self.diffusion.shift)

    def estimate(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Estimate:
        """The clipped clean latent, and the noise that is left when it is taken out."""
        clean = read_prediction(noisy, prediction, t, self.diffusion).clean
        if self.bound is not None:
            clean = clean.clamp(*self.bound)
        return Estimate(clean, noise_beside(noisy, clean, t, self.diffusion))

    @cached_property
    def coefficients(self) -> list[tuple[float, float]]:
        """Signal and scale at each of the times."""
        return list(zip(*(part.tolist() for part in signal_and_scale(self.times(), self.diffusion.path)), strict=True))

    @cached_property
    def half_log_snr(self) -> list[float]:
        """log(signal / scale) at each of the times: from -9.9 (cosine) or -inf (straight) up to inf."""
        return [
            math.inf if scale == 0 else -math.inf if signal == 0 else math.log(signal / scale)
            for signal, scale in self.coefficients
        ]

    def ancestral(self, step: int, noisy: Tensor, clean: Tensor) -> Tensor:
        """A draw of what stands at the end of a step, given its beginning and a clean estimate: of the smaller of DDPM's
        two posterior variances (Ho et al. 2020).
        """
        (signal, scale), (next_signal, next_scale) = self.coefficients[step : step + 2]
        ratio = signal / next_signal  # of this step's signal to the next one's
        fresh = scale**2 - (ratio * next_scale) ** 2  # variance that this step's noise adds to the next one's
        mean = (ratio * next_scale**2 / scale**2) * noisy + (next_signal * fresh / scale**2) * clean
        deviation = max(0.0, fresh) ** 0.5 * next_scale / scale
        noise = torch.randn(noisy.shape, generator=self.generator).to(noisy) if deviation else 0.0
        return mean + deviation * noise

    def led_on(self, step: int, clean: Tensor, before: Tensor | None) -> Tensor:
        """A clean estimate led on the way that it went since the step before, to the middle of this step.

        How far is measured in half the log of the signal-to-noise ratio. The first step has nothing to go by; the last would
        lead on without end, and is not led. From t = 1 of the straight path the way is endless, and the second step is
        led by nothing; close to t = 1 the cosine path stands still.
        """
        place = self.half_log_snr
        if not 0 < step < self.steps - 1 or place[step] <= place[step - 1]:
            return clean
        share = (place[step + 1] - place[step]) / (place[step] - place[step - 1]) / 2
        return clean + share * (clean - before)


def ddpm(noisy: Tensor, walk: Walk) -> Sampler:
    """Ancestral sampling (Ho et al. 2020), over any subset of the steps."""
    times = walk.times()
    for step in walk.each_step():
        t = times[step : step + 1].to(noisy)
        clean = walk.estimate(noisy, (yield noisy, t), t).clean
        noisy = walk.ancestral(step, noisy, clean)
    return noisy


def ddim(noisy: Tensor, walk: Walk) -> Sampler:
    """Deterministic: the clean estimate and the noise that is left, mixed again for the next time (Song et al. 2021)."""
    times = walk.times()
    for step in walk.each_step():
        t = times[step : step + 1].to(noisy)
        clean, noise = walk.estimate(noisy, (yield noisy, t), t)
        signal, scale = walk.coefficients[step + 1]
        noisy = signal * clean + scale * noise
    return noisy


def dpm(noisy: Tensor, walk: Walk) -> Sampler:
    """DPM-Solver++ 2M (Lu et al. 2022, 2211.01095): ddim, from a clean estimate led on the way that it last went.

    All as diffusers does with a final sigma of zero. What is clipped are the estimates; where they lead may lie beyond the
    bound for a step.
    """
    times, clean = walk.times(), None
    for step in walk.each_step():
        t = times[step : step + 1].to(noisy)  # (1,)
        before = clean
        clean = walk.estimate(noisy, (yield noisy, t), t).clean
        ahead = walk.led_on(step, clean, before)  # (1, C, Y, X)
        signal, scale = walk.coefficients[step + 1]
        noisy = signal * ahead + scale * noise_beside(noisy, ahead, t, walk.diffusion)
    return noisy


def dpm_sde(noisy: Tensor, walk: Walk) -> Sampler:
    """SDE-DPM-Solver++ 2M (the same paper): ddpm, from an estimate led on like dpm's. New noise mends earlier errors."""
    times, clean = walk.times(), None
    for step in walk.each_step():
        t = times[step : step + 1].to(noisy)  # (1,)
        before = clean
        clean = walk.estimate(noisy, (yield noisy, t), t).clean
        noisy = walk.ancestral(step, noisy, walk.led_on(step, clean, before))
    return noisy


def euler(noisy: Tensor, walk: Walk) -> Sampler:
    """Straight steps along the velocity, for the straight path."""
    times = walk.times()
    for step in walk.each_step():
        t = times[step : step + 1].to(noisy)
        clean, noise = walk.estimate(noisy, (yield noisy, t), t)
        noisy = noisy + (times[step + 1] - times[step]).item() * (noise - clean)
    return noisy


def heun(noisy: Tensor, walk: Walk) -> Sampler:
    """Steps along the mean of the velocities at both their ends, for the straight path: euler, tried and corrected.

    The last step is euler's: at t = 0 nothing is left from which a velocity could be read.
    """
    times = walk.times()
    for step in walk.each_step():
        t, later = (times[n : n + 1].to(noisy) for n in (step, step + 1))  # (1,) each
        length = (times[step + 1] - times[step]).item()
        clean, noise = walk.estimate(noisy, (yield noisy, t), t)
        velocity = noise - clean  # (1, C, Y, X)
        if step + 1 < walk.steps:
            tried = noisy + length * velocity  # (1, C, Y, X)
            clean, noise = walk.estimate(tried, (yield tried, later), later)
            velocity = (velocity + noise - clean) / 2
        noisy = noisy + length * velocity
    return noisy


def sampler_of(name: str, diffusion: DiffusionConfig) -> Callable[[Tensor, Walk], Sampler]:
    """The sampler of that name. ValueError when it does not go with the path."""
    match name:
        case "ddpm":
            return ddpm
        case "ddim":
            return ddim
        case "dpm":
            return dpm
        case "dpm-sde":
            return dpm_sde
        case "euler" if diffusion.path == "straight":
            return euler
        case "heun" if diffusion.path == "straight":
            return heun
        case "euler" | "heun":
            other = "dpm, dpm-sde, ddim or ddpm"
            raise ValueError(f"the {name} sampler walks the straight path; this run's path is cosine: use {other}")
        case _:
            raise ValueError(f"there is no sampler {name!r}; there are ddpm, ddim, dpm, dpm-sde, euler, heun")
