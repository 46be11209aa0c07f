"""Documents to batches: mixed, shuffled, arranged, packed, split by rank, and resumed exactly.

The stream of documents is one fixed function of the seed. It is cut into blocks; each block is packed by itself, and the
rows of all blocks, in order, are dealt out to batches and ranks. So where the loader stands is two numbers: block and row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import grain
import numpy as np

from transfusion.codecs.codec import Codec
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig
from transfusion.data.packing import pack
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.store import Stored
from transfusion.seeding import derive_seed, uniform_from
from transfusion.sequence import Batch, Document, Image, Row, Text, Vocabulary, collate, encode_document

SAMPLE = 1024  # documents of a source that are laid out to learn its mean length


class Source(Protocol):
    """Documents by number: raw ones, which are encoded when they are read, or prepared ones."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, id: int) -> RawDocument | Document: ...


@dataclass(frozen=True)
class LoaderState:
    """Where a loader stands: the next row to be read, of which block."""

    block: int = 0
    row: int = 0


BEGINNING = LoaderState()


@dataclass(frozen=True)
class Encoder:
    """Raw documents to documents: the tokenizer, the codec, the ids, and the run's chance."""

    tokenizer: Tokenizer
    codec: Codec
    vocabulary: Vocabulary
    config: DataConfig
    seed: int

    def to_document(self, found: RawDocument | Document, source: str, epoch: int) -> Document:
        """Encoded and arranged; everything random about it follows from (seed, source, epoch, id)."""
        segments = tuple(
            Text(self.tokenizer.encode(part.text), part.loss) if isinstance(part, RawText)
            else Image(self.codec.encode(part.pixels), part.loss, part.max_t) if isinstance(part, RawImage)
            else part
            for part in found.segments
        )  # fmt: skip
        key = derive_seed(self.seed, source, epoch, found.id)
        return reorder_and_drop(Document(segments, found.id, source, key, found.pairs), self.config)


def reorder_and_drop(document: Document, config: DataConfig) -> Document:
    """Captioned pairs: image first in some documents, the caption dropped in some others (section 4.1 and design).

    Only a document of one pair loses its caption, and then nothing is learnt after its image: else the model would
    learn to write empty captions. A document that draws from a given image loses its text, or all that is given.
    """
    if not document.pairs:
        return _drop_conditions(document, config)
    captions, images = document.segments[::2], document.segments[1::2]
    if uniform_from(document.key, "order") < config.image_first:
        first = [replace(image, max_t=min(image.max_t, config.image_first_max_t)) for image in images]
        turned = [part for pair in zip(first, captions, strict=True) for part in pair]
        return replace(document, segments=tuple(turned))
    if len(images) == 1 and uniform_from(document.key, "dropout") < config.caption_dropout:
        return replace(document, segments=(*images, Text((), loss=False)))
    return document


def _drop_conditions(document: Document, config: DataConfig) -> Document:
    """For guidance by text and by image: what the drawn image follows from is left out in some documents."""
    if not draws_from_images(document):
        return document
    *given, drawn = document.segments
    chance = uniform_from(document.key, "condition")
    if chance >= config.condition_text_dropout + config.condition_dropout:
        return document
    kept = [part for part in given if isinstance(part, Image)] if chance < config.condition_text_dropout else []
    return replace(document, segments=(*kept, drawn, Text((), loss=False)))


def draws_from_images(document: RawDocument | Document) -> bool:
    """Whether its last image is learnt behind images that are only given: an edit, say."""
    *given, drawn = document.segments or (None,)
    images = [part for part in given if isinstance(part, Image | RawImage)]
    return isinstance(drawn, Image | RawImage) and drawn.loss and any(not image.loss for image in images)


def holds_edits(source: Source) -> bool:
    """Whether any of its documents draws from a given image, as far as the first ones show."""
    return any(draws_from_images(source[n]) for n in range(min(SAMPLE, len(source))))


class Loader:
    """Batches without end. Iterate it; each item comes with the place from which the next one is read."""

    def __init__(self, sources: Sequence[Source], encoder: Encoder, rank: int = 0, world: int = 1):
        self.sources, self.encoder, self.config = sources, encoder, encoder.config
        self.rank, self.world = rank, world
        self.weights = element_weights(sources, encoder)
        self.stream = _stream(sources, self.weights, encoder.seed)

    def batches(self, start: LoaderState = BEGINNING) -> Iterator[tuple[Batch, LoaderState]]:
        """This rank's batches from there on. A global batch is `rows` x world rows; rank r takes rows r, r + world, ..."""
        length, vocabulary = self.config.seq_len, self.encoder.vocabulary
        waiting: list[Row] = []
        for row, after in self._rows(start):
            waiting.append(row)
            if len(waiting) == self.config.rows * self.world:
                yield collate(waiting[self.rank :: self.world], length, vocabulary), after
                waiting = []

    def _rows(self, start: LoaderState) -> Iterator[tuple[Row, LoaderState]]:
        blocks = grain.MapDataset.range(start.block, 2**62).map(lambda block: (block, self.rows_of(block)))
        threads = self.config.workers
        reading = blocks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        skip = start.row
        for block, rows in reading:
            for number in range(skip, len(rows)):
                last = number + 1 == len(rows)
                yield rows[number], LoaderState(block + 1, 0) if last else LoaderState(block, number + 1)
            skip = 0

    def rows_of(self, block: int) -> list[Row]:
        """All rows of one block: a pure function of the seed and its number."""
        first = block * self.config.shuffle_block
        entries = [self.stream[n] for n in range(first, first + self.config.shuffle_block)]
        documents = [
            self.encoder.to_document(self.sources[source][id_], self.sources[source].name, epoch)
            for source, epoch, id_ in entries
        ]
        seed = derive_seed(self.encoder.seed, "pack", block)
        return pack(documents, self.config.seq_len, self.encoder.vocabulary, seed)


def heldout_batches(source: Source, encoder: Encoder, documents: int) -> list[Batch]:
    """The first documents of a held-out source, in order, always arranged the same and none without its caption."""
    config = replace(encoder.config, caption_dropout=0.0)
    encoder = replace(encoder, config=config)
    found = [encoder.to_document(source[n], source.name, -1) for n in range(min(documents, len(source)))]
    rows = pack(found, config.seq_len, encoder.vocabulary, seed=0)
    return [
        collate(rows[first : first + config.rows], config.seq_len, encoder.vocabulary)
        for first in range(0, len(rows), config.rows)
    ]


def element_weights(sources: Sequence[Source], encoder: Encoder) -> list[float]:
    """How often each source is read, so that it makes up its share of the positions: share / mean length, sum 1."""
    shares = encoder.config.mixture_weights or (1.0,) * len(sources)
    if len(shares) != len(sources):
        names = ", ".join(source.name for source in sources)
        raise ValueError(f"data.mixture_weights has {len(shares)} numbers for {len(sources)} sources ({names})")
    weights = [share / mean_positions(source, encoder) for source, share in zip(sources, shares, strict=True)]
    return [weight / sum(weights) for weight in weights]


def mean_positions(source: Source, encoder: Encoder) -> float:
    """Positions of a document: exact for what is prepared, else the mean of some that chance picks from the whole source."""
    config = encoder.config
    if isinstance(source, Stored):
        return source.mean_positions(encoder.vocabulary, (1 - config.image_first) * config.caption_dropout)
    chosen = range(len(source))
    if len(source) > SAMPLE:  # evenly spread ones would keep time with whatever recurs in it
        chosen = np.random.default_rng(derive_seed("lengths", source.name)).integers(len(source), size=SAMPLE).tolist()
    found = (encoder.to_document(source[i], source.name, 0) for i in chosen)
    return sum(len(encode_document(document, encoder.vocabulary)) for document in found) / len(chosen)


def _stream(sources: Sequence[Source], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Document number n of the run -> (source, its epoch, document id): shuffled anew in each epoch of each source."""
    streams = []
    for number, source in enumerate(sources):
        size = len(source)
        order = grain.MapDataset.range(size).seed(derive_seed(seed, source.name, "order") % 2**31).shuffle().repeat(None)
        streams.append(order.map_with_index(lambda n, id_, number=number, size=size: (number, n // size, id_)))
    return grain.MapDataset.mix(streams, weights=list(weights)) if len(streams) > 1 else streams[0]
