"""Statistics of a source from one full read: faults by file and row, and counts of documents, texts, tokens and images."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from transfusion.chat import describe_layout
from transfusion.codecs.text import Tokenizer
from transfusion.config import ChatLayout
from transfusion.data.heldout import hash_document, hash_pixels, perceptual_hashes
from transfusion.data.prepare import DUPLICATE_ID, check_id
from transfusion.data.raw import Fault, RawDocument, RawImage, RawText
from transfusion.data.reading.account import Account
from transfusion.data.reading.readers import Reader
from transfusion.data.store import PreparedFolder, StoredSource
from transfusion.sequence import Text

UNIT_SIZE = 2048  # records of a unit, at most
MAX_PENDING, MAX_PENDING_BYTES = 64, 2**20  # documents, and bytes of their pixels, that are hashed together


@dataclass
class Survey:
    """Statistics of one source."""

    name: str
    records: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # by kind
    documents: Counter[str] = field(default_factory=Counter)  # by the segments in them
    texts: int = 0
    characters: int = 0
    tokens: int = 0
    images: int = 0
    sizes: Counter[str] = field(default_factory=Counter)  # of images, width x height (or of latents)
    chat: ChatLayout | None = None  # of its conversations
    account: Account = field(default_factory=Account)
    lengths: array = field(default_factory=lambda: array("I"))  # tokens of each document

    def add(self, kinds: Sequence[str], tokens: int) -> None:
        """Count a document: the kinds of its segments ("text", "image"), and its number of tokens."""
        content = ("text only" if "image" not in kinds else "images only" if "text" not in kinds else
                   "one text, one image" if len(kinds) == 2 else "interleaved")  # fmt: skip
        self.documents[content] += 1
        self.texts += kinds.count("text")
        self.images += kinds.count("image")
        self.tokens += tokens
        self.lengths.append(tokens)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Rows of a table, (name, value)."""
        yield "records", f"{self.records:,}"
        if self.faults:
            yield "  left out", f"{self.faults.total():,}: {_format_counts(self.faults)}"
        yield "documents", f"{self.documents.total():,}: {_format_counts(self.documents)}"
        if self.chat is not None:
            yield "chat layout", describe_layout(self.chat)
        yield "texts", f"{self.texts:,}" + (f", {self.characters:,} characters" if self.characters else "")
        yield "tokens", f"{self.tokens:,}"
        if self.lengths:
            median, p95, longest = np.percentile(self.lengths, (50, 95, 100))
            yield "  a document", f"median {median:,.0f}, 95 % up to {p95:,.0f}, longest {longest:,.0f}"
        yield "images", f"{self.images:,}"
        if self.sizes:
            others = len(self.sizes) - 5
            yield "  sizes", _format_counts(self.sizes, 5) + (f" and {others:,} more" if others > 0 else "")


@dataclass
class Duplicates:
    """Counts equal documents, and images that look alike, by 64-bit hashes: 8 bytes a document and 16 an image."""

    documents: array = field(default_factory=lambda: array("Q"))
    images: array = field(default_factory=lambda: array("Q"))
    perceptual: array = field(default_factory=lambda: array("Q"))  # of each image
    _pending: list[RawDocument] = field(default_factory=list)  # not hashed yet: together is faster than one by one
    _pending_bytes: int = 0  # of their pixels

    def add(self, document: RawDocument) -> None:
        self._pending.append(document)
        self._pending_bytes += sum(part.pixels.nbytes for part in document.segments if isinstance(part, RawImage))
        if len(self._pending) >= MAX_PENDING or self._pending_bytes >= MAX_PENDING_BYTES:
            self._hash_pending()

    def _hash_pending(self) -> None:
        pixels = [part.pixels for document in self._pending for part in document.segments if isinstance(part, RawImage)]
        hashes = list(map(hash_pixels, pixels))
        self.images.extend(hashes)
        self.perceptual.extend(perceptual_hashes(pixels))
        remaining = iter(hashes)
        self.documents.extend(hash_document(document, remaining) for document in self._pending)
        self._pending, self._pending_bytes = [], 0

    def __str__(self) -> str:
        self._hash_pending()
        images, first = np.unique(self.images, return_index=True)
        hashes = np.asarray(self.perceptual, np.uint64)[first]
        hashes = hashes[hashes != 0]
        documents = len(self.documents) - len(np.unique(self.documents))
        return (
            f"duplicates: {documents:,} documents (same pixels and text as an earlier one), "
            f"{len(self.images) - len(images):,} pictures (same pixels); likely duplicates: "
            f"{len(hashes) - len(np.unique(hashes)):,} pictures (same perceptual hash)"
        )


def survey(
    reader: Reader, tokenizer: Tokenizer | None, on_fault: Callable[[Fault], None] = lambda fault: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None, duplicates: Duplicates | None = None,
) -> Survey:  # fmt: skip
    """Read all of a source. Each fault is passed to `on_fault`, and each document is added to `duplicates`; without a
    tokenizer no tokens are counted."""
    result, ids = Survey(reader.name), set()
    units = reader.units(UNIT_SIZE)
    total = sum(unit.rows for unit in units)
    for unit in units:
        for document in reader.read(unit, result.account):
            result.records += 1
            document = check_id(document, ids)
            if isinstance(document, Fault):
                result.faults[document.kind] += 1
                if document.kind == DUPLICATE_ID:
                    result.account.reject("records", "document", DUPLICATE_ID, document.where)
                on_fault(document)
                continue
            _count_document(result, document, tokenizer)
            if duplicates is not None:
                duplicates.add(document)
            if result.records % 256 == 0:
                on_progress(min(result.records, total), total)
    on_progress(total, total)
    reader.close_account(result.account)
    return result


def _count_document(result: Survey, document: RawDocument, tokenizer: Tokenizer | None) -> None:
    texts = [part for part in document.segments if isinstance(part, RawText)]
    result.add(
        ["image" if isinstance(part, RawImage) else "text" for part in document.segments],
        sum(len(tokenizer.encode(part.text, part.parse_special)) for part in texts) if tokenizer else 0,
    )
    result.characters += sum(len(part.text) for part in texts)
    for part in document.segments:
        if isinstance(part, RawImage):
            result.sizes["{1}x{0}".format(*part.pixels.shape)] += 1


def survey_stored(stored: StoredSource) -> Survey:
    """The statistics of a prepared source; sizes are those of latents, height x width."""
    chat = stored.prepared.chat_layout([stored.name])
    result = Survey(f"{stored.name} ({stored.split})", records=len(stored), chat=chat)
    for id_ in range(len(stored)):
        segments = stored[id_].segments
        kinds = ["text" if isinstance(part, Text) else "image" for part in segments]
        result.add(kinds, sum(len(part.tokens) for part in segments if isinstance(part, Text)))
        result.sizes.update("latent {}x{}".format(*part.shape) for part in segments if not isinstance(part, Text))
    return result


def survey_prepared(prepared: PreparedFolder) -> list[Survey]:
    """The statistics of every source and split of a prepared folder, with the records that were left out."""
    surveys = []
    for name in prepared.names:
        info = prepared.metadata["sources"][name]
        for split in ("train", "heldout"):
            result = survey_stored(prepared.source(name, split))
            if split == "train":
                result.faults.update(info["faults"])
                result.records += result.faults.total()
                result.account = Account.from_json(info["account"])
            surveys.append(result)
    return surveys


def first_texts(readers: Sequence[Reader], documents: int) -> list[str]:
    """The texts of the first documents of each source."""
    return [
        part.text
        for reader in readers
        for raw in islice((record for unit in reader.units(UNIT_SIZE) for record in reader.read(unit)), documents)
        if isinstance(raw, RawDocument)
        for part in raw.segments
        if isinstance(part, RawText)
    ]


def _format_counts(counts: Counter[str], limit: int = 8) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common(limit))
