"""What a source gives: documents as people have them, text and pictures in order, before tokenizer and codec.

A source is anything with `name`, `len(source)` and `source[i] -> RawDocument`. Reading document i needs no
other document, so a loader may read in any order. Preparing turns a `RawDocument` into a `sequence.Document`:
text into ids, pixels into latents.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RawText:
    """A run of text as a person would read it. `loss`: is it to be learnt?"""

    text: str
    loss: bool = True


@dataclass(frozen=True)
class RawImage:
    """A picture, upright, of any size. `loss`: is it to be learnt, or does it only condition what follows?"""

    pixels: np.ndarray  # (Y, X, 3) or (Y, X, 1) uint8
    loss: bool = True


@dataclass(frozen=True)
class RawDocument:
    """Text and pictures in order. `id` is its number in its source, from which all its chance follows."""

    segments: tuple[RawText | RawImage, ...]
    id: int
    pairs: bool = False  # caption/image pairs in order, whose order and captions the loader may change
