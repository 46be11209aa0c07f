"""Held-out pictures and texts that are also in training documents: found by the hashes of prepared data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from transfusion.data.heldout import HASH_RANGE, limit_of
from transfusion.data.reading.account import counted
from transfusion.data.shards import read_hashes

NUM_NAMED = 10


@dataclass(frozen=True)
class Leaks:
    """Numbers of different pictures and texts by their hashes. Of one prepared folder `images` and `texts` are 0."""

    heldout_images: int
    heldout_texts: int  # documents of text alone
    images: int  # of the held-out ones, also in training documents
    texts: int
    similar: int  # held-out images with the perceptual hash of another image in a training document
    shared: int  # other images of held-out documents that are also in training documents; no figure includes them
    named: tuple[str, ...]  # the first leaks, by file and row

    def lines(self) -> Iterator[str]:
        """The numbers in words."""
        heldout = f"{counted(self.heldout_images, 'picture')} and {counted(self.heldout_texts, 'text')} are held out"
        if not self.heldout_images + self.heldout_texts:
            yield "nothing is held out"
        elif not self.images + self.texts:
            yield f"{heldout}; none of them is trained on"
        else:
            yield f"{heldout}; {self.images:,} of the pictures and {self.texts:,} of the texts are also trained on:"
            yield from (f"  {name}" for name in self.named)
        if self.similar:
            yield f"{counted(self.similar, 'held-out picture')} with the perceptual hash of a training picture"
        if self.shared:
            yield f"{counted(self.shared, 'other picture')} of held-out documents also trained on; no figure includes these"


def count_leaks(datasets: Sequence[tuple[Path, dict]]) -> Leaks:
    """The leaks between the sources of prepared folders: their paths, and the contents of their dataset.json."""
    images, others, perceptual, texts = ([np.empty(0, np.uint64)] for _ in range(4))
    for batch in _read(datasets, "heldout"):
        images.append(batch.images[batch.is_heldout])
        perceptual.append(batch.perceptual[batch.is_heldout])
        others.append(batch.images[~batch.is_heldout])
        texts.append(batch.texts)
    images, first = np.unique(np.concatenate(images), return_index=True)
    perceptual = np.concatenate(perceptual)[first]
    found_images, found_others, found_texts, found_perceptual = (
        _Lookup(values) for values in (images, np.concatenate(others), np.concatenate(texts), perceptual)
    )
    leaks: dict[tuple[str, int], Copy] = {}  # kind and hash -> the first of them
    for batch in _read(datasets, "train"):
        found_others.mark(batch.images)
        found_perceptual.mark(batch.perceptual)
        for copy in batch.copies(found_images, found_texts):
            if len(leaks) < NUM_NAMED:
                leaks.setdefault((copy.kind, copy.hash), copy)
    is_similar = (perceptual != 0) & np.isin(perceptual, found_perceptual.values[found_perceptual.found])
    return Leaks(
        len(images), len(found_texts.values), int(found_images.found.sum()), int(found_texts.found.sum()),
        int((is_similar & ~found_images.found).sum()), int(found_others.found.sum()),
        tuple(f"the {copy.kind} of {copy.source}: {copy.where} is held out in {place}"
              for copy, place in _find_places(datasets, [*leaks.values()])),
    )  # fmt: skip


@dataclass(frozen=True)
class Copy:
    """A training document with a picture or text that is also held out."""

    source: str
    shard: int
    row: int  # in the shard
    where: str
    kind: str  # "picture" or "text"
    hash: int


def find_copies(folder: Path, sources: Mapping[str, dict], heldout_fraction: float) -> list[tuple[Copy, str]]:
    """The training documents with content that is held out, each once and in order, and where it is held out: source, file
    and row. `sources`: as in dataset.json. There are none if no source declares its split: the same hash has one fate."""
    if not any(source["declares_split"] for source in sources.values()):
        return []
    datasets = [(folder, {"sources": sources, "heldout_fraction": heldout_fraction})]
    images, texts = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for batch in _read(datasets, "heldout"):
        images.append(batch.images[batch.is_heldout])
        texts.append(batch.texts)
    lookups = [_Lookup(np.concatenate(values)) for values in (images, texts)]
    copies: dict[tuple[str, int, int], Copy] = {}
    for batch in _read(datasets, "train"):
        for copy in batch.copies(*lookups):
            copies.setdefault((copy.source, copy.shard, copy.row), copy)
    return list(_find_places(datasets, [*copies.values()]))


class _Lookup:
    """Sorted different values, and which of them were found."""

    def __init__(self, values: np.ndarray):
        self.values = np.unique(values)
        self.found = np.zeros(len(self.values), bool)

    def mark(self, queries: np.ndarray) -> np.ndarray:
        """Mark the values that are among the queries; returns which queries are among the values."""
        if not len(self.values):
            return np.zeros(len(queries), bool)
        index = np.searchsorted(self.values, queries).clip(max=len(self.values) - 1)
        is_known = self.values[index] == queries
        self.found[index[is_known]] = True
        return is_known


@dataclass(frozen=True)
class _Batch:
    """Hashes of some documents of a source."""

    source: str
    shard: int
    rows: np.ndarray  # in the shard
    record_batch: pa.RecordBatch
    images: np.ndarray  # uint64, of all images of all documents
    perceptual: np.ndarray
    texts: np.ndarray  # of the documents without images
    is_heldout: np.ndarray  # bool, which images are held out, if the documents are

    @classmethod
    def of(cls, source: str, shard: int, rows: np.ndarray, batch: pa.RecordBatch, limit: int) -> "_Batch":
        """`limit`: hashes below it are held out."""
        images, perceptual, texts = (batch.column(name) for name in ("image_hashes", "perceptual_hashes", "text_hash"))
        images, perceptual = (column.flatten().to_numpy() for column in (images, perceptual))
        return cls(source, shard, rows, batch, images, perceptual, texts.drop_null().to_numpy(),
                   images <= np.uint64(limit - 1) if limit else np.zeros(len(images), bool))  # fmt: skip

    def copies(self, images: "_Lookup", texts: "_Lookup") -> Iterator[Copy]:
        """Its pictures and texts that are in the lookups, where they are marked."""
        for kind, lookup, values in (("picture", images, self.images), ("text", texts, self.texts)):
            numbers = np.flatnonzero(lookup.mark(values))
            for index, where, value in zip(*self.locate(kind, numbers), values[numbers].tolist(), strict=True):
                yield Copy(self.source, self.shard, int(self.rows[index]), where, kind, value)

    def locate(self, kind: str, numbers: np.ndarray) -> tuple[list[int], list[str]]:
        """Of pictures or texts, from their numbers among those of the batch: their documents in it, and file and row."""
        if kind == "text":
            documents = np.flatnonzero(self.record_batch.column("text_hash").is_valid())[numbers]
        else:
            ends = np.cumsum(self.record_batch.column("image_hashes").value_lengths())
            documents = np.searchsorted(ends, numbers, side="right")
        return documents.tolist(), self.record_batch.column("where").take(pa.array(documents)).to_pylist()


def _read(datasets: Sequence[tuple[Path, dict]], split: str) -> Iterator[_Batch]:
    """All batches of a split."""
    for folder, metadata in datasets:
        for name, source in metadata["sources"].items():
            limit = HASH_RANGE if source["declares_split"] else limit_of(metadata["heldout_fraction"])
            for shard, rows, batch in read_hashes(folder / name, split, source["shards"]):
                yield _Batch.of(name, shard, rows, batch, limit)


def _find_places(datasets: Sequence[tuple[Path, dict]], copies: Sequence[Copy]) -> Iterator[tuple[Copy, str]]:
    """Each of the copies, and where its picture or text is held out: source, file and row of the first document."""
    hashes = {kind: _Lookup(np.array([copy.hash for copy in copies if copy.kind == kind], np.uint64))
              for kind in ("picture", "text")}  # fmt: skip
    places: dict[tuple[str, int], str] = {}
    for batch in _read(datasets, "heldout") if copies else ():
        for kind, values, is_heldout in (("picture", batch.images, batch.is_heldout), ("text", batch.texts, True)):
            numbers = np.flatnonzero(hashes[kind].mark(values) & is_heldout)
            for where, value in zip(batch.locate(kind, numbers)[1], values[numbers].tolist(), strict=True):
                places.setdefault((kind, value), f"{batch.source}: {where}")
    return ((copy, places[copy.kind, copy.hash]) for copy in copies)
