"""`digits`: the 1,797 real handwritten digits that scikit-learn carries, captioned with their English names."""

from functools import cache

import numpy as np

from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.seeding import derive_seed, uniform_from

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROUNDS = 64  # times each scan stands in the training split, every time in other company when interleaved


class Digits:
    """Scans with their names, as caption-image pairs; a share of the training documents holds 2 to 4 pairs.

    The 297 held-out scans are never in a training document, and are not interleaved.
    """

    name = "digits"

    def __init__(self, split: str = "train", interleaved: float = 0.0):
        self.scans, self.labels = scans(split)
        self.split, self.interleaved = split, interleaved

    def __len__(self) -> int:
        return len(self.scans) * (ROUNDS if self.split == "train" else 1)

    def __getitem__(self, id: int) -> RawDocument:
        members = [id % len(self.scans)]
        if self.split == "train" and uniform_from("digits", id) < self.interleaved:
            chance = np.random.default_rng(derive_seed("digits", "company", id))
            members += chance.integers(len(self.scans), size=chance.integers(1, 4)).tolist()
        pairs = [(RawText(NAMES[self.labels[n]]), RawImage(self.scans[n])) for n in members]
        return RawDocument(tuple(part for pair in pairs for part in pair), id=id, pairs=True)


@cache
def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8, 8, 1) uint8 and the digits (n,) of one split, "train" (1,500) or "heldout" (297)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    train, heldout = train_test_split(range(1797), test_size=297, random_state=0, stratify=found.target)
    chosen = {"train": train, "heldout": heldout}[split]
    pixels = np.round(found.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    return pixels, found.target[chosen]
