"""Documents to batches: mixed, shuffled, encoded, packed, divided among ranks, and resumed exactly.

The stream of documents is a pure function of the seed. It is divided into blocks, and each block is packed separately. The
rows of all blocks, in order, are dealt to batches and ranks. So a loader's state is two numbers: block and row.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Protocol

import numpy as np

from transfusion.codecs.codec import Codec
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig
from transfusion.data.lengths import Lengths, change, choose_changes, is_edit, kind_of, lengths_of_documents
from transfusion.data.order import Entries, Stream, document_key
from transfusion.data.packing import best_fit, pack, shuffle_rows, split_document, split_texts
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.store import StoredSource
from transfusion.seeding import derive_seed
from transfusion.sequence import Batch, Chunk, Document, Image, Row, Text, Vocabulary, collate, encode_document

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
        """The document, encoded and changed (`lengths.choose_changes`); its randomness is derived from (seed, source, epoch,
        id)."""
        [encoded] = self.encode([document])
        key = document_key(self.seed, source, epoch, document.id)
        [how] = choose_changes(np.array([key], np.uint64), np.array([kind_of(encoded)]), self.config)
        return change(replace(encoded, source=source, key=key), how, self.config)

    def encode(self, documents: Sequence[RawDocument | Document]) -> list[Document]:
        """The documents, encoded, all segments in order. The texts of all are encoded together."""
        texts: dict[bool, list[str]] = {True: [], False: []}  # by `parse_special`
        for document in documents:
            for part in document.segments:
                if isinstance(part, RawText):
                    texts[part.parse_special].append(part.text)
        ids = {parse: iter(self.tokenizer.encode_batch(group, parse) if group else ()) for parse, group in texts.items()}
        return [self._encode(document, ids) for document in documents]

    def _encode(self, document: RawDocument | Document, ids: dict[bool, Iterator[tuple[int, ...]]]) -> Document:
        segments = tuple(
            Text(next(ids[part.parse_special]), part.loss) if isinstance(part, RawText)
            else Image(self.codec.encode(part.pixels), part.loss, part.max_t) if isinstance(part, RawImage)
            else part
            for part in document.segments
        )  # fmt: skip
        return Document(segments, document.id, pairs=document.pairs)


def contains_edits(source: Source) -> bool:
    """Whether one of its first `NUM_PROBED_DOCUMENTS` documents is an edit."""
    return any(is_edit(source[n]) for n in range(min(NUM_PROBED_DOCUMENTS, len(source))))


def read_pairs(source: Source, count: int) -> Iterator[tuple[int, str, np.ndarray]]:
    """(document, caption, pixels) of the first `count` documents of pairs, one image of each. Of a held-out document this is
    an image that is held out itself: the others have no loss (see `heldout.py`)."""
    pairs = ((n, source[n].pair) for n in range(len(source)))
    return islice(((n, *pair) for n, pair in pairs if pair is not None), count)


@dataclass
class Block:
    """How one block of documents is packed. Row n has the chunks from ends[n - 1] to ends[n] - 1."""

    entries: Entries
    changes: np.ndarray  # of each document
    documents: dict[int, Document]  # those that were encoded to learn their lengths
    chunks: np.ndarray | None = None  # (chunks, 3), row by row: number of the document in `entries`, first position in it, end
    ends: np.ndarray | None = None  # (rows,)
    encoded: dict[int, Chunk] = field(default_factory=dict)  # those that are split, so that each is laid out once


class Loader:
    """The packed rows of each step, without end. A step has `batch_size` rows over all ranks.

    Every rank packs all documents, by their lengths alone, and reads only those of its own rows. The lengths of prepared data
    are known; other documents are encoded by every rank.
    """

    def __init__(self, sources: Sequence[Source], encoder: DocumentEncoder, batch_size: int, rank: int = 0, world: int = 1):
        self.sources, self.encoder, self.config, self.vocabulary = sources, encoder, encoder.config, encoder.vocabulary
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.weights = document_weights(sources, encoder)
        names, sizes = [source.name for source in sources], [len(source) for source in sources]
        self.stream = Stream(names, sizes, self.weights, encoder.seed, self.config.shuffle_block)

    def batches(self, start: LoaderState = START) -> Iterator[tuple[list[Row], LoaderState]]:
        """This rank's rows of each step from `start`, and the state from which the next step is read. Steps are the same for
        any number of ranks; rank r gets their rows r, r + world, ... A thread reads one step ahead."""
        with ThreadPoolExecutor(1, "loader") as thread:
            batches = self._batches(start)
            batch = thread.submit(next, batches)
            while True:
                result = batch.result()
                batch = thread.submit(next, batches)
                yield result

    def _batches(self, start: LoaderState) -> Iterator[tuple[list[Row], LoaderState]]:
        rows, total, first = [], 0, start.row
        for number in count(start.block):
            block = self.pack_block(number)
            last = len(block.ends) - 1
            for row in range(first, last + 1):
                if total % self.world == self.rank:
                    rows.append(self.read_row(block, row))
                total += 1
                if total == self.batch_size:
                    yield rows, LoaderState(number, row + 1) if row < last else LoaderState(number + 1, 0)
                    rows, total = [], 0
            first = 0

    def pack_block(self, number: int) -> Block:
        """The rows of one block: a pure function of the seed and the block's number. ValueError when a document cannot be
        split to fit into a row."""
        entries = self.stream.block(number)
        lengths, documents = self._lengths(entries)
        block = Block(entries, choose_changes(entries.keys, lengths.kinds, self.config), documents)
        chunks = self._split(block, lengths.after(block.changes), lengths.images)
        shuffled = np.argsort((entries.keys[chunks[:, 0]] >> np.uint64(48)).astype(np.uint16), kind="stable")
        bins = best_fit((chunks[:, 2] - chunks[:, 1])[shuffled], self.config.seq_len)
        order, block.ends = shuffle_rows(bins, derive_seed(self.encoder.seed, "pack", number))
        block.chunks = chunks[shuffled[order]]
        return block

    def read_row(self, block: Block, number: int) -> Row:
        """One row of a block, with all its documents read."""
        begin = block.ends[number - 1] if number else 0
        chunks = block.chunks[begin : block.ends[number]].tolist()
        return Row(tuple(self._read_chunk(block, *chunk) for chunk in chunks))

    def _read_chunk(self, block: Block, entry: int, begin: int, end: int) -> Chunk:
        if (chunk := block.encoded.get(entry)) is None:
            chunk = encode_document(self._read_document(block, entry), self.vocabulary)
            if begin == 0 and end == len(chunk):
                return chunk
            block.encoded[entry] = chunk
        return chunk.part(begin, end)

    def _read_document(self, block: Block, entry: int) -> Document:
        entries = block.entries
        source = self.sources[entries.sources[entry]]
        document = block.documents.get(entry) or source[int(entries.ids[entry])]
        document = replace(document, source=source.name, key=int(entries.keys[entry]))
        return change(document, block.changes[entry], self.config)

    def _lengths(self, entries: Entries) -> tuple[Lengths, dict[int, Document]]:
        """The lengths of documents, and those documents that were encoded for that."""
        parts, documents, end = [], {}, 0
        counts = np.bincount(entries.sources, minlength=len(self.sources)).tolist()
        for source, number in zip(self.sources, counts, strict=True):
            begin, end = end, end + number
            if isinstance(source, StoredSource):
                parts.append(source.lengths(entries.ids[begin:end], self.vocabulary.patch_size))
            else:
                encoded = self._encode(source, entries.ids[begin:end].tolist())
                documents |= zip(range(begin, end), encoded, strict=True)
                parts.append(lengths_of_documents(encoded, self.vocabulary))
        return Lengths(*map(np.concatenate, zip(*parts, strict=True))), documents

    def _encode(self, source: Source, ids: list[int]) -> list[Document]:
        parts = (ids[n : n + ENCODED_TOGETHER] for n in range(0, len(ids), ENCODED_TOGETHER))
        return [document for part in parts for document in self.encoder.encode([source[id_] for id_ in part])]

    def _split(self, block: Block, lengths: np.ndarray, images: np.ndarray) -> np.ndarray:
        """`Block.chunks` of all documents, in any order. Only documents with images that are longer than a row are read."""
        if lengths.max() <= self.config.seq_len:
            return np.stack([np.arange(len(lengths)), np.zeros_like(lengths), lengths], axis=1)
        is_long, is_text = lengths > self.config.seq_len, (images == 0) & (self.config.seq_len > 1)
        entries, texts = np.flatnonzero(~is_long), np.flatnonzero(is_long & is_text)
        counts, text_ends = split_texts(lengths[texts], self.config.seq_len)
        parts = [(entries, lengths[entries]), (np.repeat(texts, counts), text_ends)]
        for entry in np.flatnonzero(is_long & ~is_text).tolist():
            chunks = split_document(self._read_document(block, entry), self.config.seq_len, self.vocabulary)
            parts.append((np.full(len(chunks), entry), np.cumsum([len(chunk) for chunk in chunks])))
        entries, ends = map(np.concatenate, zip(*parts, strict=True))
        begins = np.concatenate([[0], ends[:-1]]) * np.concatenate([[0], entries[1:] == entries[:-1]])
        return np.stack([entries, begins, ends], axis=1)


def heldout_batches(source: Source, encoder: DocumentEncoder, documents: int, num_rows: int) -> list[Batch]:
    """Batches of at most `num_rows` rows with the first held-out documents, in order, always the same. No captions and no
    conditions are dropped."""
    config = replace(encoder.config, caption_dropout=0.0, condition_text_dropout=0.0, condition_dropout=0.0)
    encoder = replace(encoder, config=config)
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
