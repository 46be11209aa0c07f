"""Documents to full rows: best fit, nothing lost, nothing repeated, only what is longer than a row is cut."""

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np

from transfusion.sequence import Document, Piece, Row, Vocabulary, cut, lay_out


def pack(documents: Iterable[Document], length: int, vocabulary: Vocabulary, seed: int) -> list[Row]:
    """Rows of at most `length` positions. A pure function: the same documents and seed give the same rows.

    Longest first, each piece goes where it leaves the least room; then rows, and pieces within rows, are shuffled.
    """
    pieces = [piece for document in documents for piece in _pieces(document, length, vocabulary)]
    bins: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (positions left, bin), sorted
    for piece in sorted(pieces, key=len, reverse=True):
        found = bisect_left(room, (len(piece), 0))
        if found < len(room):
            left, number = room.pop(found)
        else:
            left, number = length, len(bins)
            bins.append([])
        bins[number].append(piece)
        insort(room, (left - len(piece), number))
    chance = np.random.default_rng(seed)
    rows = [Row(tuple(members[n] for n in chance.permutation(len(members)))) for members in bins]
    return [rows[n] for n in chance.permutation(len(rows))]


def _pieces(document: Document, length: int, vocabulary: Vocabulary) -> list[Piece]:
    try:
        return cut(lay_out(document, vocabulary), length)
    except ValueError as error:
        raise ValueError(f"document {document.id} of {document.source}: {error}") from None
