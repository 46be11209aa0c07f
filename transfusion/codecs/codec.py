"""The interface of codecs, and reading and writing them as files."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from transfusion.codecs.autoencoder import Autoencoder
from transfusion.codecs.pixels import BlockPCA, Pixels
from transfusion.codecs.pretrained import Pretrained
from transfusion.codecs.vq import VQ


class Codec(Protocol):
    """Converts pixels to a latent whose channels have mean 0 and standard deviation 1, and back."""

    kind: str
    channels: int  # C of a latent
    downsampling: int  # pixels along one side of a latent pixel
    image_channels: int  # 1 or 3
    low: np.ndarray  # (C,) the smallest value of each channel over the images of the statistics
    high: np.ndarray  # (C,) the largest

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, channels) uint8 -> latent (C, Y / f, X / f) float32, f = downsampling. ValueError when f does not fit."""
        ...

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y, X) -> (Y * f, X * f, image_channels) uint8."""
        ...

    def tensors(self) -> dict[str, np.ndarray]:
        """The codec's content, for `codec_from_tensors`."""
        ...


def encode_many(codec: Codec | VQ, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The latent (for VQ the codes) of each image, of any sizes. A network encodes images of one size in batches."""
    if not isinstance(codec, Autoencoder | Pretrained | VQ):
        return [codec.encode(image) for image in images]
    indices_by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        indices_by_shape.setdefault(image.shape, []).append(index)
    latents: list[np.ndarray] = [np.empty(0)] * len(images)
    for indices in indices_by_shape.values():
        for index, latent in zip(indices, codec.encode_many([images[i] for i in indices]), strict=True):
            latents[index] = latent
    return latents


def fit_codec(kind: str, images: Sequence[np.ndarray], block: int, components: int) -> Codec:
    """A codec without a network, with the statistics of these images. ValueError when the images do not fit it."""
    match kind:
        case Pixels.kind:
            return Pixels.fit(images)
        case BlockPCA.kind:
            return BlockPCA.fit(images, block, components)
        case _:
            raise ValueError(f"unknown codec {kind!r}; use {Pixels.kind} or {BlockPCA.kind}")


def codec_from_tensors(kind: str, tensors: dict[str, np.ndarray]) -> Codec | VQ:
    """The inverse of `codec.tensors()`. ValueError when they do not fit a codec of this kind."""
    try:
        match kind:
            case Pixels.kind:
                return Pixels(**tensors)
            case BlockPCA.kind:
                return BlockPCA(**tensors)
            case Autoencoder.kind:
                return Autoencoder.from_tensors(tensors)
            case VQ.kind:
                return VQ.from_tensors(tensors)
            case Pretrained.kind:
                return Pretrained.from_tensors(tensors)
            case _:
                raise ValueError(f"unknown codec kind {kind}")
    except KeyError as error:
        raise ValueError(f"a codec of kind {kind} needs {error}, which is missing") from None
    except TypeError:
        raise ValueError(f"not a codec of kind {kind}: its tensors are {', '.join(tensors)}") from None


def move_to(codec: Codec | VQ, device: str | torch.device) -> None:
    """Move the network of a codec, if it has one, to a device, in place."""
    if isinstance(codec, Autoencoder | VQ | Pretrained):
        codec.network.to(device)


def codec_to_bytes(codec: Codec | VQ) -> bytes:
    """`tensors()` as the content of a safetensors file."""
    return to_safetensors({name: value.copy() for name, value in codec.tensors().items()})


def codec_from_bytes(kind: str, content: bytes) -> Codec | VQ:
    """The inverse of `codec_to_bytes`. ValueError when it is not a codec of this kind."""
    try:
        return codec_from_tensors(kind, from_safetensors(content))
    except SafetensorError as error:
        raise ValueError(f"not a codec of kind {kind}: {error}") from None
