"""Codecs without a network: the normalised pixels, or the principal components of blocks of pixels.

Both normalise every channel to mean 0 and standard deviation 1 over the images that they were fitted on; an almost constant
channel gets a smaller standard deviation. They store each channel's range there, to which samplers clip.
"""

from collections.abc import Sequence

import numpy as np

MIN_STD = 1.0  # grey levels; an almost constant channel is not divided by less


class Pixels:
    """One latent pixel per pixel: (Y, X, C) uint8 <-> (C, Y, X) float32."""

    kind = "pixels"

    def __init__(self, mean: np.ndarray, std: np.ndarray, low: np.ndarray, high: np.ndarray):
        self.mean, self.std = mean, std  # (C,) each
        self.low, self.high = low, high  # (C,) the range, in latent units
        self.channels, self.downsampling = len(mean), 1
        self.image_channels = self.channels

    @classmethod
    def fit(cls, images: Sequence[np.ndarray]) -> "Pixels":
        """The codec with the statistics of these images (Y, X, C) uint8, all with the same C."""
        return cls(*_statistics(np.concatenate([p.reshape(-1, p.shape[2]) for p in images]).astype(np.float64)))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, C) uint8 -> latent (C, Y, X) float32."""
        return ((pixels.astype(np.float32) - self.mean) / self.std).transpose(2, 0, 1).astype(np.float32)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y, X) -> (Y, X, C) uint8."""
        return _to_uint8(latent.transpose(1, 2, 0) * self.std + self.mean)

    def tensors(self) -> dict[str, np.ndarray]:
        """The arguments of `__init__`."""
        return {"mean": self.mean, "std": self.std, "low": self.low, "high": self.high}


class BlockPCA:
    """One latent pixel per block x block square of pixels: its first principal components."""

    kind = "block_pca"

    def __init__(
        self, centre: np.ndarray, components: np.ndarray, mean: np.ndarray, std: np.ndarray, low: np.ndarray,
        high: np.ndarray, block: np.ndarray,
    ):  # fmt: skip
        self.centre = centre  # (block * block * image_channels,)
        self.components = components  # (C, block * block * image_channels)
        self.mean, self.std, self.low, self.high = mean, std, low, high  # (C,) each
        self.channels, self.downsampling = len(mean), int(block)
        self.image_channels = components.shape[1] // self.downsampling**2

    @classmethod
    def fit(cls, images: Sequence[np.ndarray], block: int, components: int) -> "BlockPCA":
        """The components of the blocks of these images (Y, X, channels) uint8: at most as many as a block has values.
        ValueError when blocks do not fit."""
        blocks = np.concatenate([_to_blocks(image, block).reshape(-1, block * block * image.shape[2])
                                 for image in images]).astype(np.float64)  # fmt: skip
        centre = blocks.mean(0)
        covariance = np.cov(blocks - centre, rowvar=False, ddof=min(1, len(blocks) - 1))  # of one block: 0
        _, vectors = np.linalg.eigh(np.atleast_2d(covariance))
        basis = vectors[:, ::-1][:, :components].T  # (C, block * block * image_channels), largest variance first
        basis *= np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])[:, None]  # the same sign on every machine
        return cls(centre, basis, *_statistics((blocks - centre) @ basis.T), np.array(block))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, channels) uint8 -> latent (C, Y / block, X / block) float32."""
        latent = (_to_blocks(pixels, self.downsampling) - self.centre) @ self.components.T  # (Y / block, X / block, C)
        return ((latent - self.mean) / self.std).transpose(2, 0, 1).astype(np.float32)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y / block, X / block) -> (Y, X, channels) uint8."""
        blocks = (latent.transpose(1, 2, 0) * self.std + self.mean) @ self.components + self.centre
        Y, X, b = *latent.shape[1:], self.downsampling
        return _to_uint8(blocks.reshape(Y, X, b, b, -1).transpose(0, 2, 1, 3, 4).reshape(Y * b, X * b, -1))

    def tensors(self) -> dict[str, np.ndarray]:
        """The arguments of `__init__`."""
        return {"centre": self.centre, "components": self.components, "mean": self.mean, "std": self.std,
                "low": self.low, "high": self.high, "block": np.array(self.downsampling)}  # fmt: skip


def _statistics(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """(n, C) -> mean, standard deviation, and the normalised minimum and maximum, (C,) each."""
    mean, std = values.mean(0), np.maximum(values.std(0), MIN_STD)
    return mean, std, (values.min(0) - mean) / std, (values.max(0) - mean) / std


def _to_blocks(pixels: np.ndarray, block: int) -> np.ndarray:
    Y, X, image_channels = pixels.shape
    if Y % block or X % block:
        raise ValueError(f"an image of {X}x{Y} pixels cannot be divided into blocks of {block}x{block}; use another size")
    return pixels.reshape(Y // block, block, X // block, block, image_channels).transpose(0, 2, 1, 3, 4).reshape(
        Y // block, X // block, -1)  # fmt: skip


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
