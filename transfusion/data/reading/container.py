"""What a container is: files of one kind, divided into spans of records.

Any process can read the spans in any order. Nothing is extracted to disk or executed: only images, text and JSON are read
from an archive. A damaged file yields a `Fault` instead of a record.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa

from transfusion.data.raw import CUT_SHORT, Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.files import Files
from transfusion.data.reading.streams import error_line

MAX_RECORD_SIZE = 256 * 2**20  # bytes of one file in an archive, characters of one element of a list
BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Span:
    """Consecutive records of one file."""

    path: str
    first: int  # row of the first, counted from 0
    rows: int
    offset: int = 0  # of its start, in a unit of the container
    is_repeated: bool = False  # records of an archive whose keys earlier ones have
    split: str = ""  # of a folder in an archive that is called like one

    def continues_in(self, span: "Span") -> bool:
        """Whether the records of `span` follow these in the same file, and are alike."""
        return replace(span, first=self.first, rows=self.rows, offset=self.offset) == self and (
            span.first == self.first + self.rows
        )


class Container(Protocol):
    """Files of one kind."""

    files: Files

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        """All records in order, in spans of at most `max_rows`. What else is in the files (members of archives that belong
        to no record, bytes behind the end) is counted in the account."""
        ...

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        """(where, record or Fault) for each record of a span."""
        ...


def group(path: str, offsets: Iterator[tuple[int, int]], max_rows: int) -> Iterator[Span]:
    """The (row, offset) of every record, grouped into spans of at most `max_rows`."""
    start: tuple[int, int] | None = None
    count = 0
    for row, offset in offsets:
        if count == max_rows:
            yield Span(path, start[0], count, start[1])
            start, count = None, 0
        start, count = start or (row, offset), count + 1
    if start:
        yield Span(path, start[0], count, start[1])


def damage_fault(error: Exception, kind: str = CUT_SHORT) -> Fault:
    """The fault of a damaged file. Errors of a disk or a network are not faults of the data and are raised again."""
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException | FileNotFoundError):
        if type(error) is not OSError or error.errno is not None:  # see `Files.open`
            raise error
    return Fault(kind, f"the file cannot be read from here on: {error_line(error)}")
