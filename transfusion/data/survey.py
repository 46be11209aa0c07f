"""Everything a source holds, read once: its faults by file and row, and what it amounts to."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from transfusion.codecs.text import Tokenizer
from transfusion.data.prepare import duplicate_id
from transfusion.data.raw import Fault, RawDocument, RawImage, RawText
from transfusion.data.reading.readers import Reader
from transfusion.data.store import Prepared, Stored
from transfusion.sequence import Text

UNIT = 2048  # records between two reports of progress, at most


@dataclass
class Survey:
    """What one pass over a source found."""

    name: str
    records: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # by kind
    documents: Counter[str] = field(default_factory=Counter)  # by what they hold
    texts: int = 0
    letters: int = 0
    tokens: int = 0
    images: int = 0
    sizes: Counter[str] = field(default_factory=Counter)  # of pictures, width x height (or of latents)
    lengths: array = field(default_factory=lambda: array("I"))  # tokens of each document

    def add(self, kinds: Sequence[str], tokens: int) -> None:
        """Note a document: its segments, and how many tokens they hold."""
        held = {"text only" if set(kinds) == {"text"} else "images only" if "text" not in kinds else
                "one text, one image" if len(kinds) == 2 else "interleaved"}  # fmt: skip
        self.documents.update(held)
        self.texts += kinds.count("text")
        self.images += kinds.count("image")
        self.tokens += tokens
        self.lengths.append(tokens)

    def rows(self) -> Iterator[tuple[str, str]]:
        """What there is to say, as (what, how much)."""
        yield "records", f"{self.records:,}"
        if self.faults:
            yield "  left out", f"{self.faults.total():,}: {_listed(self.faults)}"
        yield "documents", f"{self.documents.total():,}: {_listed(self.documents)}"
        yield "texts", f"{self.texts:,}" + (f", {self.letters:,} letters" if self.letters else "")
        yield "tokens", f"{self.tokens:,}"
        if self.lengths:
            middle, long, longest = np.percentile(self.lengths, (50, 95, 100))
            yield "  a document", f"median {middle:,.0f}, 95 % up to {long:,.0f}, longest {longest:,.0f}"
        yield "images", f"{self.images:,}"
        if self.sizes:
            others = len(self.sizes) - 5
            yield "  sizes", _listed(self.sizes, 5) + (f" and {others:,} more" if others > 0 else "")


def survey(
    reader: Reader, tokenizer: Tokenizer | None, hear: Callable[[Fault], None] = lambda fault: None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:  # fmt: skip
    """Read all of a source. `hear` is told every fault; without a tokenizer no tokens are counted."""
    found, seen = Survey(reader.name), set()
    units = reader.units(UNIT)
    total = sum(unit.rows for unit in units)
    for unit in units:
        for one in reader.read(unit):
            found.records += 1
            if isinstance(one, RawDocument) and one.name and hash(one.name) in seen:
                one = Fault(**duplicate_id(one.name, one.where))
            if isinstance(one, Fault):
                found.faults[one.kind] += 1
                hear(one)
                continue
            seen.update([hash(one.name)] if one.name else ())
            _note(found, one, tokenizer)
            if found.records % 256 == 0:
                tick(min(found.records, total), total)
    tick(total, total)
    return found


def _note(found: Survey, document: RawDocument, tokenizer: Tokenizer | None) -> None:
    texts = [part.text for part in document.segments if isinstance(part, RawText)]
    found.add(
        ["image" if isinstance(part, RawImage) else "text" for part in document.segments],
        sum(len(tokenizer.encode(text)) for text in texts) if tokenizer else 0,
    )
    found.letters += sum(map(len, texts))
    found.sizes.update("{1}x{0}".format(*p.pixels.shape) for p in document.segments if isinstance(p, RawImage))


def survey_stored(stored: Stored) -> Survey:
    """The same of a source that is prepared already; its sizes are those of latents, height x width."""
    found = Survey(f"{stored.name} ({stored.split})", records=len(stored))
    for id_ in range(len(stored)):
        segments = stored[id_].segments
        kinds = ["text" if isinstance(part, Text) else "image" for part in segments]
        found.add(kinds, sum(len(part.tokens) for part in segments if isinstance(part, Text)))
        found.sizes.update("latent {}x{}".format(*part.shape) for part in segments if not isinstance(part, Text))
    return found


def survey_prepared(prepared: Prepared) -> list[Survey]:
    """Every source and split of a prepared folder, with what was left out."""
    found = []
    for name in prepared.names:
        about = prepared.about["sources"][name]
        for split in ("train", "heldout"):
            one = survey_stored(prepared.source(name, split))
            if split == "train":
                one.faults.update(about["faults"])
                one.records += one.faults.total()
            found.append(one)
    return found


def first_texts(readers: Sequence[Reader], documents: int) -> list[str]:
    """The texts of the first documents of each source."""
    return [
        part.text
        for reader in readers
        for raw in islice((one for unit in reader.units(UNIT) for one in reader.read(unit)), documents)
        if isinstance(raw, RawDocument)
        for part in raw.segments
        if isinstance(part, RawText)
    ]


def _listed(counts: Counter[str], most: int = 8) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common(most))
