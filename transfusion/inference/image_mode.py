"""Drawing: one denoising step for all images of one latent shape, each behind its own cached prefix."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfusion.config import DiffusionConfig, GenerationConfig
from transfusion.diffusion import read_prediction
from transfusion.inference.cache import Cache
from transfusion.inference.samplers import Bound, Sampler, Walk, sampler_of
from transfusion.model.mask import cached
from transfusion.model.transfusion import Transfusion
from transfusion.sequence import Batch, ImageGroup


@dataclass
class Drawing:
    """An image on its way from noise to clean, and the two branches that guide it."""

    shape: tuple[int, int]
    slot: int  # the branch that has read the prompt
    free_slot: int | None  # the branch that has read only bos and boi; None without guidance
    guidance_scale: float
    sampler: Sampler
    noisy: Tensor  # (1, C, Y, X)
    t: Tensor  # (1,)
    step: int = 0
    estimate: Tensor | None = None  # what the last prediction says the clean latent is
    clean: Tensor | None = None  # (1, C, Y, X), when it is finished


def begin(
    latent: tuple[int, int, int], slot: int, free_slot: int | None, generation: GenerationConfig,
    diffusion: DiffusionConfig, bound: Bound, seed: int, device: torch.device,
) -> Drawing:  # fmt: skip
    """An image of pure noise, (C, Y, X), drawn on the CPU from its own seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((1, *latent), generator=generator).to(device)
    walk = Walk(generation.steps, diffusion, bound if generation.clip_clean else None, generator)
    sampler = sampler_of(generation.sampler, diffusion)(noise, walk)
    noisy, t = next(sampler)
    return Drawing(latent[1:], slot, free_slot, generation.guidance_scale, sampler, noisy, t)


def denoise(model: Transfusion, cache: Cache, drawings: Sequence[Drawing], diffusion: DiffusionConfig) -> None:
    """One step of every drawing, all of one shape: both branches of all of them in one forward pass.

    Only the images' own positions are computed; the cache holds the rest and keeps nothing of the step.
    """
    guided = [drawing for drawing in drawings if drawing.free_slot is not None]
    noisy = torch.cat([drawing.noisy for drawing in (*drawings, *guided)])  # (B, C, Y, X)
    t = torch.cat([drawing.t for drawing in (*drawings, *guided)])  # (B,)
    slots = [drawing.slot for drawing in drawings] + [drawing.free_slot for drawing in guided]
    said = predict(model, cache, slots, noisy, t)
    free = dict(zip(map(id, guided), said[len(drawings) :], strict=True))
    for drawing, prediction in zip(drawings, said, strict=False):
        if id(drawing) in free:
            without = free[id(drawing)]
            prediction = without + drawing.guidance_scale * (prediction - without)
        drawing.step += 1
        drawing.estimate = read_prediction(drawing.noisy, prediction[None], drawing.t, diffusion).clean
        try:
            drawing.noisy, drawing.t = drawing.sampler.send(prediction[None])
        except StopIteration as finished:
            drawing.clean = finished.value


def predict(model: Transfusion, cache: Cache, slots: list[int], noisy: Tensor, t: Tensor) -> Tensor:
    """What the model says of these noisy latents (B, C, Y, X), each seen behind its slot's prefix."""
    B, patches = len(slots), noisy.shape[2] * noisy.shape[3] // model.config.patch_size**2
    view = cache.view(slots, patches)
    place = torch.zeros(B, patches, dtype=torch.int64, device=noisy.device)  # (B, P) one image, no document cut
    index = torch.arange(B * patches, device=noisy.device).view(B, patches)
    nothing = place.new_zeros(0)
    group = ImageGroup(noisy, index, t, nothing, 0, [], [], [])
    batch = Batch(place, view.place, place, place, nothing, nothing, [group], B * patches)
    mask = cached(view.lengths, patches, place, model.config.image_attention)
    return model(batch, [noisy], [t], mask, view).images[0]
