"""Documents to full rows by best-fit packing: nothing is lost or repeated; only what is longer than a row is split."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from transfusion.seeding import derive_seeds
from transfusion.sequence import Document, Row, Vocabulary, count_copies, encode_document, find_breaks, find_splits


def pack(
    documents: Sequence[Document], seq_len: int, vocabulary: Vocabulary, seed: int, clean_copies: bool = False
) -> list[Row]:
    """Rows of at most `seq_len` positions. A pure function of the documents and the seed. ValueError when a document cannot
    be split to fit."""
    chunks = []
    for document in documents:
        chunk = encode_document(document, vocabulary, clean_copies=clean_copies)
        if len(chunk) > seq_len:
            ends, _ = split_document(document, seq_len, vocabulary, clean_copies)
            chunks += [chunk.part(*span) for span in pairwise([0, *ends])]
        else:
            chunks.append(chunk)
    if not chunks:
        return []
    chunks = [chunks[n] for n in np.argsort(derive_seeds(seed, np.arange(len(chunks))))]
    lengths = np.array([len(chunk) for chunk in chunks])
    bins, blocks = best_fit(lengths, np.zeros_like(lengths), seq_len)
    order, ends = shuffle_bins(bins, blocks, np.array([seed], np.uint64))
    return [Row(tuple(chunks[n] for n in part)) for part in np.split(order, ends[:-1])]


def split_document(
    document: Document, seq_len: int, vocabulary: Vocabulary, clean_copies: bool = False
) -> tuple[list[int], list[int]]:
    """The end of each of its chunks, and the positions of the noisy copies in each. ValueError, which names the document,
    when it cannot be split to fit."""
    copies = count_copies(document, vocabulary) if clean_copies else None
    try:
        ends = find_splits(find_breaks(document, vocabulary), seq_len, copies)
        return ends, [0] * len(ends) if copies is None else np.add.reduceat(copies, [0, *ends[:-1]]).tolist()
    except ValueError as error:
        raise ValueError(f"document {document.id} of {document.source}: {error}") from None


def best_fit(lengths: np.ndarray, blocks: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: the bin (n,) of each chunk, and the block (bins,) of each bin.

    `lengths` (n,): of the chunks, at most `seq_len`. `blocks` (n,): their blocks, which are packed separately. The longest
    are placed first, each into the bin where it leaves the least space; equal ones in the given order.

    Equal lengths are placed together: the bin that is the best fit for one of them remains it until no other fits in.
    """
    order = _stable_order(seq_len - lengths, seq_len)
    order = order[_stable_order(blocks[order], blocks.max())]
    ordered, ordered_blocks = lengths[order], blocks[order]
    is_first = np.ones(len(order), bool)  # of equal ones
    is_first[1:] = (ordered[1:] != ordered[:-1]) | (ordered_blocks[1:] != ordered_blocks[:-1])
    starts = np.flatnonzero(is_first)
    counts = np.diff(starts, append=len(order))
    free: list[int] = []  # of bins of this block that are not full: free positions and the bin, as free * 2^32 + bin, sorted
    bins, times, bin_blocks, current = [], [], [], -1  # the next times[n] chunks are in bins[n]
    for length, count, block in zip(
        ordered[starts].tolist(), counts.tolist(), ordered_blocks[starts].tolist(), strict=True
    ):
        if block != current:
            free, current = [], block
        while count:
            best = bisect_left(free, length << 32)
            if best < len(free):
                space = free.pop(best)
                number, space = space & 0xFFFFFFFF, space >> 32
            else:
                space, number = seq_len, len(bin_blocks)
                bin_blocks.append(block)
            placed = count if count * length <= space else space // length
            bins.append(number)
            times.append(placed)
            count -= placed
            space -= placed * length
            if space:
                insort(free, space << 32 | number)
    result = np.empty(len(order), np.int64)
    result[order] = np.repeat(bins, times)
    return result, np.array(bin_blocks)


def shuffle_bins(bins: np.ndarray, bin_blocks: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bins of each block as rows in random order: the numbers (n,) of the chunks, row by row, in the given order within
    a row; and the end (rows,) of each row there. `seeds` (blocks,): of each block."""
    numbers = np.arange(len(bin_blocks)) - np.searchsorted(bin_blocks, bin_blocks)  # of a bin in its block
    rows = np.argsort(np.lexsort((derive_seeds(seeds[bin_blocks], numbers), bin_blocks)))[bins]  # of each chunk
    return _stable_order(rows, len(bin_blocks)), np.cumsum(np.bincount(rows))


def _stable_order(values: np.ndarray, limit: int) -> np.ndarray:
    """The order that sorts values from 0 to `limit`. NumPy sorts 16-bit numbers ten times as fast as others."""
    return np.argsort(values.astype(np.min_scalar_type(limit)), kind="stable")


def split_texts(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The chunks of documents of one text each, as `split_chunk` makes them: the number of chunks (n,) of each document, and
    the end of each chunk in its document. `lengths` (n,) with bos and eos; `seq_len` is at least 2."""
    counts = -(-lengths // seq_len)
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the chunk in its document
    totals = np.repeat(lengths, counts)
    ends = np.minimum((numbers + 1) * seq_len, totals)
    return counts, np.where(ends == totals - 1, ends - 1, ends)  # a chunk does not begin with eos
