"""Image mode: one denoising step for all images of one latent shape, each after its cached prefixes.

Guidance predicts an image in several branches: after everything that its sequence has read, after less, and after only bos
and boi. `scale` weighs the difference between a branch and the next one, which has less context:

    uncond + image_scale (image_cond - uncond) + scale (cond - image_cond)     InstructPix2Pix (2211.09800), section 3.2.1
    uncond + scale (cond - uncond)                                             classifier-free guidance (2207.12598)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from transfusion.codecs.codec import Codec
from transfusion.config import DiffusionConfig, GenerationConfig
from transfusion.diffusion import to_x0_and_noise
from transfusion.inference.cache import Cache
from transfusion.inference.samplers import LatentRange, Sampler, SamplingSchedule, get_sampler
from transfusion.model.mask import cached_mask
from transfusion.model.transfusion import Transfusion

T_TOLERANCE = 1e-6  # t is float32: step 0.8 must lie in an interval that ends at 0.8


@dataclass(frozen=True)
class Branch:
    """One condition of guidance: its cache slot, and the weight of (its prediction - the next branch's)."""

    slot: int
    scale: float = 1.0


@dataclass
class LatentImageState:
    """An image between noise and x0, and its guidance branches."""

    shape: tuple[int, int]
    branches: tuple[Branch, ...]  # the fully conditional one first
    generation: GenerationConfig
    schedule: SamplingSchedule
    sampler: Sampler
    x_t: Tensor  # (1, C, Y, X)
    t: Tensor  # (1,)
    x0_prediction: Tensor | None = None  # (1, C, Y, X) from the last prediction
    x0: Tensor | None = None  # (1, C, Y, X), when it is finished

    num_cached_positions = 1  # positions of the image in the branches' slots, boi included

    @property
    def step(self) -> int:
        """Completed denoising steps. A sampler may call the model more than once per step; x_t is then a trial value."""
        return self.schedule.step

    def content(self) -> np.ndarray | None:
        """The finished latent (C, Y, X); None before."""
        return None if self.x0 is None else self.x0[0].cpu().numpy()

    def preview(self, codec: Codec) -> tuple[np.ndarray, np.ndarray]:
        """x_t and the predicted x0 as pixels, both (Y, X, channels) uint8."""
        x_t = self.x_t if self.x0 is None else self.x0
        return codec.decode(x_t[0].cpu().numpy()), codec.decode(self.x0_prediction[0].cpu().numpy())

    def advance(self, predictions: Sequence[Tensor]) -> None:
        """Continue with the predictions (C, Y, X) of the active branches."""
        scales = [branch.scale for branch in self.branches[: len(predictions)]]
        prediction = guide(predictions, scales, self.generation.guidance_rescale)[None]  # (1, C, Y, X)
        self.x0_prediction = to_x0_and_noise(self.x_t, prediction, self.t, self.schedule.diffusion).x0
        try:
            self.x_t, self.t = self.sampler.send(prediction)
        except StopIteration as finished:
            self.x0 = finished.value

    def active_branches(self) -> tuple[Branch, ...]:
        """Branches to evaluate at this t: all inside guidance_interval, only the conditional one outside."""
        low, high = self.generation.guidance_interval
        # The full interval is tested first: t.item() would wait for the device.
        if (low, high) == (0, 1) or low - T_TOLERANCE <= self.t.item() <= high + T_TOLERANCE:
            return self.branches
        return self.branches[:1]


def begin_image(
    shape: tuple[int, int, int], branches: Sequence[Branch], generation: GenerationConfig, diffusion: DiffusionConfig,
    latent_range: LatentRange, seed: int, device: torch.device,
) -> LatentImageState:  # fmt: skip
    """A latent (C, Y, X) of noise from this seed, generated on the CPU in float32 so that the device does not change it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, *shape), generator=generator).to(device)  # (1, C, Y, X)
    if generation.t_shift is not None:
        diffusion = replace(diffusion, t_shift=generation.t_shift)
    schedule = SamplingSchedule(generation.steps, diffusion, latent_range if generation.clip_x0 else None, generator)
    sampler = get_sampler(generation.sampler, diffusion.noise_schedule)(noise, schedule)
    x_t, t = next(sampler)
    return LatentImageState(shape[1:], tuple(branches), generation, schedule, sampler, x_t, t)


def predict_branches(model: Transfusion, cache: Cache, images: Sequence[LatentImageState]) -> list[list[Tensor]]:
    """One model call for all images, all of one shape: the predictions (C, Y, X) of the active branches of each. Only the
    positions of the images are computed. Nothing is committed to the cache."""
    branches = [image.active_branches() for image in images]
    # All first branches, then all second ones: slots that were acquired together are then adjacent.
    order = [(n, k) for k in range(max(map(len, branches))) for n in range(len(images)) if k < len(branches[n])]
    x_t = torch.cat([images[n].x_t for n, _ in order])  # (B, C, Y, X)
    t = torch.cat([images[n].t for n, _ in order])  # (B,)
    predictions = predict(model, cache, [branches[n][k].slot for n, k in order], x_t, t)  # (B, C, Y, X)
    by_branch = dict(zip(order, predictions, strict=True))
    return [[by_branch[n, k] for k in range(len(branches[n]))] for n in range(len(images))]


def guide(predictions: Sequence[Tensor], scales: Sequence[float], rescale: float = 0.0) -> Tensor:
    """The guided prediction from those of the branches, (C, Y, X) each; the formulas are at the top of this file.

    rescale (0 to 1): how far the standard deviation, which guidance increases, is brought back to that of the first branch
    (Lin et al. 2023, 2305.08891, section 3.4).
    """
    guided = predictions[-1]  # (C, Y, X)
    for n in reversed(range(len(predictions) - 1)):
        guided = guided + scales[n] * (predictions[n] - predictions[n + 1])
    if rescale and len(predictions) > 1:
        cond_std, guided_std = (p.std(correction=0) for p in (predictions[0], guided))
        ratio = torch.where(guided_std > 0, cond_std / guided_std, 1.0)  # () an untrained model predicts 0 everywhere
        guided = guided * (1 + rescale * (ratio - 1))
    return guided


def predict(model: Transfusion, cache: Cache, slots: list[int], x_t: Tensor, t: Tensor) -> Tensor:
    """The model's prediction for latents x_t (B, C, Y, X) at times t (B,), each after the prefix in its slot."""
    B, P = len(slots), x_t.shape[2] * x_t.shape[3] // model.config.patch_size**2
    view = cache.view(slots, P)
    zeros = torch.zeros(B, P, dtype=torch.int64, device=x_t.device)  # (B, P) tokens to be replaced; also: image 0
    index = torch.arange(B * P, device=x_t.device).view(B, P)
    mask = cached_mask(view.lengths, P, zeros, model.config.image_attention)
    prediction = model.forward_cached(zeros, view.position_ids, mask, view, zeros.new_zeros(0), [x_t], [t], [index])
    return prediction.images[0].to(x_t.dtype)
