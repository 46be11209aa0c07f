"""Drawing: one denoising step for all images of one latent shape, each behind its own cached prefixes.

Guidance sees an image in several branches: behind all that its row has read, behind less, behind nothing but bos and boi.
What a branch says beyond the next one, which knows less, counts `scale` times:

    nothing + image_scale (images - nothing) + scale (everything - images)        InstructPix2Pix (2211.09800), section 3.2.1
    nothing + scale (everything - nothing)                                        classifier-free guidance (2207.12598)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from transfusion.codecs.codec import Codec
from transfusion.config import DiffusionConfig, GenerationConfig
from transfusion.diffusion import read_prediction
from transfusion.inference.cache import Cache
from transfusion.inference.samplers import Bound, Sampler, Walk, sampler_of
from transfusion.model.mask import cached
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Batch, ImageGroup

EDGE = 1e-6  # t is float32: 0.8 of a walk must lie in an interval that ends at 0.8


@dataclass(frozen=True)
class Branch:
    """What one slot of the cache has read, and how often that counts which it knows beyond the next branch."""

    slot: int
    scale: float = 1.0


@dataclass
class Drawing:
    """An image on its way from noise to clean, and the branches that guide it."""

    shape: tuple[int, int]
    branches: tuple[Branch, ...]  # what has read everything comes first, then ever less
    generation: GenerationConfig
    walk: Walk
    sampler: Sampler
    noisy: Tensor  # (1, C, Y, X)
    t: Tensor  # (1,)
    estimate: Tensor | None = None  # what the last prediction says the clean latent is
    clean: Tensor | None = None  # (1, C, Y, X), when it is finished

    kept = 1  # positions that the branches hold of the image, boi included

    @property
    def step(self) -> int:
        """Denoising steps that are done. A sampler may ask more than once in a step: between, `noisy` is only a trial."""
        return self.walk.step

    def content(self) -> np.ndarray | None:
        """The clean latent (C, Y, X); None while it is not finished."""
        return None if self.clean is None else self.clean[0].cpu().numpy()

    def preview(self, codec: Codec) -> tuple[np.ndarray, np.ndarray]:
        """As noisy as it still is, and what the model takes it to be, both (Y, X, colours) uint8."""
        noisy = self.noisy if self.clean is None else self.clean
        return codec.decode(noisy[0].cpu().numpy()), codec.decode(self.estimate[0].cpu().numpy())

    def heard(self) -> tuple[Branch, ...]:
        """The branches that count at this t: outside the interval of guidance, only the one that has read everything."""
        low, high = self.generation.guidance_interval
        if (low, high) == (0, 1) or low - EDGE <= self.t.item() <= high + EDGE:  # asking for t would wait for the device
            return self.branches
        return self.branches[:1]


def begin(
    latent: tuple[int, int, int], branches: Sequence[Branch], generation: GenerationConfig, diffusion: DiffusionConfig,
    bound: Bound, seed: int, device: torch.device,
) -> Drawing:  # fmt: skip
    """An image of pure noise, (C, Y, X), drawn on the CPU from its own seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, *latent), generator=generator).to(device)  # (1, C, Y, X)
    if generation.shift is not None:
        diffusion = replace(diffusion, shift=generation.shift)
    walk = Walk(generation.steps, diffusion, bound if generation.clip_clean else None, generator)
    sampler = sampler_of(generation.sampler, diffusion)(noise, walk)
    noisy, t = next(sampler)
    return Drawing(latent[1:], tuple(branches), generation, walk, sampler, noisy, t)


def denoise(model: Transfusion, cache: Cache, drawings: Sequence[Drawing], diffusion: DiffusionConfig) -> None:
    """Ask once for every drawing, all of one shape: all branches of all of them in one forward pass.

    Only the images' own positions are computed; the cache holds the rest and keeps nothing of the step.
    """
    heard = [drawing.heard() for drawing in drawings]
    # First branches first, then all second ones: slots that were taken together lie together.
    order = [(n, k) for k in range(max(map(len, heard))) for n, branches in enumerate(heard) if k < len(branches)]
    noisy = torch.cat([drawings[n].noisy for n, _ in order])  # (B, C, Y, X)
    t = torch.cat([drawings[n].t for n, _ in order])  # (B,)
    said = predict(model, cache, [heard[n][k].slot for n, k in order], noisy, t)  # (B, C, Y, X)
    by_branch = dict(zip(order, said, strict=True))
    for n, (drawing, branches) in enumerate(zip(drawings, heard, strict=True)):
        predictions = [by_branch[n, k] for k in range(len(branches))]
        prediction = guide(predictions, [branch.scale for branch in branches], drawing.generation.guidance_rescale)[None]
        drawing.estimate = read_prediction(drawing.noisy, prediction, drawing.t, diffusion).clean
        try:
            drawing.noisy, drawing.t = drawing.sampler.send(prediction)
        except StopIteration as finished:
            drawing.clean = finished.value


def guide(predictions: Sequence[Tensor], scales: Sequence[float], rescale: float = 0.0) -> Tensor:
    """What the branches say together, (C, Y, X) each: see the head of this file.

    rescale: as far (0 to 1) the deviation of the guided prediction is brought back to that of the first branch, which
    guidance exaggerates (Lin et al. 2023, 2305.08891, section 3.4).
    """
    guided = predictions[-1]  # (C, Y, X)
    for n in reversed(range(len(predictions) - 1)):
        guided = guided + scales[n] * (predictions[n] - predictions[n + 1])
    if rescale and len(predictions) > 1:
        own, found = (said.std(correction=0) for said in (predictions[0], guided))
        ratio = torch.where(found > 0, own / found, 1.0)  # () a new model says 0 everywhere
        guided = guided * (1 + rescale * (ratio - 1))
    return guided


def predict(model: Transfusion, cache: Cache, slots: list[int], noisy: Tensor, t: Tensor) -> Tensor:
    """What the model says of these noisy latents (B, C, Y, X), each seen behind its slot's prefix."""
    B, patches = len(slots), noisy.shape[2] * noisy.shape[3] // model.config.patch_size**2
    view = cache.view(slots, patches)
    place = torch.zeros(B, patches, dtype=torch.int64, device=noisy.device)  # (B, P) one image, no document cut
    index = torch.arange(B * patches, device=noisy.device).view(B, patches)
    nothing = place.new_zeros(0)
    group = ImageGroup(noisy, index, t, nothing, 0, [], [], [])
    batch = Batch(place, view.place, place, place, nothing, nothing, 0, 0, [group], B * patches, [])
    mask = cached(view.lengths, patches, place, model.config.image_attention)
    return model(batch, [noisy], [t], mask, view).images[0].to(noisy.dtype)
