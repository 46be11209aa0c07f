"""Tables to records: parquet and Arrow, as the hub and Hugging Face's `save_to_disk` have them, and comma-separated text."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transfusion.data.raw import Fault
from transfusion.data.reading.containers import Span, damage
from transfusion.data.reading.files import Files, reason_of

DAMAGE = (pa.ArrowException, UnicodeDecodeError, OSError)  # what Arrow raises of it; names are decoded too
ROWS = 16  # that are turned into records at a time: each may hold a picture


@dataclass(frozen=True)
class Tables:
    """Parquet, and Arrow as Hugging Face's `save_to_disk` writes it. A class label becomes its name."""

    files: Files
    paths: Sequence[str]

    def spans(self, most: int) -> Iterator[Span]:
        for path in self.paths:
            row = begun = first = group = 0
            damaged = False
            try:
                for size in self._sizes(path):
                    if row > begun and row + size - begun > most:
                        yield Span(path, begun, row - begun, first)
                        begun, first = row, group
                    row, group = row + size, group + 1
            except DAMAGE as error:
                damaged = damage(error) is not None
            if row > begun:
                yield Span(path, begun, row - begun, first)
            if damaged:
                yield Span(path, row, 1, group)  # reading it says why

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        row = span.first
        try:
            for row, found in islice(self._parquet(span) if _is_parquet(span.path) else self._arrow(span), span.rows):
                yield self.files.row(span.path, row), found
                row += 1
        except DAMAGE as error:
            yield self.files.row(span.path, row), damage(error, "damaged table")

    def _sizes(self, path: str) -> Iterator[int]:
        """Rows of each part that can be read by itself."""
        if not _is_parquet(path):
            yield from map(len, self._batches(path))
            return
        with self.files.open(path) as file:
            about = pq.ParquetFile(file).metadata
            yield from (about.row_group(n).num_rows for n in range(about.num_row_groups))

    def _parquet(self, span: Span) -> Iterator[tuple[int, dict | Fault]]:
        """(row, record). Of a group that is damaged the rest is one Fault."""
        with self.files.open(span.path) as file:
            table, begun = pq.ParquetFile(file), span.first
            for group in range(span.offset, table.metadata.num_row_groups):
                row = begun
                try:
                    for batch in table.iter_batches(batch_size=ROWS, row_groups=[group]):
                        for found in _rows(batch, sound=True):
                            yield row, found
                            row += 1
                except DAMAGE as error:
                    yield row, damage(error, "damaged table")
                begun += table.metadata.row_group(group).num_rows
                if begun >= span.first + span.rows:
                    return

    def _arrow(self, span: Span) -> Iterator[tuple[int, dict | Fault]]:
        """(row, record)."""
        row = span.first
        for batch in islice(self._batches(span.path), span.offset, None):
            for found in _rows(batch, sound=False):
                yield row, found
                row += 1
            if row >= span.first + span.rows:
                return

    def _batches(self, path: str) -> Iterator[pa.RecordBatch]:
        source = self.files.map(path)
        try:
            found = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            file = pa.ipc.open_file(source)
            found = map(file.get_batch, range(file.num_record_batches))
        yield from found


@dataclass(frozen=True)
class CsvTables:
    """Comma- or tab-separated text with a line of names, such as an image folder's `metadata.csv`; read whole."""

    files: Files
    paths: Sequence[str]

    def spans(self, most: int) -> Iterator[Span]:
        for path in self.paths:
            rows = sum(1 for _ in self._rows(path))
            for first in range(0, rows, most):
                yield Span(path, first, min(most, rows - first))

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        for row, found in enumerate(islice(self._rows(span.path), span.first, span.first + span.rows), span.first):
            yield self.files.row(span.path, row + 1), found  # the first line holds the names

    def _rows(self, path: str) -> Iterator[dict | Fault]:
        """Its records; damage is a Fault, and the last."""
        separator = "\t" if ".tsv" in path.lower() else ","
        try:
            with self.files.open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
                for found in csv.DictReader(text, delimiter=separator, strict=True):
                    if None in found or None in found.values():
                        yield Fault("damaged table", "it has more or fewer columns than the first line names")
                    else:
                        yield found
        except UnicodeDecodeError as error:
            yield Fault("wrong encoding", f"it is not UTF-8, nor read further: {error.reason}")
        except (csv.Error, OSError) as error:
            yield damage(error, "damaged table")


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _rows(batch: pa.RecordBatch, sound: bool) -> Iterator[dict | Fault]:
    """Its rows, a few at a time; where something in them is damaged one by one, to lose no others."""
    try:
        if not sound:  # Arrow trusts what it maps: damage would lead it anywhere in the memory
            batch.validate(full=True)
        size, sound, records = ROWS, True, batch.to_pylist() if len(batch) <= ROWS else []
    except Exception as error:  # each type has its own
        if len(batch) == 1:
            kind = "wrong encoding" if "utf" in str(error).lower() else "damaged table"
            yield Fault(kind, f"the row cannot be read: {reason_of(error)}")
            return
        size, records = 1, []
    if not records:
        for first in range(0, len(batch), size):
            yield from _rows(batch.slice(first, size), sound)
        return
    names = _label_names(batch.schema)
    for record in records:
        for column, labels in names.items():
            label = record.get(column)
            record[column] = labels[label] if isinstance(label, int) and 0 <= label < len(labels) else label
        yield record


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of class labels by column, as Hugging Face notes them in a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: f["names"] for name, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return {name: names for name, names in labels.items() if isinstance(names, list)}
