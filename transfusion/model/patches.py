"""Latents to patch vectors and back: the only layers that images do not share with text (section 3)."""

import math

import torch
from torch import Tensor, nn

from transfusion.config import ModelConfig

FREQUENCIES = 256  # numbers that describe t before the time MLP


class LinearPatches(nn.Module):
    """One linear layer in, one out. t is added to each patch after the layer in; the layer out never sees it.

    Footnote 6 and Table 7's parameter counts: a 256 -> D -> D time MLP and nothing adaptive anywhere.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.inward = nn.Linear(config.patch_width, config.width)
        self.outward = nn.Linear(config.width, config.patch_width)
        self.time = nn.Sequential(
            nn.Linear(FREQUENCIES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )

    def enter(self, noisy: Tensor, t: Tensor) -> Tensor:
        """Noisy latents (N, C, Y, X) at times t (N,) -> patch vectors (N, P, D)."""
        return self.inward(patchify(noisy, self.patch_size)) + self.time(describe_time(t).to(noisy.dtype))[:, None]

    def leave(self, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        """What the transformer made of the patches (N, P, D) -> a prediction (N, C, Y, X) of this latent shape (Y, X)."""
        return unpatchify(self.outward(hidden), shape, self.patch_size)


def patchify(latent: Tensor, p: int) -> Tensor:
    """(N, C, Y, X) -> (N, P, C * p * p), left to right, top to bottom."""
    N, C, Y, X = latent.shape
    return latent.view(N, C, Y // p, p, X // p, p).permute(0, 2, 4, 1, 3, 5).reshape(N, -1, C * p * p)


def unpatchify(patches: Tensor, shape: tuple[int, int], p: int) -> Tensor:
    """The inverse of `patchify` for a latent of shape (Y, X)."""
    N, (Y, X) = len(patches), shape
    return patches.view(N, Y // p, X // p, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(N, -1, Y, X)


def describe_time(t: Tensor) -> Tensor:
    """Sines and cosines of 1000 t, from one turn per 2 pi steps to one per 2 pi * 10,000: (N,) -> (N, 256)."""
    half = FREQUENCIES // 2
    frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)
