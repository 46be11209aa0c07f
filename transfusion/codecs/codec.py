"""What every codec can do, and the way of each from and to a file."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from transfusion.codecs.autoencoder import Autoencoder
from transfusion.codecs.pixels import BlockPCA, Pixels
from transfusion.codecs.pretrained import Pretrained
from transfusion.codecs.vq import VQ


class Codec(Protocol):
    """Pixels to a latent whose channels have mean 0 and deviation 1, and back."""

    kind: str
    channels: int  # C of a latent
    downsampling: int  # pixels along one side of a latent pixel
    image_channels: int  # of a picture, 1 or 3
    low: np.ndarray  # (C,) the smallest value of each channel where the statistics were taken
    high: np.ndarray  # (C,) the largest

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(Y, X, channels) uint8 -> latent (C, Y / scale, X / scale) float32. ValueError when the size does not suit."""
        ...

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """latent (C, Y, X) -> (Y * scale, X * scale, image_channels) uint8."""
        ...

    def tensors(self) -> dict[str, np.ndarray]:
        """All that `codec_of` needs to make it again."""
        ...


def encode_many(codec: Codec | VQ, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The latent (or, of VQ, the codes) of each picture, whatever their sizes; a network sees all of one size together."""
    if not isinstance(codec, Autoencoder | Pretrained | VQ):
        return [codec.encode(picture) for picture in pictures]
    of_size: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        of_size.setdefault(picture.shape, []).append(number)
    found: list[np.ndarray] = [np.empty(0)] * len(pictures)
    for numbers in of_size.values():
        for number, latent in zip(numbers, codec.encode_many([pictures[n] for n in numbers]), strict=True):
            found[number] = latent
    return found


def fit_codec(kind: str, pictures: Sequence[np.ndarray], block: int, components: int) -> Codec:
    """A codec that needs no training, with the statistics of these pictures. ValueError when they do not suit it."""
    match kind:
        case Pixels.kind:
            return Pixels.fit(pictures)
        case BlockPCA.kind:
            return BlockPCA.fit(pictures, block, components)
        case _:
            raise ValueError(f"there is no codec {kind!r}; there are {Pixels.kind} and {BlockPCA.kind}")


def codec_of(kind: str, tensors: dict[str, np.ndarray]) -> Codec | VQ:
    """The codec that `kind` and `tensors()` describe. ValueError when they do not."""
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
                raise ValueError(f"there is no codec of kind {kind}")
    except KeyError as error:
        raise ValueError(f"a codec of kind {kind} needs {error}, which is not there") from None
    except TypeError as error:
        raise ValueError(f"not a codec of kind {kind}: {error}") from None


def codec_to_bytes(codec: Codec | VQ) -> bytes:
    """`tensors()` as the content of a safetensors file."""
    return to_safetensors({name: value.copy() for name, value in codec.tensors().items()})


def codec_from_bytes(kind: str, content: bytes) -> Codec | VQ:
    """The inverse of `codec_to_bytes`. ValueError when it is not a codec of this kind."""
    try:
        return codec_of(kind, from_safetensors(content))
    except SafetensorError as error:
        raise ValueError(f"not a codec of kind {kind}: {error}") from None
