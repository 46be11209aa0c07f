"""Blocks of convolutions, shared by the U-Net around the transformer and the autoencoder: plain norms, nothing adaptive."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of a norm, at most (Wu and He 2018)
CHANNELS = 8  # in a group, at least: fewer over one pixel would leave hardly anything of it
HEAD = 64  # channels of a head, at most (Nichol and Dhariwal 2021)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, on top of what came in. A time, if it has one, is added to each pixel in between."""

    def __init__(self, before: int, after: int, time_width: int | None = None):
        super().__init__()
        self.first_norm, self.first = group_norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.time = None if time_width is None else nn.Linear(time_width, after, bias=False)
        self.second_norm, self.out = group_norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (N, before, Y, X), time (N, time_width) -> (N, after, Y, X)."""
        inside = self.first(F.silu(self.first_norm(x)))  # (N, after, Y, X)
        if self.time is not None:
            inside = inside + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.out(F.silu(self.second_norm(inside)))


class PixelAttention(nn.Module):
    """Self-attention among all pixels of one image, both ways, on top of what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.size = math.gcd(width, HEAD)
        self.norm = group_norm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        N, C, Y, X = x.shape
        pixels = to_list(self.norm(x))  # (N, Y * X, C)
        q, k, v = (
            layer(pixels).view(N, Y * X, C // self.size, self.size).transpose(1, 2)  # (N, heads, Y * X, size)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, Y * X, C)
        return x + to_grid(self.out(seen), (Y, X))


class Downsample(nn.Module):
    """Half as many rows and columns."""

    def __init__(self, before: int, after: int | None = None):
        super().__init__()
        self.convolution = nn.Conv2d(before, after or before, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)  # (N, after, Y / 2, X / 2)


class Upsample(nn.Module):
    """Twice as many rows and columns: every pixel four times, then a convolution."""

    def __init__(self, before: int, after: int | None = None):
        super().__init__()
        self.convolution = nn.Conv2d(before, after or before, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (N, after, 2 Y, 2 X)


def group_norm(width: int) -> nn.GroupNorm:
    """Over each image by itself. As many groups as a power of two gives, within the bounds above."""
    most = max(1, min(GROUPS, width // CHANNELS))
    return nn.GroupNorm(math.gcd(width, 1 << (most.bit_length() - 1)), width)


def to_list(x: Tensor) -> Tensor:
    """Pixels in reading order: (N, C, Y, X) -> (N, Y * X, C)."""
    return x.flatten(2).transpose(1, 2)


def to_grid(pixels: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_list` for images of shape (Y, X).

    Contiguous: with the channels last in memory, group norm's backward pass on a CPU crashes where its input needs no
    gradient (PyTorch 2.13).
    """
    return pixels.transpose(1, 2).unflatten(2, shape).contiguous()
