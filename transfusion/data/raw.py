"""Raw documents: text and images in order, before tokenizer and codec.

Every reader returns these for every file format; `docs/data.md` shows one of each kind. Preparation turns a
`RawDocument` into a `sequence.Document`: text into ids, pixels into latents.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RawText:
    """A text segment. `loss`: whether the training loss includes it. `parse_special`: it is from a chat layout, and special
    tokens in it are recognised; in other text they are plain text."""

    text: str
    loss: bool = True
    parse_special: bool = False


@dataclass(frozen=True)
class RawImage:
    """An upright image of any size. `loss`: whether the training loss includes it; otherwise it is only a condition.

    `max_t` is the highest noise level it is trained with (see `sequence.Image`); 0: always without noise.
    """

    pixels: np.ndarray  # (Y, X, 3) or (Y, X, 1) uint8
    loss: bool = True
    max_t: float = 1.0


@dataclass(frozen=True)
class RawDocument:
    """Text and images in order. `id` is its number in its source; all its randomness is derived from it."""

    segments: tuple[RawText | RawImage, ...]
    id: int = 0
    pairs: bool = False  # alternating captions and images; the loader may swap them and drop captions
    name: str = ""  # its id in the source, if any; unique there
    where: str = ""  # file and row
    split: str = ""  # "train" or "heldout" when its source declares it; otherwise `heldout.py` decides

    @property
    def pair(self) -> tuple[str, np.ndarray] | None:
        """The caption and the pixels of the first image with loss of a document of pairs; None when there is none."""
        for first, second in zip(self.segments[::2], self.segments[1::2], strict=True) if self.pairs else ():
            caption, image = (first, second) if isinstance(first, RawText) else (second, first)
            if image.loss:
                return caption.text, image.pixels
        return None


CUT_SHORT = "cut short"  # the kind of fault after which the rest of a file is not read


class Fault(ValueError):
    """A record that cannot become a document: the kind of fault, a message, and where it is (file and row)."""

    def __init__(self, kind: str, message: str, where: str = ""):
        super().__init__(kind, message, where)  # a copy, as sent by another process, is made of these
        self.kind, self.message, self.where = kind, message, where

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message
