"""Latents to patch vectors and back: the only layers that are specific to images (section 3)."""

import math

import torch
from torch import Tensor, nn

from transfusion.config import ModelConfig

TIME_FEATURES = 256  # width of the timestep embedding, before the time MLP


class LinearPatches(nn.Module):
    """One linear layer in, one out. The time features are added to each patch vector after the layer in. A 256 -> D -> D
    time MLP and no adaptive norms, as footnote 6 and the parameter counts of Table 7 imply."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj_in = nn.Linear(config.patch_width, config.width)
        self.proj_out = nn.Linear(config.width, config.patch_width)
        self.time = time_mlp(config.width)

    def embed(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Latents x_t (N, C, Y, X) at times t (N,) -> patch vectors (N, P, D), and for `unembed` the shape (Y, X)."""
        patches = self.proj_in(patchify(x_t, self.patch_size))  # (N, P, D)
        return patches + self.time(timestep_embedding(t).to(x_t.dtype))[:, None], x_t.shape[2:]

    def unembed(self, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        """Hidden states of the patches (N, P, D) -> prediction (N, C, Y, X)."""
        return unpatchify(self.proj_out(hidden), shape, self.patch_size)


def patchify(latent: Tensor, p: int) -> Tensor:
    """(N, C, Y, X) -> (N, P, C * p * p), row by row."""
    N, C, Y, X = latent.shape
    return latent.view(N, C, Y // p, p, X // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, shape: tuple[int, int], p: int) -> Tensor:
    """The inverse of `patchify` for a latent of shape (Y, X)."""
    N, (Y, X), C = len(patches), shape, patches.shape[2] // p**2
    return patches.view(N, Y // p, X // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(N, C, Y, X)


def time_mlp(width: int) -> nn.Sequential:
    """Timestep embedding (N, 256) -> features of this width, which are added to the hidden states."""
    return nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))


def timestep_embedding(t: Tensor) -> Tensor:
    """cos and sin of 1000 t with periods from 2 pi to 2 pi * 10,000 steps: (N,) -> (N, 256)."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = 1000 * t.float()[:, None] * frequencies  # (N, 128)
    return torch.cat([angles.cos(), angles.sin()], 1)
