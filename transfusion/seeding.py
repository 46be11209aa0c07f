"""Random seeds from names and numbers, so that randomness does not depend on rank, worker, batch, device or step."""

import hashlib
from operator import index

import numpy as np

LARGEST_BELOW_1 = 1 - 2**-53
ONE = np.uint64(1)
GOLDEN, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # splitmix64


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed, the same on every machine for the same words and whole numbers (Python's or numpy's) in the same order.
    TypeError for anything else."""
    text = "\x1f".join(map(_label, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derive_seeds(seeds: np.ndarray | int, numbers: np.ndarray | int) -> np.ndarray:
    """A 64-bit seed for each seed and number (both broadcast), uint64: element `number` of the splitmix64 sequence of `seed`
    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). For arrays; it takes nanoseconds."""
    # Negative numbers wrap; in arrays, unlike in numbers, that is no error.
    x = np.atleast_1d(np.asarray(numbers).astype(np.uint64, copy=False)) + ONE
    x = x * GOLDEN + np.asarray(seeds, np.uint64)
    x ^= x >> np.uint64(30)
    x *= FIRST
    x ^= x >> np.uint64(27)
    x *= SECOND
    x ^= x >> np.uint64(31)
    return x


def uniform_from(*parts: int | str) -> float:
    """A uniform number in [0, 1), derived from words and numbers in the same way."""
    return min(derive_seed(*parts) / 2**63, LARGEST_BELOW_1)  # the division rounds the largest seeds up to 1


def uniforms_from(seeds: np.ndarray, label: str) -> np.ndarray:
    """A uniform number in [0, 1) for each seed; other labels give independent ones."""
    return (derive_seeds(seeds, derive_seed(label)) >> np.uint64(11)) * 2.0**-53


def _label(part: int | str) -> str:
    if isinstance(part, bool):
        raise TypeError(f"a seed is made of words and whole numbers, not {part!r}")
    return f"str:{part}" if isinstance(part, str) else f"int:{index(part)}"
