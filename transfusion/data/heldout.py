"""Which documents are held out.

The hash of a picture decides: SHA-256 of its pixels as the codec gets them, after decoding, resizing and cropping. A picture
is held out if its hash is among the smallest `fraction` of all hashes. So it has the same fate in every record, file and
source, in any order and in any process. A document with a held-out picture is held out. A document of text alone is held out
by the hash of its text; the texts of a chat layout count as white space. A split that the source declares is kept.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from threadpoolctl import ThreadpoolController

from transfusion.data.raw import RawDocument, RawImage, RawText

MAX_FRACTION = 0.05  # largest share that is held out
HASH_RANGE = 2**64  # hashes are below it
MIN_STEP = 4  # levels of 255; smaller differences of neighbours are noise of the compression
MAX_SIDE = 256  # larger images are sampled before they are resized to 9 x 8 pixels


@dataclass(frozen=True)
class SplitDocument:
    """A document whose split is decided, and the hashes of its content."""

    document: RawDocument
    image_hashes: tuple[int, ...]
    perceptual_hashes: tuple[int, ...]  # of each image
    text_hash: int | None  # of a document without images

    @classmethod
    def of(cls, document: RawDocument, fraction: float) -> "SplitDocument":
        """Decide the split of a document with cropped images. In a held-out document only held-out images have a loss: the
        others may be in training documents, so no figure may include them."""
        pixels = [part.pixels for part in document.segments if isinstance(part, RawImage)]
        image_hashes = tuple(map(hash_pixels, pixels))
        texts = (" " if part.parse_special else part.text for part in document.segments if isinstance(part, RawText))
        text_hash = None if pixels else hash_text("".join(texts))
        if not document.split:
            limit = limit_of(fraction)
            is_heldout = any(value < limit for value in image_hashes or (text_hash,))
            document = replace(document, split="heldout" if is_heldout else "train")
            if is_heldout:
                document = _drop_loss(document, [value >= limit for value in image_hashes])
        return cls(document, image_hashes, tuple(perceptual_hashes(pixels)), text_hash)


def limit_of(fraction: float) -> int:
    """Pictures and texts whose hashes are below this limit are held out."""
    return int(fraction * HASH_RANGE)


def _drop_loss(document: RawDocument, is_dropped: Sequence[bool]) -> RawDocument:
    """The document without the loss of some of its images."""
    dropped = iter(is_dropped)
    segments = tuple(
        replace(part, loss=not next(dropped) and part.loss) if isinstance(part, RawImage) else part
        for part in document.segments
    )  # fmt: skip
    return replace(document, segments=segments)


def hash_pixels(pixels: np.ndarray) -> int:
    """A hash of pixels (Y, X, 1 | 3) uint8. A grey image has the hash of the same image in RGB."""
    height, width, channels = pixels.shape
    pixels = np.repeat(pixels, 3, 2) if channels == 1 else pixels
    return hash_bytes(f"{height}x{width}".encode(), np.ascontiguousarray(pixels))


def hash_text(text: str) -> int:
    """A hash of a text in which any white space is one space."""
    return hash_bytes(" ".join(text.split()).encode())


def hash_document(document: RawDocument, image_hashes: Iterator[int]) -> int:
    """A hash of all texts and images in order: equal for exact duplicates. It takes the hashes of its images."""
    parts = [" ".join(p.text.split()) if isinstance(p, RawText) else next(image_hashes) for p in document.segments]
    return hash_bytes(repr(parts).encode())


def hash_bytes(*contents: bytes | np.ndarray) -> int:
    """The first 64 bits of the SHA-256 of the contents, concatenated."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest()[:8], "big")


def perceptual_hashes(images: Sequence[np.ndarray]) -> list[int]:
    """The difference hash (dHash) of each image (Y, X, 1 | 3) uint8. It is resized to 9 x 8 pixels, the mean of their
    channels. Each of the 64 bits is 1 if a pixel is darker than its right neighbour by more than `MIN_STEP`. It is 0 for an
    image without such steps. Images of one shape are resized together, which is twice as fast for small ones."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, pixels in enumerate(images):
        shapes.setdefault(pixels.shape, []).append(number)
    hashes = [0] * len(images)
    with _matrix_library().limit(limits=1, user_api="blas"):  # its threads cost more than they gain for small products
        for shape, numbers in shapes.items():
            for number, value in zip(numbers, _hashes_of_one_shape(shape, [images[n] for n in numbers]), strict=True):
                hashes[number] = value
    return hashes


@cache
def _matrix_library() -> ThreadpoolController:
    return ThreadpoolController()


def _hashes_of_one_shape(shape: tuple[int, ...], images: Sequence[np.ndarray]) -> list[int]:
    """The perceptual hashes of images (Y, X, C)."""
    height, width, channels = shape
    step = max(1, min(height, width) // MAX_SIDE)
    pixels = np.stack([image[::step, ::step] for image in images])
    count, height, width, _ = pixels.shape
    rows = _resize_weights(height, 8).astype(np.float32) @ pixels.reshape(count, height, width * channels)
    grey = (rows.reshape(count * 8, -1) @ _resize_weights(width, 9, channels).T).reshape(count, 8, 9)  # sum of channels
    bits = np.packbits((grey[..., 1:] - grey[..., :-1] > MIN_STEP * channels).reshape(count, 64), axis=1)
    return bits.view(">u8")[:, 0].tolist()


@lru_cache
def _resize_weights(size: int, new_size: int, repeats: int = 1) -> np.ndarray:
    """(new_size, size * repeats): the weights of the triangle filter, each several times. They are multiples of 2^-12, so
    all sums are exact, over rows (20 bits) even in float32: the hash is the same on every machine."""
    scale = size / new_size
    centres = (np.arange(new_size)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centres) / max(scale, 1.0))
    rounded = np.round(weights / weights.sum(1, keepdims=True) * 2**12) / 2**12
    return rounded.repeat(repeats, 1)
