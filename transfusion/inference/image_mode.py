"""Image mode: one denoising step for all images of one latent shape, each after its cached prefixes.

Guidance predicts an image in several branches: after everything that its sequence has read, after less, and after only bos
and boi. `scale` weighs the difference between a branch and the next one, which has less context:

    uncond + image_scale (image_cond - uncond) + scale (cond - image_cond)     InstructPix2Pix (2211.09800), section 3.2.1
    uncond + scale (cond - uncond)                                             classifier-free guidance (2207.12598)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from transfusion.codecs.codec import Codec
from transfusion.config import DiffusionConfig, GenerationConfig
from transfusion.diffusion import to_x0_and_noise
from transfusion.inference.cache import Cache
from transfusion.inference.samplers import Update, apply_updates, get_updates
from transfusion.model.mask import cached_mask
from transfusion.model.transformer import rotary_positions
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Sides, grid_offsets

T_TOLERANCE = 1e-6  # of the ends of guidance_interval: step 0.8 must lie in an interval that ends at 0.8

LatentRange = tuple[Tensor, Tensor]  # smallest and largest value of each channel, (C, 1, 1) each


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
    diffusion: DiffusionConfig
    latent_range: LatentRange | None  # None: x0 is not clipped
    updates: tuple[Update, ...]  # one for each model call
    generator: torch.Generator  # of noise
    x_t: Tensor  # (C, Y, X)
    num_calls: int = 0
    step: int = 0  # completed denoising steps. A sampler may call the model twice in a step; x_t is then a trial value
    x0: Tensor | None = None  # (C, Y, X) of the last model call
    noise: Tensor | None = field(init=False)  # (C, Y, X) on the CPU, if the next update adds some

    num_cached_positions = 1  # positions of the image in the branches' slots, boi included

    def __post_init__(self):
        self._sample_noise()

    @property
    def is_finished(self) -> bool:
        return self.num_calls == len(self.updates)

    @property
    def update(self) -> Update:
        """The next one."""
        return self.updates[self.num_calls]

    def content(self) -> np.ndarray | None:
        """The finished latent (C, Y, X); None before. ValueError if it is not finite."""
        if not self.is_finished:
            return None
        if not self.x_t.isfinite().all():
            raise ValueError("the image is not finite: the weights of the run are damaged, or too large for its precision")
        return self.x_t.cpu().numpy()

    def preview(self, codec: Codec) -> tuple[np.ndarray, np.ndarray]:
        """x_t and the predicted x0 as pixels, both (Y, X, channels) uint8."""
        return codec.decode(self.x_t.cpu().numpy()), codec.decode(self.x0.cpu().numpy())

    def advance(self, latents: tuple[Tensor, Tensor]) -> None:
        """Continue with the next x_t and the predicted x0, (C, Y, X) each."""
        self.x_t, self.x0 = latents
        self.step += self.update.ends_step
        self.num_calls += 1
        self._sample_noise()

    def _sample_noise(self) -> None:
        """Not in the forward pass, which is repeated if it fails."""
        adds_noise = not self.is_finished and self.update.noise > 0
        self.noise = torch.randn(self.x_t.shape, generator=self.generator) if adds_noise else None

    def active_branches(self) -> tuple[Branch, ...]:
        """Branches to evaluate at this t: all inside guidance_interval, only the conditional one outside."""
        low, high = self.generation.guidance_interval
        return self.branches if low - T_TOLERANCE <= self.update.t <= high + T_TOLERANCE else self.branches[:1]


class BranchRows:
    """The branches of several images as rows of one forward pass."""

    def __init__(self, branches: Sequence[Sequence[Branch]]):
        self.branches = branches
        # All first branches, then all second ones: slots that were acquired together are then adjacent.
        order = [(k, n) for k in range(max(map(len, branches))) for n in range(len(branches)) if k < len(branches[n])]
        self.images = [n for _, n in order]  # the image of each row
        self.slots = [branches[n][k].slot for k, n in order]
        self.number = {pair: row for row, pair in enumerate(order)}  # of the row of branch k of image n

    def guide(self, predictions: Tensor, rescale: Sequence[float] = ()) -> Tensor:
        """The guided predictions (N, ...) of the images from those of all rows (B, ...). rescale: as for `guide`."""
        # An image with fewer branches repeats its last one: the difference of equal predictions is 0.
        levels = range(max(map(len, self.branches)))
        padded = [[(min(k, len(branches) - 1), n) for n, branches in enumerate(self.branches)] for k in levels]
        rows = torch.tensor([[self.number[pair] for pair in level] for level in padded], device=predictions.device)
        scales = predictions.new_tensor([[self.branches[n][k].scale for k, n in level] for level in padded])  # (K, N)
        shape = len(self.branches), *[1] * (predictions.dim() - 1)
        factor = predictions.new_tensor(rescale).view(shape) if any(rescale) else None
        return guide(predictions[rows].unbind(), [scale.view(shape) for scale in scales], factor)


def begin_image(
    shape: tuple[int, int, int], branches: Sequence[Branch], generation: GenerationConfig, diffusion: DiffusionConfig,
    latent_range: LatentRange, seed: int, device: torch.device,
) -> LatentImageState:  # fmt: skip
    """A latent (C, Y, X) of noise from this seed, generated on the CPU in float32 so that the device does not change it."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(shape, generator=generator).to(device)  # (C, Y, X)
    if generation.t_shift is not None:
        diffusion = replace(diffusion, t_shift=generation.t_shift)
    updates = get_updates(generation.sampler, generation.steps, diffusion)
    latent_range = latent_range if generation.clip_x0 else None
    return LatentImageState(shape[1:], tuple(branches), generation, diffusion, latent_range, updates, generator, x_t)


def denoise(model: Transfusion, cache: Cache, images: Sequence[LatentImageState]) -> list[tuple[Tensor, Tensor]]:
    """One model call for all images, all of one shape: the next x_t and the predicted x0 of each, both (C, Y, X). Samplers,
    steps and scales may differ. Only the positions of the images are computed. Nothing is committed to the cache."""
    rows = BranchRows([image.active_branches() for image in images])
    x_t = torch.stack([image.x_t for image in images])  # (N, C, Y, X)
    t = x_t.new_tensor([image.update.t for image in images])  # (N,)
    predictions = predict(model, cache, rows.slots, x_t[rows.images], t[rows.images])  # (B, C, Y, X)
    guided = rows.guide(predictions, [image.generation.guidance_rescale for image in images])  # (N, C, Y, X)
    return update_latents(images, x_t, t, guided)


def update_latents(
    images: Sequence[LatentImageState], x_t: Tensor, t: Tensor, predictions: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The next x_t and the predicted x0 of each image, from x_t (N, C, Y, X) at t (N,) and the guided predictions."""
    x0 = to_x0_and_noise(x_t, predictions, t, images[0].diffusion).x0  # configs differ only in t_shift, which is part of t
    ranges = [image.latent_range for image in images]
    if any(ranges):  # all have one codec, and so one range
        is_clipped = torch.tensor([latent_range is not None for latent_range in ranges], device=x_t.device)
        x0 = torch.where(is_clipped.view(-1, 1, 1, 1), x0.clamp(*next(filter(None, ranges))), x0)
    x0_previous = torch.stack([image.x_t if image.x0 is None else image.x0 for image in images])  # (its first weight is 0)
    noises = [image.noise for image in images]
    if all(noise is None for noise in noises):
        noise = None
    else:
        zeros = torch.zeros(x_t.shape[1:])
        noise = torch.stack([zeros if noise is None else noise for noise in noises]).to(x_t)  # (N, C, Y, X)
    next_x_t = apply_updates([image.update for image in images], x_t, x0, x0_previous, noise)
    return list(zip(next_x_t, x0, strict=True))


def guide(predictions: Sequence[Tensor], scales: Sequence[Tensor | float], rescale: Tensor | float | None = None) -> Tensor:
    """The guided predictions from those of the branches, (..., C, Y, X) each; the formulas are at the top of this file.
    Scales and rescale are numbers, or one for each image as tensors (N, 1, 1, 1).

    rescale (0 to 1): how far the standard deviation, which guidance increases, is brought back to that of the first branch
    (Lin et al. 2023, 2305.08891, section 3.4).
    """
    guided = predictions[-1]  # (..., C, Y, X)
    for n in reversed(range(len(predictions) - 1)):
        guided = guided + scales[n] * (predictions[n] - predictions[n + 1])
    if rescale is not None:
        cond_std, guided_std = (p.std((-3, -2, -1), correction=0, keepdim=True) for p in (predictions[0], guided))
        ratio = torch.where(guided_std > 0, cond_std / guided_std, 1.0)  # an untrained model predicts 0 everywhere
        guided = guided * (1 + rescale * (ratio - 1))
    return guided


def predict(model: Transfusion, cache: Cache, slots: list[int], x_t: Tensor, t: Tensor) -> Tensor:
    """The model's prediction for latents x_t (B, C, Y, X) at times t (B,), each after the prefix in its slot."""
    rows, columns = (side // model.config.patch_size for side in x_t.shape[2:])
    B, P = len(slots), rows * columns
    view = cache.view(slots, P)
    zeros = torch.zeros(B, P, dtype=torch.int64, device=x_t.device)  # (B, P) tokens to be replaced; also: image 0
    index = torch.arange(B * P, device=x_t.device).view(B, P)
    is_full = model.config.image_attention == "bidirectional" and view.needs_no_mask
    mask = None if is_full else cached_mask(view.lengths, P, zeros, model.config.image_attention)
    positions = rotary_positions(view.position_ids, grid_offsets(rows, columns), model.config)
    empty = zeros.new_zeros(0)
    sides = Sides(text=empty, image=index.view(-1))
    prediction = model.forward_cached(zeros, positions, mask, view, empty, [x_t], [t], [index], sides)
    return prediction.images[0].to(x_t.dtype)
