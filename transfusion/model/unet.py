"""U-Net patch layers: latents to patch vectors and back, with the transformer between the two halves (section 3)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion.config import ModelConfig
from transfusion.model.conv import Downsample, PixelAttention, ResidualBlock, Upsample, group_norm, to_grid, to_sequence
from transfusion.model.patches import TIME_FEATURES, time_mlp, timestep_embedding

BLOCKS = 2  # residual blocks per resolution in the down half; the up half has one more, for one more skip connection


@dataclass
class Skips:
    """What the down half passes to the up half."""

    time: Tensor  # (N, TIME_FEATURES)
    tensors: list[Tensor]  # (N, width, Y, X) each, from full to lowest resolution
    shape: tuple[int, int]  # (Y, X) of the patches


class UNetPatches(nn.Module):
    """The down half makes one pixel of each p x p patch, with log2 p halvings; the up half is its inverse.

    From the paper: down and up blocks as in Nichol and Dhariwal (2021) and Saharia et al. (2022), with self-attention that
    the transformer's mask does not reach; norms are not adaptive (footnote 7), so t can only be added; 0.27B parameters
    for every transformer size. Table 7 implies 172M (106.1 %) for the smallest transformer, and 71.3, 35.5, 19.3 and 3.8 %
    for the others. LMFusion (2412.15188), which uses the same code, adds that t and skip connections enter the up half.

    The paper leaves the rest open. We take common choices: group norms; two residual blocks per resolution, three in the up
    half; attention between the blocks of the lowest resolution; half the width at each doubling of the resolution, so that
    all resolutions cost about the same and patch_size hardly changes the number of parameters; one time MLP per half; a
    last layer that starts at zero. `ModelConfig.unet_widths` solves the widths for the counts above.
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

    def embed(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Skips]:
        """Latents x_t (N, C, Y, X) at times t (N,) -> patch vectors (N, P, D), and the input of `unembed`."""
        time = timestep_embedding(t).to(x_t.dtype)  # (N, TIME_FEATURES)
        x, skips = self.down(self.proj_in(x_t), time)
        return self.to_patches(to_sequence(x)), Skips(time, skips, x.shape[2:])

    def unembed(self, hidden: Tensor, skips: Skips) -> Tensor:
        """Hidden states of the patches (N, P, D) -> prediction (N, C, Y, X)."""
        x = to_grid(self.from_patches(hidden), skips.shape)  # (N, lowest width, Y / p, X / p)
        x = self.up(x, reversed(skips.tensors), skips.time)  # (N, first width, Y, X)
        return self.proj_out(F.silu(self.proj_out_norm(x)))


class Down(nn.Module):
    """From full to lowest resolution. Every output is also a skip connection to the up half."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.time = time_mlp(widths[-1])
        self.stages = nn.ModuleList(Stage(w, w, BLOCKS, widths) for w in widths)
        self.samplers = nn.ModuleList(Downsample(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        time = F.silu(self.time(time))  # (N, lowest width)
        skips = [x]
        for n, stage in enumerate(self.stages):
            if n:
                x = self.samplers[n - 1](x)
                skips.append(x)
            for step in range(BLOCKS):
                x = stage(x, time, step)
                skips.append(x)
        return x, skips


class Up(nn.Module):
    """From lowest to full resolution. Every block also has one skip connection from the down half as input."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.time = time_mlp(widths[-1])
        self.stages = nn.ModuleList(Stage(2 * w, w, BLOCKS + 1, widths) for w in widths[::-1])
        self.samplers = nn.ModuleList(Upsample(*pair) for pair in pairwise(widths[::-1]))

    def forward(self, x: Tensor, skips: Iterator[Tensor], time: Tensor) -> Tensor:
        time = F.silu(self.time(time))  # (N, lowest width)
        for n, stage in enumerate(self.stages):
            if n:
                x = self.samplers[n - 1](x)
            for step in range(BLOCKS + 1):
                x = stage(torch.cat([x, next(skips)], 1), time, step)
        return x


class Stage(nn.Module):
    """The residual blocks of one resolution. The lowest resolution has attention between every two of them."""

    def __init__(self, in_channels: int, width: int, blocks: int, widths: tuple[int, ...]):
        super().__init__()
        lowest = widths[-1]
        self.blocks = nn.ModuleList(ResidualBlock(in_channels, width, lowest) for _ in range(blocks))
        self.attention = nn.ModuleList(PixelAttention(width) for _ in range(blocks - 1) if width == lowest)

    def forward(self, x: Tensor, time: Tensor, step: int) -> Tensor:
        """Block number `step` and the attention after it, if any. Skip connections are added or taken between steps."""
        x = self.blocks[step](x, time)
        return self.attention[step](x) if step < len(self.attention) else x


def count_unet_macs(config: ModelConfig, shape: tuple[int, int]) -> int:
    """Multiply-accumulates of both halves for one latent of shape (Y, X)."""
    widths, (Y, X), lowest = config.unet_widths, shape, config.unet_widths[-1]
    pixels = [Y * X // 4**n for n in range(len(widths))]
    macs = 2 * 9 * config.latent_channels * widths[0] * pixels[0]  # proj_in, proj_out
    macs += 2 * lowest * config.width * pixels[-1]  # to_patches, from_patches
    macs += 2 * lowest * (TIME_FEATURES + lowest)  # both time MLPs
    for width, area in zip(widths, pixels, strict=True):
        macs += BLOCKS * (2 * 9 * width**2 * area + lowest * width)
        macs += (BLOCKS + 1) * ((3 * 9 + 2) * width**2 * area + lowest * width)  # inputs of two widths, a 1 x 1 shortcut
    for (width, next_width), (area, next_area) in zip(pairwise(widths), pairwise(pixels), strict=True):
        macs += 9 * width * next_width * (next_area + area)
    return macs + (2 * BLOCKS - 1) * (4 * lowest**2 * pixels[-1] + 2 * lowest * pixels[-1] ** 2)
