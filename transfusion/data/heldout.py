"""Which documents are held out.

The hash of a picture decides: SHA-256 of its pixels as the codec gets them, after decoding, resizing and cropping. A picture
is held out if its hash is among the smallest `fraction` of all hashes. So it has the same fate in every record, file and
source, in any order and in any process. A document with a held-out picture is held out. A document of text alone is held out
by the hash of its text. A split that the source declares is kept.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image as Picture

from transfusion.data.raw import RawDocument, RawImage, RawText

MAX_FRACTION = 0.05  # largest share that is held out
HASH_RANGE = 2**64
MIN_STEP = 4  # grey levels; smaller differences of neighbours are noise of the compression


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
        text_hash = None if pixels else hash_text("".join(part.text for part in document.segments))
        if not document.split:
            limit = fraction * HASH_RANGE
            is_heldout = any(value < limit for value in (*image_hashes, *([] if pixels else [text_hash])))
            document = replace(document, split="heldout" if is_heldout else "train")
            if is_heldout:
                document = _drop_loss(document, [value >= limit for value in image_hashes])
        return cls(document, image_hashes, tuple(map(perceptual_hash, pixels)), text_hash)


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


def hash_document(document: RawDocument) -> int:
    """A hash of all texts and images in order: equal for exact duplicates."""
    hashes = (f"text {hash_text(part.text)}" if isinstance(part, RawText) else f"image {hash_pixels(part.pixels)}"
              for part in document.segments)  # fmt: skip
    return hash_bytes("\n".join(hashes).encode())


def hash_bytes(*contents: bytes | np.ndarray) -> int:
    """The first 64 bits of the SHA-256 of the contents, concatenated."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest()[:8], "big")


def perceptual_hash(pixels: np.ndarray) -> int:
    """The difference hash (dHash) of an image (Y, X, 1 | 3) uint8: it is resized to 9 x 8 grey pixels; each of the 64 bits
    is 1 if a pixel is darker than its right neighbour by more than `MIN_STEP`. It is 0 for an image without such steps."""
    image = Picture.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("L")
    grey = np.asarray(image.resize((9, 8), Picture.Resampling.BILINEAR), np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] - grey[:, :-1] > MIN_STEP).tobytes(), "big")
