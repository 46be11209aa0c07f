"""The order of documents: a mixture of sources, each shuffled in every epoch. Any part of it is computed directly, from
its position, with a few operations on arrays."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from transfusion.seeding import derive_seed, derive_seeds

DOCUMENT = "document"  # label of the seeds of documents
ONE = np.uint64(1)
HALF = np.uint64(32)  # bits
ROUNDS = 6  # of the permutation
WEIGHT_UNIT = 2**52  # weights become whole numbers, so that counts are exact at any position


class Entries(NamedTuple):
    """Documents of the stream: arrays (n,)."""

    sources: np.ndarray  # numbers of their sources
    ids: np.ndarray  # their numbers in their sources
    keys: np.ndarray  # uint64: the seeds of all their randomness
    epochs: np.ndarray


class Stream:
    """An endless stream of documents in blocks, a pure function of the seed. `weights`: of the sources, by documents."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], seed: int, block_size: int):
        self.sizes, self.block_size = np.array(sizes, np.int64), block_size
        self.weights = [max(1, round(weight * WEIGHT_UNIT)) for weight in weights]
        self.order_seeds, self.document_seeds = (
            np.array([derive_seed(seed, name, purpose) for name in names], np.uint64) for purpose in ("order", DOCUMENT)
        )

    def read(self, first: int, num_blocks: int = 1) -> Entries:
        """The documents of blocks first, first + 1, ...: block by block, and in a block source by source."""
        counts = np.array([
            count_by_weight(block * self.block_size, self.weights) for block in range(first, first + num_blocks + 1)
        ])  # (blocks + 1, sources): documents before each block
        begins, lengths = counts[:-1].ravel(), np.diff(counts, axis=0).ravel()
        sources = np.repeat(np.tile(np.arange(len(self.sizes)), num_blocks), lengths)
        places = np.arange(len(sources)) + np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
        sizes = self.sizes[sources]
        epochs, places = np.divmod(places, sizes)
        ids = permute(places, sizes, derive_seeds(self.order_seeds[sources], epochs))
        return Entries(sources, ids, derive_seeds(derive_seeds(self.document_seeds[sources], epochs), ids), epochs)


def document_key(seed: int, source: str, epoch: int, id: int) -> int:
    """The key of one document, as in `Stream`."""
    return int(derive_seeds(derive_seeds(derive_seed(seed, source, DOCUMENT), epoch), id)[0])


def count_by_weight(total: int, weights: Sequence[int]) -> list[int]:
    """How many of the first `total` documents are of each source: about its share of the weights, within one or two. The sum
    is exact, and no count decreases when `total` grows. The sources are divided into two groups of about equal weight, the
    first gets its share rounded and the second the rest; and so on within the groups."""
    if len(weights) == 1:
        return [total]
    sums = list(accumulate(weights))
    middle = min(range(1, len(weights)), key=lambda n: abs(2 * sums[n - 1] - sums[-1]))
    first = (2 * total * sums[middle - 1] + sums[-1]) // (2 * sums[-1])
    return count_by_weight(first, weights[:middle]) + count_by_weight(total - first, weights[middle:])


def permute(places: np.ndarray, sizes: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The number at each place (n,) of a pseudorandom permutation of 0 .. sizes[i] - 1; each seed has another permutation.

    A number is a pair (high, low), of which each is shifted in turn by a hash of the other: a Feistel network. There are up
    to sqrt(size) more pairs than numbers. What is mapped to one of these is mapped again ("cycle walking": Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    sizes = sizes.astype(np.uint64)
    low_bits = (np.frexp(sizes - ONE)[1] // 2).astype(np.uint64)
    low_mask, num_high = (ONE << low_bits) - ONE, (sizes - ONE >> low_bits) + ONE
    numbers, pending = places.astype(np.uint64), slice(None)
    while True:
        bits, mask, limit, seed = (values[pending] for values in (low_bits, low_mask, num_high, seeds))
        high, low = numbers[pending] >> bits, numbers[pending] & mask
        for number in range(0, ROUNDS, 2):
            high += _hash(seed, low, number) * limit >> HALF
            high -= limit * (high >= limit)
            low ^= _hash(seed, high, number + 1) & mask
        numbers[pending] = high << bits | low
        pending = np.flatnonzero(numbers >= sizes)
        if not len(pending):
            return numbers.astype(np.int64)


def _hash(seeds: np.ndarray, numbers: np.ndarray, label: int) -> np.ndarray:
    """32 bits for each number below 2^40, in fewer operations than `derive_seeds`."""
    x = (numbers + np.uint64(label << 40) ^ seeds) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> HALF
    x *= np.uint64(0xD6E8FEB86659FD93)
    return x >> HALF
