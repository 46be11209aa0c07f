"""The schema: a document as people have it, text and pictures in order, before tokenizer and codec.

Every reader gives these, whatever the files looked like; `docs/data.md` shows one of each kind. Preparing turns a
`RawDocument` into a `sequence.Document`: text into ids, pixels into latents.
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
    """A picture, upright, of any size. `loss`: is it to be learnt, or does it only condition what follows?

    `max_t` is the most noise it is trained with (see `sequence.Image`); 0: always clean.
    """

    pixels: np.ndarray  # (Y, X, 3) or (Y, X, 1) uint8
    loss: bool = True
    max_t: float = 1.0


@dataclass(frozen=True)
class RawDocument:
    """Text and pictures in order. `id` is its number in its source, from which all its chance follows."""

    segments: tuple[RawText | RawImage, ...]
    id: int = 0
    pairs: bool = False  # caption/image pairs in order, whose order and captions the loader may change
    name: str = ""  # the id that its source gives it, if any; no two documents share one
    where: str = ""  # file and row
    split: str = ""  # "train" or "heldout", where its source says so; else chance decides
    kin: str = ""  # documents of one kin (five captions of one picture) are held out together or not at all

    @property
    def pair(self) -> tuple[str, np.ndarray]:
        """Its first text and the pixels of its first picture, in whichever order they stand."""
        text = next(part.text for part in self.segments if isinstance(part, RawText))
        return text, next(part.pixels for part in self.segments if isinstance(part, RawImage))


class Fault(ValueError):
    """One record that cannot become a document: where it stands, of which kind the fault is, and what exactly."""

    def __init__(self, kind: str, message: str, where: str = ""):
        super().__init__(message)
        self.kind, self.message, self.where = kind, message, where

    def at(self, where: str) -> "Fault":
        """The same fault, with its place."""
        return Fault(self.kind, self.message, where)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message
