"""Pixels to latents without training: as they are, or as the principal components of their blocks.

Both give every channel mean 0 and deviation 1 over the documents they were fitted on (less if it hardly changes), and
know the smallest and largest value each channel took there: the bound that samplers clip to.
"""

from collections.abc import Sequence

import numpy as np

FLOOR = 1.0  # grey levels: a channel that hardly changed where it was fitted is not blown up where it does


class Pixels:
    """The picture itself, one latent pixel per pixel: (Y, X, C) uint8 <-> (C, Y, X) float32."""

    kind = "pixels"

    def __init__(self, mean: np.ndarray, std: np.ndarray, low: np.ndarray, high: np.ndarray):
        self.mean, self.std = mean, std  # (C,) each
        self.low, self.high = low, high  # (C,) the bound, in latent units
        self.channels, self.downsampling = len(mean), 1
        self.image_channels = self.channels

    @classmethod
    def fit(cls, pictures: Sequence[np.ndarray]) -> "Pixels":
        """Statistics of these pictures, all (Y, X, C) uint8 of one C."""
        return cls(*_statistics(np.concatenate([p.reshape(-1, p.shape[2]) for p in pictures]).astype(np.float64)))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, C) uint8 -> latent (C, Y, X) float32."""
        return ((pixels.astype(np.float32) - self.mean) / self.std).transpose(2, 0, 1).astype(np.float32)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y, X) -> (Y, X, C) uint8."""
        return _to_bytes(latent.transpose(1, 2, 0) * self.std + self.mean)

    def tensors(self) -> dict[str, np.ndarray]:
        """All that `__init__` needs."""
        return {"mean": self.mean, "std": self.std, "low": self.low, "high": self.high}


class BlockPCA:
    """Each block x block square of pixels as its first principal components: one latent pixel per block."""

    kind = "block_pca"

    def __init__(
        self, centre: np.ndarray, components: np.ndarray, mean: np.ndarray, std: np.ndarray, low: np.ndarray,
        high: np.ndarray, block: np.ndarray,
    ):  # fmt: skip
        self.centre, self.components = (
            centre,
            components,
        )  # (block * block * image_channels,), (C, block * block * image_channels)
        self.mean, self.std, self.low, self.high = mean, std, low, high  # (C,) each
        self.channels, self.downsampling = len(mean), int(block)
        self.image_channels = components.shape[1] // self.downsampling**2

    @classmethod
    def fit(cls, pictures: Sequence[np.ndarray], block: int, components: int) -> "BlockPCA":
        """The components of these pictures' blocks, all (Y, X, channels) uint8 with sides that blocks divide."""
        blocks = np.concatenate([_to_blocks(picture, block).reshape(-1, block * block * picture.shape[2])
                                 for picture in pictures]).astype(np.float64)  # fmt: skip
        centre = blocks.mean(0)
        _, vectors = np.linalg.eigh(np.cov(blocks - centre, rowvar=False))
        basis = vectors[:, ::-1][:, :components].T  # (C, block * block * image_channels), largest variance first
        basis *= np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])[:, None]  # one sign on every machine
        return cls(centre, basis, *_statistics((blocks - centre) @ basis.T), np.array(block))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, channels) uint8 -> latent (C, Y / block, X / block) float32."""
        found = (_to_blocks(pixels, self.downsampling) - self.centre) @ self.components.T  # (Y / block, X / block, C)
        return ((found - self.mean) / self.std).transpose(2, 0, 1).astype(np.float32)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y / block, X / block) -> (Y, X, channels) uint8."""
        blocks = (latent.transpose(1, 2, 0) * self.std + self.mean) @ self.components + self.centre
        Y, X, b = *latent.shape[1:], self.downsampling
        return _to_bytes(blocks.reshape(Y, X, b, b, -1).transpose(0, 2, 1, 3, 4).reshape(Y * b, X * b, -1))

    def tensors(self) -> dict[str, np.ndarray]:
        """All that `__init__` needs."""
        return {"centre": self.centre, "components": self.components, "mean": self.mean, "std": self.std,
                "low": self.low, "high": self.high, "block": np.array(self.downsampling)}  # fmt: skip


def _statistics(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """(n, C) -> mean, deviation, and the bound in units of both, (C,) each."""
    mean, deviation = values.mean(0), np.maximum(values.std(0), FLOOR)
    return mean, deviation, (values.min(0) - mean) / deviation, (values.max(0) - mean) / deviation


def _to_blocks(pixels: np.ndarray, block: int) -> np.ndarray:
    Y, X, image_channels = pixels.shape
    if Y % block or X % block:
        raise ValueError(f"a picture of {X}x{Y} pixels cannot be cut into blocks of {block}x{block}")
    return pixels.reshape(Y // block, block, X // block, block, image_channels).transpose(0, 2, 1, 3, 4).reshape(
        Y // block, X // block, -1)  # fmt: skip


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
