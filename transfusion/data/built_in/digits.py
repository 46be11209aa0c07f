"""`digits`: the 1,797 handwritten digits of scikit-learn, captioned with their English names."""

from functools import cache

import numpy as np

from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.seeding import derive_seed, uniform_from

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_REPEATS = 64  # of each scan in the training split; interleaved documents combine it with other scans each time


class Digits:
    """Scans with their names, as caption-image pairs. `interleaved`: the share of training documents with 2 to 4 pairs. The
    297 held-out scans are in no training document and are not interleaved."""

    name = "digits"

    def __init__(self, split: str = "train", interleaved: float = 0.0):
        self.scans, self.labels = load_scans(split)
        self.split, self.interleaved = split, interleaved

    def __len__(self) -> int:
        return len(self.scans) * (NUM_REPEATS if self.split == "train" else 1)

    def __getitem__(self, id: int) -> RawDocument:
        members = [id % len(self.scans)]
        if self.split == "train" and uniform_from("digits", id) < self.interleaved:
            rng = np.random.default_rng(derive_seed("digits", "company", id))
            members += rng.integers(len(self.scans), size=rng.integers(1, 4)).tolist()
        pairs = [(RawText(NAMES[self.labels[n]]), RawImage(self.scans[n])) for n in members]
        return RawDocument(tuple(part for pair in pairs for part in pair), id=id, pairs=True)


@cache
def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans (n, 8, 8, 1) uint8 and their digits (n,) of one split: "train" (n = 1,500) or "heldout" (n = 297)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, heldout = train_test_split(range(1797), test_size=297, random_state=0, stratify=digits.target)
    indices = {"train": train, "heldout": heldout}[split]
    pixels = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)[..., None]
    return pixels, digits.target[indices]
