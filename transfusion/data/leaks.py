"""Held-out pictures and texts that are also trained on: counted and named from the hashes of prepared data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from transfusion.data.heldout import HASH_RANGE, limit_of
from transfusion.data.reading.account import counted
from transfusion.data.store import read_hashes

NUM_NAMED = 10


@dataclass(frozen=True)
class Leaks:
    """Numbers of different pictures and texts by their hashes. Without declared splits `images` and `texts` are 0."""

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
    for batch, limit in _read(datasets, "heldout"):
        is_heldout = batch.images < np.uint64(limit) if limit < HASH_RANGE else np.ones(len(batch.images), bool)
        images.append(batch.images[is_heldout])
        perceptual.append(batch.perceptual[is_heldout])
        others.append(batch.images[~is_heldout])
        texts.append(batch.texts)
    images, first = np.unique(np.concatenate(images), return_index=True)
    perceptual = np.concatenate(perceptual)[first]
    found_images, found_others, found_texts, found_perceptual = (
        _Lookup(values) for values in (images, np.concatenate(others), np.concatenate(texts), perceptual)
    )
    leaks: dict[tuple[str, int], str] = {}  # kind and hash -> file and row in the training split
    for batch, _ in _read(datasets, "train"):
        found_others.mark(batch.images)
        found_perceptual.mark(batch.perceptual)
        for kind, lookup, values in (("picture", found_images, batch.images), ("text", found_texts, batch.texts)):
            for n in np.flatnonzero(lookup.mark(values)) if len(leaks) < NUM_NAMED else ():
                leaks.setdefault((kind, int(values[n])), batch.where(kind, n))
    leaks = dict(list(leaks.items())[:NUM_NAMED])
    is_similar = (perceptual != 0) & np.isin(perceptual, found_perceptual.values[found_perceptual.found])
    return Leaks(
        len(images), len(found_texts.values), int(found_images.found.sum()), int(found_texts.found.sum()),
        int((is_similar & ~found_images.found).sum()), int(found_others.found.sum()), tuple(_name(datasets, leaks)),
    )  # fmt: skip


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
    record_batch: pa.RecordBatch
    images: np.ndarray  # uint64, of all images of all documents
    perceptual: np.ndarray
    texts: np.ndarray  # of the documents without images

    @classmethod
    def of(cls, source: str, batch: pa.RecordBatch) -> "_Batch":
        images, perceptual, texts = (batch.column(name) for name in ("image_hashes", "perceptual_hashes", "text_hash"))
        return cls(source, batch, *(c.flatten().to_numpy() for c in (images, perceptual)), texts.drop_null().to_numpy())

    def where(self, kind: str, number: int) -> str:
        """Source, file and row of a picture or text, by its number among those of the batch."""
        if kind == "text":
            row = np.flatnonzero(self.record_batch.column("text_hash").is_valid())[number]
        else:
            ends = np.cumsum(self.record_batch.column("image_hashes").value_lengths())
            row = np.searchsorted(ends, number, side="right")
        return f"{self.source}: {self.record_batch.column('where')[int(row)]}"


def _read(datasets: Sequence[tuple[Path, dict]], split: str) -> Iterator[tuple[_Batch, int]]:
    """All batches of a split, each with the limit below which hashes are held out."""
    for folder, metadata in datasets:
        for name, source in metadata["sources"].items():
            limit = HASH_RANGE if source["declares_split"] else limit_of(metadata["heldout_fraction"])
            for batch in read_hashes(folder / name, split, source["shards"]):
                yield _Batch.of(name, batch), limit


def _name(datasets: Sequence[tuple[Path, dict]], leaks: dict[tuple[str, int], str]) -> Iterator[str]:
    """Both places of each leak."""
    places: dict[tuple[str, int], str] = {}
    for batch, _ in _read(datasets, "heldout") if leaks else ():
        for kind, values in (("picture", batch.images), ("text", batch.texts)):
            for n in np.flatnonzero(np.isin(values, [value for name, value in leaks if name == kind])):
                places.setdefault((kind, int(values[n])), batch.where(kind, n))
    for (kind, value), where in leaks.items():
        yield f"the {kind} of {where} is held out in {places[kind, value]}"
