"""Convolution blocks of the U-Net patch layers and of the autoencoder. Group norms are plain, not adaptive."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

MAX_GROUPS = 32  # of a group norm (Wu and He 2018)
MIN_GROUP_CHANNELS = 8  # with fewer, the norm of an image of one pixel would remove most of its information
MAX_HEAD_DIM = 64  # channels of an attention head (Nichol and Dhariwal 2021)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to the input. Time features, if any, are added to each pixel in between."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int | None = None):
        super().__init__()
        self.first_norm, self.first = group_norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = None if time_width is None else nn.Linear(time_width, out_channels, bias=False)
        self.second_norm, self.out = group_norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (N, in_channels, Y, X), time (N, time_width) -> (N, out_channels, Y, X)."""
        hidden = self.first(F.silu(self.first_norm(x)))  # (N, out_channels, Y, X)
        if self.time is not None:
            hidden = hidden + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.out(F.silu(self.second_norm(hidden)))


class PixelAttention(nn.Module):
    """x + bidirectional self-attention among all pixels of an image."""

    def __init__(self, width: int):
        super().__init__()
        self.head_dim = math.gcd(width, MAX_HEAD_DIM)
        self.norm = group_norm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        N, C, Y, X = x.shape
        pixels = to_sequence(self.norm(x))  # (N, Y * X, C)
        q, k, v = (
            layer(pixels).view(N, Y * X, C // self.head_dim, self.head_dim).transpose(1, 2)  # (N, heads, Y * X, h)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, Y * X, C)
        return x + to_grid(self.out(attended), (Y, X))


class Downsample(nn.Module):
    """Halves height and width with a convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int | None = None):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels or in_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)  # (N, out_channels, Y / 2, X / 2)


class Upsample(nn.Module):
    """Doubles height and width: nearest-neighbour interpolation, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int | None = None):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels or in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (N, out_channels, 2 Y, 2 X)


def group_norm(width: int) -> nn.GroupNorm:
    """The number of groups is the largest power of two that divides `width` and is within the bounds above."""
    limit = max(1, min(MAX_GROUPS, width // MIN_GROUP_CHANNELS))
    return nn.GroupNorm(math.gcd(width, 1 << (limit.bit_length() - 1)), width)


def to_sequence(x: Tensor) -> Tensor:
    """Pixels row by row: (N, C, Y, X) -> (N, Y * X, C)."""
    return x.flatten(2).transpose(1, 2)


def to_grid(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_sequence` for images of shape (Y, X). The result is contiguous: with channels last in memory,
    PyTorch 2.13 crashes on a CPU in the backward pass of a group norm whose input needs no gradient."""
    return pixels.transpose(1, 2).unflatten(2, shape).contiguous()
