"""Documents to batches: mixed, shuffled, encoded, packed, divided among ranks, and resumed exactly.

The stream of documents is a pure function of the seed. It is divided into blocks, and each block is packed separately. The
rows of all blocks, in order, are dealt to batches and ranks. So a loader's state is two numbers: block and row.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice, pairwise, starmap
from typing import Protocol

import numpy as np

from transfusion.codecs.codec import Codec
from transfusion.codecs.text import Tokenizer
from transfusion.config import DataConfig
from transfusion.data.lengths import Lengths, change, choose_changes, is_edit, kind_of, lengths_of_documents
from transfusion.data.order import Entries, Stream, document_key
from transfusion.data.packing import best_fit, pack, shuffle_bins, split_document, split_texts
from transfusion.data.raw import RawDocument, RawImage, RawText
from transfusion.data.store import StoredSource
from transfusion.seeding import derive_seed, derive_seeds
from transfusion.sequence import Batch, Chunk, Document, Image, Row, Text, Vocabulary, collate, encode_document

ENCODED_TOGETHER = 64  # documents of a block whose raw images are in memory at once
PACKED_TOGETHER = 2**14  # documents whose blocks are packed together if their lengths are known
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


@dataclass(frozen=True)
class Documents:
    """Documents of the stream, which are read when they are needed."""

    sources: Sequence[Source]
    entries: Entries
    changes: np.ndarray  # of each document
    encoded: Mapping[int, Document]  # those that were encoded to learn their lengths
    config: DataConfig

    def read(self, number: int, is_checked: bool = True) -> Document:
        """One document, changed. `is_checked=False`: only its segments are needed (see `StoredSource.outline`)."""
        source, id_ = self.sources[self.entries.sources[number]], int(self.entries.ids[number])
        if (document := self.encoded.get(number)) is None:
            document = source[id_] if is_checked else source.outline(id_)
        document = replace(document, source=source.name, key=int(self.entries.keys[number]))
        return change(document, self.changes[number], self.config)


@dataclass(frozen=True)
class Packed:
    """How blocks of documents are packed. Row n has the chunks from ends[n - 1] to ends[n] - 1."""

    documents: Documents
    # (chunks, 3), row by row: number of the document, first position in it, end; of a whole document 0 and its length
    chunks: np.ndarray
    ends: np.ndarray  # (rows,)
    rows: list[range]  # of each block


class Loader:
    """The packed rows of each step, without end. A step has `batch_size` rows over all ranks.

    Every rank packs all documents, by their lengths alone, and reads only those of its own rows. The lengths of prepared
    documents are known. Others are encoded by every rank.
    """

    def __init__(self, sources: Sequence[Source], encoder: DocumentEncoder, batch_size: int, rank: int = 0, world: int = 1):
        self.sources, self.encoder, self.config, self.vocabulary = sources, encoder, encoder.config, encoder.vocabulary
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.weights = document_weights(sources, encoder)
        names, sizes = [source.name for source in sources], [len(source) for source in sources]
        self.stream = Stream(names, sizes, self.weights, encoder.seed, self.config.shuffle_block)
        is_known = all(isinstance(source, StoredSource) for source in sources)
        self.blocks_together = max(1, PACKED_TOGETHER // self.config.shuffle_block) if is_known else 1
        self._packed = lru_cache(maxsize=1)(self._pack)

    def batches(self, start: LoaderState = START) -> Iterator[tuple[list[Row], LoaderState]]:
        """The same as `read_batches`; a thread reads one step ahead."""
        with ThreadPoolExecutor(1, "loader") as thread:
            batches = self.read_batches(start)
            batch = thread.submit(next, batches)
            while True:
                result = batch.result()
                batch = thread.submit(next, batches)
                yield result

    def read_batches(self, start: LoaderState = START) -> Iterator[tuple[list[Row], LoaderState]]:
        """This rank's rows of each step from `start`, and the state from which the next step is read. Steps are the same for
        any number of ranks; rank r gets their rows r, r + world, ..."""
        rows, total, first = [], 0, start.row
        for number in count(start.block):
            block = self.block(number)
            for row in range(first, len(block)):
                if total % self.world == self.rank:
                    rows.append(block[row])
                total += 1
                if total == self.batch_size:
                    yield rows, LoaderState(number, row + 1) if row + 1 < len(block) else LoaderState(number + 1, 0)
                    rows, total = [], 0
            first = 0

    def block(self, number: int) -> "Block":
        """The rows of one block: a pure function of the seed and the block's number. ValueError when a document cannot be
        split to fit into a row."""
        together, number = divmod(number, self.blocks_together)
        return Block(self._packed(together), number, self.vocabulary)

    def _pack(self, number: int) -> Packed:
        """Packs some blocks together: the larger the arrays, the less time a document takes."""
        blocks = np.arange(number * self.blocks_together, (number + 1) * self.blocks_together)
        entries = self.stream.read(int(blocks[0]), len(blocks))
        lengths, encoded = self._lengths(entries)
        changes = choose_changes(entries.keys, lengths.kinds, self.config)
        documents = Documents(self.sources, entries, changes, encoded, self.config)
        positions = lengths.after(changes, self.config.clean_copies)
        numbers, begins, chunk_ends, chunk_lengths = self._split(positions, lengths.images, documents)
        shuffled = np.argsort((entries.keys[numbers] >> np.uint64(48)).astype(np.uint16), kind="stable")
        chunk_blocks = numbers // self.config.shuffle_block
        bins, bin_blocks = best_fit(chunk_lengths[shuffled], chunk_blocks[shuffled], self.config.seq_len)
        order, ends = shuffle_bins(bins, bin_blocks, derive_seeds(derive_seed(self.encoder.seed, "pack"), blocks))
        bounds = np.searchsorted(bin_blocks, np.arange(len(blocks) + 1)).tolist()
        chunks = np.stack([numbers, begins, chunk_ends], axis=1)[shuffled[order]]
        return Packed(documents, chunks, ends, list(starmap(range, pairwise(bounds))))

    def _lengths(self, entries: Entries) -> tuple[Lengths, dict[int, Document]]:
        """The lengths of documents, and those documents that were encoded for that."""
        table, encoded = np.empty((len(Lengths._fields), len(entries.ids)), np.int64), {}
        for number, source in enumerate(self.sources):
            of_source = np.flatnonzero(entries.sources == number)
            if isinstance(source, StoredSource):
                lengths = source.lengths(entries.ids[of_source], self.vocabulary.patch_size)
            else:
                documents = self._encode(source, entries.ids[of_source].tolist())
                encoded |= zip(of_source.tolist(), documents, strict=True)
                lengths = lengths_of_documents(documents, self.vocabulary)
            for row, values in zip(table, lengths, strict=True):
                row[of_source] = values
        return Lengths(*table), encoded

    def _encode(self, source: Source, ids: list[int]) -> list[Document]:
        parts = (ids[n : n + ENCODED_TOGETHER] for n in range(0, len(ids), ENCODED_TOGETHER))
        return [document for part in parts for document in self.encoder.encode([source[id_] for id_ in part])]

    def _split(
        self, lengths: np.ndarray, images: np.ndarray, documents: Documents
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The columns of `Packed.chunks`, in any order, and the positions of the chunks in a row. Texts are split by their
        lengths, documents with images by their segments."""
        seq_len, clean_copies = self.config.seq_len, self.config.clean_copies
        if lengths.max() <= seq_len:
            return np.arange(len(lengths)), np.zeros_like(lengths), lengths, lengths
        is_long, is_text = lengths > seq_len, (images == 0) & (seq_len > 1)
        numbers, texts = np.flatnonzero(~is_long), np.flatnonzero(is_long & is_text)
        counts, text_ends = split_texts(lengths[texts], seq_len)
        parts = [(numbers, lengths[numbers], np.zeros_like(numbers)),
                 (np.repeat(texts, counts), text_ends, np.zeros_like(text_ends))]  # fmt: skip
        for number in np.flatnonzero(is_long & ~is_text).tolist():
            document = documents.read(number, is_checked=False)
            long_ends, long_copies = split_document(document, seq_len, self.vocabulary, clean_copies)
            parts.append((np.full(len(long_ends), number), np.array(long_ends), np.array(long_copies)))
        numbers, ends, copies = map(np.concatenate, zip(*parts, strict=True))
        begins = np.concatenate([[0], ends[:-1]]) * np.concatenate([[0], numbers[1:] == numbers[:-1]])
        return numbers, begins, ends, ends - begins + copies


class Block(Sequence):
    """The rows of one block. The documents of a row are read when it is taken."""

    def __init__(self, packed: Packed, number: int, vocabulary: Vocabulary):
        self.packed, self.rows, self.vocabulary = packed, packed.rows[number], vocabulary
        self.clean_copies = packed.documents.config.clean_copies
        self._split: dict[int, Chunk] = {}  # documents in several chunks, so that each is read once

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        row = self.rows[number]
        begin = self.packed.ends[row - 1] if row else 0
        return Row(tuple(self._chunk(*chunk) for chunk in self.packed.chunks[begin : self.packed.ends[row]].tolist()))

    def _chunk(self, number: int, begin: int, end: int) -> Chunk:
        if (chunk := self._split.get(number)) is None:
            document = self.packed.documents.read(number)
            chunk = encode_document(document, self.vocabulary, clean_copies=self.clean_copies)
            if end - begin == len(chunk):
                return chunk
            self._split[number] = chunk
        return chunk.part(begin, end)


def heldout_batches(source: Source, encoder: DocumentEncoder, documents: int, num_rows: int) -> list[Batch]:
    """Batches of at most `num_rows` rows with the first held-out documents, in order, with the same noise and t for every
    seed. No captions and no conditions are dropped, and images before their caption have t = 0 and no loss, as in a prompt:
    so the figures do not depend on the settings that change documents and t for training."""
    clean_copies = encoder.config.clean_copies
    config = replace(
        encoder.config, caption_dropout=0.0, condition_text_dropout=0.0, condition_dropout=0.0, image_first_max_t=0.0,
        clean_copies=False,  # else `image_first_max_t` is ignored
    )  # fmt: skip
    encoder = replace(encoder, config=config, seed=0)
    encoded = [encoder.to_document(source[n], source.name, -1) for n in range(min(documents, len(source)))]
    rows = pack(encoded, config.seq_len, encoder.vocabulary, seed=0, clean_copies=clean_copies)
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
        return source.mean_positions(encoder.vocabulary, config)
    ids = range(len(source))
    if len(source) > NUM_PROBED_DOCUMENTS:  # random: evenly spaced ids could match a period of the source
        rng = np.random.default_rng(derive_seed("lengths", source.name))
        ids = rng.integers(len(source), size=NUM_PROBED_DOCUMENTS).tolist()
    documents = (encoder.to_document(source[id_], source.name, 0) for id_ in ids)
    lengths = (len(encode_document(it, encoder.vocabulary, clean_copies=config.clean_copies)) for it in documents)
    return sum(lengths) / len(ids)
