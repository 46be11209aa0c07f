"""Tables to records: Parquet and Arrow, as the hub and Hugging Face's `save_to_disk` write them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transfusion.data.raw import Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.container import Span, damage_fault
from transfusion.data.reading.files import Files
from transfusion.data.reading.streams import error_line
from transfusion.data.reading.values import unique_names

ARROW_ERRORS = (pa.ArrowException, UnicodeDecodeError, OSError)  # of damaged files; column names may not be UTF-8
ARROW_FILE_START = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
BATCH_SIZE = 16  # rows converted to records at a time: each may have an image


@dataclass(frozen=True)
class ArrowTables:
    """Parquet and Arrow files. A class label becomes its name."""

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            row = start = first_group = group = 0
            is_damaged = False
            try:
                for size in self._sizes(path):
                    if row > start and row + size - start > max_rows:
                        yield Span(path, start, row - start, first_group)
                        start, first_group = row, group
                    row, group = row + size, group + 1
            except ARROW_ERRORS as error:
                is_damaged = damage_fault(error) is not None
            if row > start:
                yield Span(path, start, row - start, first_group)
            if is_damaged:
                yield Span(path, row, 1, group)  # reading it gives the fault

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        row = span.first
        try:
            for row, record in islice(self._parquet(span) if _is_parquet(span.path) else self._arrow(span), span.rows):
                yield self.files.format_row(span.path, row), record
                row += 1
        except ARROW_ERRORS as error:
            yield self.files.format_row(span.path, row), damage_fault(error)

    def _sizes(self, path: str) -> Iterator[int]:
        """Number of rows of each row group or record batch."""
        if not _is_parquet(path):
            yield from map(len, self._batches(path))
            return
        with self.files.open(path) as file:
            metadata = pq.ParquetFile(file).metadata
            yield from (metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))

    def _parquet(self, span: Span) -> Iterator[tuple[int, dict | Fault]]:
        """(row, record). Each row in the rest of a damaged row group is a Fault."""
        with self.files.open(span.path) as file:
            table, start = pq.ParquetFile(file), span.first
            for group in range(span.offset, table.metadata.num_row_groups):
                row = start
                try:
                    for batch in table.iter_batches(batch_size=BATCH_SIZE, row_groups=[group]):
                        for record in _batch_records(batch, is_valid=True):
                            yield row, record
                            row += 1
                except ARROW_ERRORS as error:
                    fault = damage_fault(error, "damaged table")
                    yield from ((number, fault) for number in range(row, start + table.metadata.row_group(group).num_rows))
                start += table.metadata.row_group(group).num_rows
                if start >= span.first + span.rows:
                    return

    def _arrow(self, span: Span) -> Iterator[tuple[int, dict | Fault]]:
        """(row, record)."""
        row = span.first
        for batch in islice(self._batches(span.path), span.offset, None):
            for record in _batch_records(batch, is_valid=False):
                yield row, record
                row += 1
            if row >= span.first + span.rows:
                return

    def _batches(self, path: str) -> Iterator[pa.RecordBatch]:
        """The batches of a file, of a stream, or of joined streams. ArrowInvalid where a stream has no mark of its end: to
        Arrow one that is cut between two batches looks whole."""
        source = self.files.open_arrow(path)
        if source.read(len(ARROW_FILE_START)) == ARROW_FILE_START:
            file = pa.ipc.open_file(source)
            yield from map(file.get_batch, range(file.num_record_batches))
            return
        source.seek(0)
        while True:
            yield from pa.ipc.open_stream(source)
            source.seek(source.tell() - len(END_OF_STREAM))
            if source.read(len(END_OF_STREAM)) != END_OF_STREAM:
                raise pa.ArrowInvalid("the stream has no end mark")
            if source.tell() == source.size():
                return


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _batch_records(batch: pa.RecordBatch, is_valid: bool) -> Iterator[dict | Fault]:
    """The rows as records, several at a time; one at a time where any is damaged, so that only that one is lost."""
    if len({*batch.schema.names}) < batch.num_columns:
        batch = batch.rename_columns(unique_names(batch.schema.names))
    try:
        if not is_valid:  # Arrow does not check mapped files: invalid offsets would read any memory
            batch.validate(full=True)
        size, is_valid, records = BATCH_SIZE, True, batch.to_pylist() if len(batch) <= BATCH_SIZE else []
    except (pa.ArrowException, ValueError, ArithmeticError, LookupError) as error:
        if isinstance(error, MemoryError):  # pa.ArrowMemoryError is no fault of the data
            raise
        if len(batch) == 1:
            kind = "wrong encoding" if "utf" in str(error).lower() else "damaged table"
            yield Fault(kind, f"the row cannot be read: {error_line(error)}")
            return
        size, records = 1, []
    if not records:
        for first in range(0, len(batch), size):
            yield from _batch_records(batch.slice(first, size), is_valid)
        return
    class_labels = _find_class_labels(batch.schema)
    for record in records:
        for column, labels in class_labels.items():
            label = record.get(column)
            record[column] = labels[label] if isinstance(label, int) and 0 <= label < len(labels) else label
        yield record


def _find_class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> names of its class labels, from Hugging Face's metadata of a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: f["names"] for name, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return {name: names for name, names in labels.items() if isinstance(names, list)}
