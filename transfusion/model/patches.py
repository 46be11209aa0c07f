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
        self.proj_in = nn.Linear(config.patch_width, config.width)
        self.proj_out = nn.Linear(config.width, config.patch_width)
        self.time = time_mlp(config.width)

    def embed(self, noisy: Tensor, t: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Noisy latents (N, C, Y, X) at times t (N,) -> patch vectors (N, P, D), and what `leave` needs: their (Y, X)."""
        patches = self.proj_in(patchify(noisy, self.patch_size))  # (N, P, D)
        return patches + self.time(timestep_embedding(t).to(noisy.dtype))[:, None], noisy.shape[2:]

    def unembed(self, hidden: Tensor, carried: tuple[int, int]) -> Tensor:
        """What the transformer made of the patches (N, P, D) -> a prediction (N, C, Y, X)."""
        return unpatchify(self.proj_out(hidden), carried, self.patch_size)


def patchify(latent: Tensor, p: int) -> Tensor:
    """(N, C, Y, X) -> (N, P, C * p * p), left to right, top to bottom."""
    N, C, Y, X = latent.shape
    return latent.view(N, C, Y // p, p, X // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, shape: tuple[int, int], p: int) -> Tensor:
    """The inverse of `patchify` for a latent of shape (Y, X)."""
    N, (Y, X), C = len(patches), shape, patches.shape[2] // p**2
    return patches.view(N, Y // p, X // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(N, C, Y, X)


def time_mlp(width: int) -> nn.Sequential:
    """What makes of a described time (N, 256) what is added to numbers of this width."""
    return nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))


def timestep_embedding(t: Tensor) -> Tensor:
    """Sines and cosines of 1000 t, from one turn per 2 pi steps to one per 2 pi * 10,000: (N,) -> (N, 256)."""
    half = FREQUENCIES // 2
    frequency = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)
