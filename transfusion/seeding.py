"""Random seeds from names and numbers, so that randomness does not depend on rank, worker, batch, device or step."""

import hashlib
from operator import index

LARGEST_BELOW_1 = 1 - 2**-53


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed, the same on every machine for the same words and whole numbers (Python's or numpy's) in the same order.
    TypeError for anything else."""
    text = "\x1f".join(map(_label, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform_from(*parts: int | str) -> float:
    """A uniform number in [0, 1), derived from words and numbers in the same way."""
    return min(derive_seed(*parts) / 2**63, LARGEST_BELOW_1)  # the division rounds the largest seeds up to 1


def _label(part: int | str) -> str:
    if isinstance(part, bool):
        raise TypeError(f"a seed is made of words and whole numbers, not {part!r}")
    return f"str:{part}" if isinstance(part, str) else f"int:{index(part)}"
