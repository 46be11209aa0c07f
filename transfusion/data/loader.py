"""Documents to batches: mixed, shuffled, encoded, packed, divided among ranks, and resumed exactly.

The stream of documents is a pure function of the seed. It is divided into blocks, and each block is packed separately. The
rows of all blocks, in order, are dealt to batches and ranks. So a loader's state is two numbers: block and row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import grain
import numpy as np

from transfusion.codecs.codec import Codec
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig
from transfusion.data.packing import pack
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.store import StoredSource
from transfusion.seeding import derive_seed, uniform_from
from transfusion.sequence import Batch, Document, Image, Row, Text, Vocabulary, collate, encode_document

ENCODED_TOGETHER = 64  # documents of a block whose raw images are in memory at once
NUM_PROBED_DOCUMENTS = 1024  # documents of a source that are encoded to estimate its mean length


class Source(Protocol):
    """Documents by number: raw ones, which are encoded when they are read, or prepared ones."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, id: int) -> RawDocument | Document: ...


@dataclass(frozen=True)
class LoaderState:
    """The position of a loader: the block and the row that it reads next."""

    block: int = 0
    row: int = 0


START = LoaderState()


@dataclass(frozen=True)
class DocumentEncoder:
    """Raw documents to documents: the tokenizer, the codec, the ids, and the run's seed."""

    tokenizer: Tokenizer
    codec: Codec
    vocabulary: Vocabulary
    config: DataConfig
    seed: int

    def to_document(self, document: RawDocument | Document, source: str, epoch: int) -> Document:
        """The document, encoded, reordered and dropped; its randomness is derived from (seed, source, epoch, id)."""
        return self.to_documents([(document, source, epoch)])[0]

    def to_documents(self, documents: Sequence[tuple[RawDocument | Document, str, int]]) -> list[Document]:
        """`to_document` of each (document, source, epoch). The texts of all are encoded together."""
        texts: dict[bool, list[str]] = {True: [], False: []}  # by `parse_special`
        for document, *_ in documents:
            for part in document.segments:
                if isinstance(part, RawText):
                    texts[part.parse_special].append(part.text)
        ids = {parse: iter(self.tokenizer.encode_batch(group, parse) if group else ()) for parse, group in texts.items()}
        return [self._to_document(*entry, ids) for entry in documents]

    def _to_document(
        self, document: RawDocument | Document, source: str, epoch: int, ids: dict[bool, Iterator[tuple[int, ...]]]
    ) -> Document:
        segments = tuple(
            Text(next(ids[part.parse_special]), part.loss) if isinstance(part, RawText)
            else Image(self.codec.encode(part.pixels), part.loss, part.max_t) if isinstance(part, RawImage)
            else part
            for part in document.segments
        )  # fmt: skip
        key = derive_seed(self.seed, source, epoch, document.id)
        return reorder_and_drop(Document(segments, document.id, source, key, document.pairs), self.config)


def reorder_and_drop(document: Document, config: DataConfig) -> Document:
    """Caption-image pairs (section 4.1): in some documents the image is first, in some the caption is dropped. The caption
    is dropped only in documents of one pair. An empty Text without loss then follows the image, so that eos is no target:
    otherwise the model would be trained to end without a caption. For edits see `_drop_conditions`."""
    if not document.pairs:
        return _drop_conditions(document, config)
    captions, images = document.segments[::2], document.segments[1::2]
    if uniform_from(document.key, "order") < config.image_first:
        images = [replace(image, max_t=min(image.max_t, config.image_first_max_t)) for image in images]
        segments = [part for pair in zip(images, captions, strict=True) for part in pair]
        return replace(document, segments=tuple(segments))
    if len(images) == 1 and uniform_from(document.key, "dropout") < config.caption_dropout:
        return replace(document, segments=(*images, Text((), loss=False)))
    return document


def _drop_conditions(document: Document, config: DataConfig) -> Document:
    """Drops the text of some edits, and all conditions (text and images) of others, to train the branches of guidance."""
    if not is_edit(document):
        return document
    *conditions, target = document.segments
    u = uniform_from(document.key, "condition")
    if u >= config.condition_text_dropout + config.condition_dropout:
        return document
    images = [part for part in conditions if isinstance(part, Image)] if u < config.condition_text_dropout else []
    return replace(document, segments=(*images, target, Text((), loss=False)))


def is_edit(document: RawDocument | Document) -> bool:
    """Whether its last segment is an image with loss, and an image without loss (a condition) is before it."""
    *conditions, target = document.segments or (None,)
    images = [part for part in conditions if isinstance(part, Image | RawImage)]
    return isinstance(target, Image | RawImage) and target.loss and any(not image.loss for image in images)


def contains_edits(source: Source) -> bool:
    """Whether one of its first `NUM_PROBED_DOCUMENTS` documents is an edit."""
    return any(is_edit(source[n]) for n in range(min(NUM_PROBED_DOCUMENTS, len(source))))


def read_pairs(source: Source, count: int) -> Iterator[tuple[int, str, np.ndarray]]:
    """(document, caption, pixels) of the first `count` documents of pairs, one image of each. Of a held-out document this is
    an image that is held out itself: the others have no loss (see `heldout.py`)."""
    pairs = ((n, source[n].pair) for n in range(len(source)))
    return islice(((n, *pair) for n, pair in pairs if pair is not None), count)


class Loader:
    """The packed rows of each step, without end. A step has `batch_size` rows over all ranks."""

    def __init__(self, sources: Sequence[Source], encoder: DocumentEncoder, batch_size: int, rank: int = 0, world: int = 1):
        self.sources, self.encoder, self.config, self.vocabulary = sources, encoder, encoder.config, encoder.vocabulary
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.weights = document_weights(sources, encoder)
        self.stream = _build_stream(sources, self.weights, encoder.seed)

    def batches(self, start: LoaderState = START) -> Iterator[tuple[list[Row], LoaderState]]:
        """This rank's rows of each step from `start`, and the state from which the next step is read. Steps are the same for
        any number of ranks; rank r gets their rows r, r + world, ..."""
        pending: list[Row] = []
        for row, state in self._rows(start):
            pending.append(row)
            if len(pending) == self.batch_size:
                yield pending[self.rank :: self.world], state
                pending = []

    def _rows(self, start: LoaderState) -> Iterator[tuple[Row, LoaderState]]:
        blocks = grain.MapDataset.range(start.block, 2**62).map(lambda block: (block, self.pack_block(block)))
        threads = self.config.workers
        iterator = blocks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        skip = start.row
        for block, rows in iterator:
            for number in range(skip, len(rows)):
                is_last = number + 1 == len(rows)
                yield rows[number], LoaderState(block + 1, 0) if is_last else LoaderState(block, number + 1)
            skip = 0

    def pack_block(self, block: int) -> list[Row]:
        """All rows of one block: a pure function of the seed and the block's number."""
        first = block * self.config.shuffle_block
        entries = [self.stream[n] for n in range(first, first + self.config.shuffle_block)]
        documents: list[Document] = []
        for n in range(0, len(entries), ENCODED_TOGETHER):
            documents += self.encoder.to_documents([
                (self.sources[source][id_], self.sources[source].name, epoch)
                for source, epoch, id_ in entries[n : n + ENCODED_TOGETHER]
            ])  # fmt: skip
        seed = derive_seed(self.encoder.seed, "pack", block)
        return pack(documents, self.config.seq_len, self.encoder.vocabulary, seed)


def heldout_batches(source: Source, encoder: DocumentEncoder, documents: int, num_rows: int) -> list[Batch]:
    """Batches of at most `num_rows` rows with the first held-out documents, in order, with the same noise and t for every
    seed. No captions and no conditions are dropped, and images before their caption have t = 0 and no loss, as in a prompt:
    so the figures do not depend on the settings that change documents and t for training."""
    config = replace(
        encoder.config, caption_dropout=0.0, condition_text_dropout=0.0, condition_dropout=0.0, image_first_max_t=0.0
    )
    encoder = replace(encoder, config=config, seed=0)
    encoded = [encoder.to_document(source[n], source.name, -1) for n in range(min(documents, len(source)))]
    rows = pack(encoded, config.seq_len, encoder.vocabulary, seed=0)
    return [
        collate(rows[first : first + num_rows], config.seq_len, encoder.vocabulary)
        for first in range(0, len(rows), num_rows)
    ]


def document_weights(sources: Sequence[Source], encoder: DocumentEncoder) -> list[float]:
    """Weight of each source when documents are sampled: mixture weight / mean length, normalised to sum 1. Mixture weights
    are shares of positions, so sources of long documents are sampled less often. ValueError when their number is not the
    number of sources."""
    mixture_weights = encoder.config.mixture_weights or (1.0,) * len(sources)
    if len(mixture_weights) != len(sources):
        names = ", ".join(source.name for source in sources)
        raise ValueError(f"data.mixture_weights has {len(mixture_weights)} numbers for {len(sources)} sources ({names})")
    weights = [weight / mean_positions(source, encoder) for source, weight in zip(sources, mixture_weights, strict=True)]
    return [weight / sum(weights) for weight in weights]


def mean_positions(source: Source, encoder: DocumentEncoder) -> float:
    """Mean positions of a document: exact for prepared data (but for dropped conditions), else from a sample."""
    config = encoder.config
    if isinstance(source, StoredSource):
        return source.mean_positions(encoder.vocabulary, (1 - config.image_first) * config.caption_dropout)
    ids = range(len(source))
    if len(source) > NUM_PROBED_DOCUMENTS:  # random: evenly spaced ids could match a period of the source
        rng = np.random.default_rng(derive_seed("lengths", source.name))
        ids = rng.integers(len(source), size=NUM_PROBED_DOCUMENTS).tolist()
    documents = (encoder.to_document(source[id_], source.name, 0) for id_ in ids)
    return sum(len(encode_document(document, encoder.vocabulary)) for document in documents) / len(ids)


def _build_stream(sources: Sequence[Source], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Maps n, a position in the stream, to (source index, epoch, document id). Each epoch of a source has its own order."""
    streams = []
    for number, source in enumerate(sources):
        size = len(source)
        order = grain.MapDataset.range(size).seed(derive_seed(seed, source.name, "order") % 2**31).shuffle().repeat(None)
        streams.append(order.map_with_index(lambda n, id_, number=number, size=size: (number, n // size, id_)))
    return grain.MapDataset.mix(streams, weights=list(weights)) if len(streams) > 1 else streams[0]
