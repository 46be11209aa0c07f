"""Random seeds from names and numbers, so that randomness does not depend on rank, worker, batch, device or step."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed, the same on every machine for the same words and numbers in the same order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def uniform_from(*parts: int | str) -> float:
    """A uniform number in [0, 1), derived from words and numbers in the same way."""
    return derive_seed(*parts) / 2**63
