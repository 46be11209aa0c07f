"""Documents to full rows: best fit, nothing lost, nothing repeated, only what is longer than a row is cut."""

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np

from transfusion.sequence import Chunk, Document, Row, Vocabulary, encode_document, split_chunk


def pack(documents: Iterable[Document], length: int, vocabulary: Vocabulary, seed: int) -> list[Row]:
    """Rows of at most `length` positions. A pure function: the same documents and seed give the same rows.

    Longest first, each chunk goes where it leaves the least room; then rows, and chunks within rows, are shuffled.
    """
    chunks = [chunk for document in documents for chunk in _chunks(document, length, vocabulary)]
    bins: list[list[Chunk]] = []
    room: list[tuple[int, int]] = []  # (positions left, bin), sorted
    for chunk in sorted(chunks, key=len, reverse=True):
        found = bisect_left(room, (len(chunk), 0))
        if found < len(room):
            left, number = room.pop(found)
        else:
            left, number = length, len(bins)
            bins.append([])
        bins[number].append(chunk)
        insort(room, (left - len(chunk), number))
    chance = np.random.default_rng(seed)
    rows = [Row(tuple(members[n] for n in chance.permutation(len(members)))) for members in bins]
    return [rows[n] for n in chance.permutation(len(rows))]


def _chunks(document: Document, length: int, vocabulary: Vocabulary) -> list[Chunk]:
    try:
        return split_chunk(encode_document(document, vocabulary), length)
    except ValueError as error:
        raise ValueError(f"document {document.id} of {document.source}: {error}") from None
