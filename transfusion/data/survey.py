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
from transfusion.data.prepare import DUPLICATE_ID, check_id
from transfusion.data.raw import Fault, RawDocument, RawText
from transfusion.data.reading.account import Account, counted
from transfusion.data.reading.readers import Reader
from transfusion.data.store import PreparedFolder, StoredSource
from transfusion.data.summaries import Summarizer, Summary
from transfusion.sequence import Text

UNIT_SIZE = 512  # records of a unit, at most


@dataclass
class Survey:
    """Statistics of one source."""

    name: str
    records: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # by kind
    documents: Counter[str] = field(default_factory=Counter)  # by the segments in them
    splits: Counter[str] = field(default_factory=Counter)  # documents by their declared split, "" without one
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
        yield "texts", f"{self.texts:,}" + (f", {counted(self.characters, 'character')}" if self.characters else "")
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
    """Counts equal documents, and images that look alike, by 64-bit hashes: 9 bytes a document and 17 an image."""

    documents: array = field(default_factory=lambda: array("Q"))
    images: array = field(default_factory=lambda: array("Q"))
    perceptual: array = field(default_factory=lambda: array("Q"))  # of each image
    heldout_documents: bytearray = field(default_factory=bytearray)  # 1 if the source declares it as held out
    heldout_images: bytearray = field(default_factory=bytearray)

    def add(self, document: Summary) -> None:
        self.documents.append(document.document_hash)
        self.images.extend(document.image_hashes)
        self.perceptual.extend(document.perceptual_hashes)
        self.heldout_documents.append(document.split == "heldout")
        self.heldout_images.extend(self.heldout_documents[-1:] * len(document.image_hashes))

    def __str__(self) -> str:
        images, first = np.unique(self.images, return_index=True)
        hashes = np.asarray(self.perceptual, np.uint64)[first]
        hashes = hashes[hashes != 0]
        documents = len(self.documents) - len(np.unique(self.documents))
        return (
            f"duplicates: {counted(documents, 'document')} (same pixels and text as an earlier one), "
            f"{counted(len(self.images) - len(images), 'picture')} (same pixels); likely duplicates: "
            f"{counted(len(hashes) - len(np.unique(hashes)), 'picture')} (same perceptual hash)"
        )

    def in_both_splits(self) -> str:
        """How many pictures and documents are held out and for training, or "" without any."""
        images, documents = (
            len(np.intersect1d(*(np.array(hashes, np.uint64)[np.array(flags, bool) == value] for value in (False, True))))
            for hashes, flags in ((self.images, self.heldout_images), (self.documents, self.heldout_documents))
        )  # fmt: skip
        counts = f"{counted(images, 'picture')} and {counted(documents, 'document')} are held out and also for training"
        return f"{counts}: prepare leaves their training documents out" if images + documents else ""


def survey(
    reader: Reader, tokenizer: Tokenizer | None, on_fault: Callable[[Fault], None] = lambda fault: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None, duplicates: Duplicates | None = None,
    processes: int = 1,
) -> Survey:  # fmt: skip
    """Read all of a source, by at most this many processes. Each fault is passed to `on_fault`, and each document is added
    to `duplicates`; without a tokenizer no tokens are counted."""
    result, ids = Survey(reader.name), set()
    units = reader.units(UNIT_SIZE)
    total = sum(unit.rows for unit in units)
    summarizer = Summarizer(reader, tokenizer, hashes=duplicates is not None)
    for document in summarizer.read(units, result.account, processes):
        result.records += 1
        document = check_id(document, ids)
        if isinstance(document, Fault):
            result.faults[document.kind] += 1
            if document.kind == DUPLICATE_ID:
                result.account.reject("records", "document", DUPLICATE_ID, document.where)
            on_fault(document)
            continue
        result.add(document.kinds, document.tokens)
        result.splits[document.split] += 1
        result.characters += document.characters
        for height, width in document.sizes:
            result.sizes[f"{width}x{height}"] += 1
        if duplicates is not None:
            duplicates.add(document)
        if result.records % 256 == 0:
            on_progress(min(result.records, total), total)
    on_progress(total, total)
    reader.close_account(result.account)
    return result


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
