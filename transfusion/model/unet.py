"""Latents to patch vectors and back through the two halves of a U-Net, with the transformer between them (section 3)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.config import ModelConfig
from transfusion.model.conv import Downsample, PixelAttention, ResidualBlock, Upsample, group_norm, to_grid, to_list
from transfusion.model.patches import FREQUENCIES, time_mlp, timestep_embedding

BLOCKS = 2  # residual blocks of the way down, at each resolution; the way up has one more: one for each skip connection


@dataclass
class Skips:
    """What the way down leaves for the way up."""

    time: Tensor  # (N, FREQUENCIES)
    skips: list[Tensor]  # (N, width, Y, X) each, from the full resolution to the lowest
    shape: tuple[int, int]  # (Y, X) of the patches


class UNetPatches(nn.Module):
    """The way down makes one pixel of each patch, p = 2, 4, 8 with 1, 2, 3 halvings; the way up undoes it.

    The paper says: down and up blocks as in Nichol and Dhariwal (2021) and Saharia et al. (2022), with self-attention of
    their own that no mask of the transformer reaches; plain norms where those have adaptive ones (footnote 7), so that t
    can only be added; 0.27B parameters, whatever the transformer. Its Table 7 counts 106.1 % of the smallest transformer,
    172M, and 71.3, 35.5, 19.3 and 3.8 % of the others. LMFusion (2412.15188), of the same code, adds that t and skip
    connections enter the way up.

    The rest is our choice, the usual one: group norms, two residual blocks per resolution and a third on the way up,
    attention between the blocks of the lowest, half the width after each doubling of the resolution (so that all cost
    about the same and patch_size hardly changes the number of parameters), a time MLP for each way, and a last layer that
    starts at zero. Widths are solved for the counts above: see `ModelConfig.unet_widths`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        widths = config.unet_widths
        self.proj_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.down = Down(widths)
        self.to_patches = nn.Linear(widths[-1], config.width)
        self.from_patches = nn.Linear(config.width, widths[-1])
        self.up = Up(widths)
        self.proj_out_norm = group_norm(widths[0])
        self.proj_out = nn.Conv2d(widths[0], config.latent_channels, 3, padding=1)

    def embed(self, noisy: Tensor, t: Tensor) -> tuple[Tensor, Skips]:
        """Noisy latents (N, C, Y, X) at times t (N,) -> patch vectors (N, P, D), and what `leave` needs."""
        time = timestep_embedding(t).to(noisy.dtype)  # (N, FREQUENCIES)
        x, skips = self.down(self.proj_in(noisy), time)
        return self.to_patches(to_list(x)), Skips(time, skips, x.shape[2:])

    def unembed(self, hidden: Tensor, carried: Skips) -> Tensor:
        """What the transformer made of the patches (N, P, D) -> a prediction (N, C, Y, X)."""
        x = to_grid(self.from_patches(hidden), carried.shape)  # (N, lowest width, Y / p, X / p)
        x = self.up(x, reversed(carried.skips), carried.time)  # (N, first width, Y, X)
        return self.proj_out(F.silu(self.proj_out_norm(x)))


class Down(nn.Module):
    """From the full resolution to the lowest; every block's output is kept for the way up."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.time = time_mlp(widths[-1])
        self.stages = nn.ModuleList(Stage(w, w, BLOCKS, widths) for w in widths)
        self.samplers = nn.ModuleList(Downsample(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        time = F.silu(self.time(time))  # (N, lowest width)
        kept = [x]
        for n, stage in enumerate(self.stages):
            if n:
                x = self.samplers[n - 1](x)
                kept.append(x)
            for step in range(BLOCKS):
                x = stage(x, time, step)
                kept.append(x)
        return x, kept


class Up(nn.Module):
    """From the lowest resolution to the full one; every block also reads what its counterpart on the way down made."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.time = time_mlp(widths[-1])
        self.stages = nn.ModuleList(Stage(2 * w, w, BLOCKS + 1, widths) for w in widths[::-1])
        self.samplers = nn.ModuleList(Upsample(*pair) for pair in pairwise(widths[::-1]))

    def forward(self, x: Tensor, kept: Iterator[Tensor], time: Tensor) -> Tensor:
        time = F.silu(self.time(time))  # (N, lowest width)
        for n, stage in enumerate(self.stages):
            if n:
                x = self.samplers[n - 1](x)
            for step in range(BLOCKS + 1):
                x = stage(torch.cat([x, next(kept)], 1), time, step)
        return x


class Stage(nn.Module):
    """The residual blocks of one resolution; at the lowest, attention between each two of them."""

    def __init__(self, before: int, width: int, blocks: int, widths: tuple[int, ...]):
        super().__init__()
        lowest = widths[-1]
        self.blocks = nn.ModuleList(ResidualBlock(before, width, lowest) for _ in range(blocks))
        self.attention = nn.ModuleList(PixelAttention(width) for _ in range(blocks - 1) if width == lowest)

    def forward(self, x: Tensor, time: Tensor, step: int) -> Tensor:
        """Through this block, and the attention behind it if there is one: the skip connections meet between the steps."""
        x = self.blocks[step](x, time)
        return self.attention[step](x) if step < len(self.attention) else x


def unet_products(config: ModelConfig, shape: tuple[int, int]) -> int:
    """Multiplications of the products of one image of shape (Y, X), there and back."""
    widths, (Y, X), lowest = config.unet_widths, shape, config.unet_widths[-1]
    pixels = [Y * X // 4**n for n in range(len(widths))]
    found = 2 * 9 * config.latent_channels * widths[0] * pixels[0]  # inward, outward
    found += 2 * lowest * config.width * pixels[-1]  # to and from the transformer
    found += 2 * lowest * (FREQUENCIES + lowest)  # both time MLPs
    for width, area in zip(widths, pixels, strict=True):
        found += BLOCKS * (2 * 9 * width**2 * area + lowest * width)
        found += (BLOCKS + 1) * ((3 * 9 + 2) * width**2 * area + lowest * width)  # two widths in, a 1 x 1 shortcut
    for (above, below), (fine, coarse) in zip(pairwise(widths), pairwise(pixels), strict=True):
        found += 9 * above * below * (coarse + fine)
    return found + (2 * BLOCKS - 1) * (4 * lowest**2 * pixels[-1] + 2 * lowest * pixels[-1] ** 2)
