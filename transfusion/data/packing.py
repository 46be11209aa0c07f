"""Documents to full rows by best-fit packing: nothing is lost or repeated; only what is longer than a row is split."""

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np

from transfusion.sequence import Chunk, Document, Row, Vocabulary, encode_document, split_chunk


def pack(documents: Iterable[Document], seq_len: int, vocabulary: Vocabulary, seed: int) -> list[Row]:
    """Rows of at most `seq_len` positions. A pure function of the documents and the seed. Chunks are placed longest first,
    each into the row where it leaves the least space. Then rows, and chunks within rows, are shuffled. ValueError when a
    document cannot be split to fit."""
    chunks = [chunk for document in documents for chunk in _split_document(document, seq_len, vocabulary)]
    bins: list[list[Chunk]] = []
    free: list[tuple[int, int]] = []  # (free positions, bin), sorted
    for chunk in sorted(chunks, key=len, reverse=True):
        best = bisect_left(free, (len(chunk), 0))
        if best < len(free):
            left, number = free.pop(best)
        else:
            left, number = seq_len, len(bins)
            bins.append([])
        bins[number].append(chunk)
        insort(free, (left - len(chunk), number))
    rng = np.random.default_rng(seed)
    rows = [Row(tuple(members[n] for n in rng.permutation(len(members)))) for members in bins]
    return [rows[n] for n in rng.permutation(len(rows))]


def _split_document(document: Document, seq_len: int, vocabulary: Vocabulary) -> list[Chunk]:
    try:
        return split_chunk(encode_document(document, vocabulary), seq_len)
    except ValueError as error:
        raise ValueError(f"document {document.id} of {document.source}: {error}") from None
