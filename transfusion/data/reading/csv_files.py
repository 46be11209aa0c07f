"""CSV files to records: rows of text with commas, semicolons, tabs or bars between the cells."""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import Any, BinaryIO

from transfusion.data.raw import CUT_SHORT, Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.columns import COLUMN_NAMES, KNOWN_NAMES, plain_name
from transfusion.data.reading.container import BOM, Span, damage_fault, group
from transfusion.data.reading.files import Files
from transfusion.data.reading.values import is_address, is_number, looks_like_picture, unique_names

DELIMITERS = "\t|;,"  # text has commas more often than the others
NO_DELIMITER = "\x1f"  # of a file with one column: no text has this character
SAMPLE_SIZE, SAMPLE_ROWS = 2**18, 200  # bytes and rows that show the dialect
MAX_CELL = 32 * 2**20  # characters
MAX_LINE = 4 * MAX_CELL  # bytes
MAX_NAME = 60  # characters of a column's name
ENCLOSED = re.compile(r'"(?:[^"]|"")*"')
SEPARATOR_LINE = re.compile("sep=.", re.I)  # the first line of some tables
END_OF_FILE = "\x1a"  # the last character of some files of DOS
MAX_TITLE_LINES = 10
MISSING = {"nan", "NaN", "None", "NULL", "null", "NA", "N/A", "n/a", "<NA>", "#N/A", "\\N"}  # of pandas, Excel and MySQL

csv.field_size_limit(MAX_CELL)  # of all readers in this process; Python's default is 131,072


@dataclass(frozen=True)
class Dialect:
    """How the rows of a file are written."""

    delimiter: str
    has_quotes: bool = True  # cells may be in quotes; otherwise a quote is a character like any other
    has_spaces: bool = False  # behind the delimiters
    header: Sequence[str] = ()  # the cells of the row with the names of columns; () without one
    columns: Sequence[str] = ()  # () while the dialect is not known: rows may have any number of cells
    num_skipped: int = 0  # lines before the first row: comments, which begin with #, and a title above the header

    def read(self, lines: "Lines") -> Iterator[tuple[int, int, list[str] | Fault]]:
        """(line number from 0, byte offset, cells) of each row that is not the header, which joined tables repeat, and
        has a cell that is not blank: spreadsheets write rows of delimiters alone. A row that cannot be read is a Fault; the
        next row starts in the line behind its first one, because an open quote may have swallowed any number of rows."""
        if not lines.offset:
            lines.skip(self.num_skipped)
        quoting = csv.QUOTE_MINIMAL if self.has_quotes else csv.QUOTE_NONE
        reader = csv.reader(
            lines, delimiter=self.delimiter, quoting=quoting, skipinitialspace=self.has_spaces, strict=True
        )  # fmt: skip
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells = lines.explain(error)
            if self.header and cells == self.header:
                lines.end_row(is_bad=False)
                continue
            is_blank = isinstance(cells, list) and not any(cell.strip().strip(END_OF_FILE) for cell in cells)
            if isinstance(cells, list) and self.columns and not any(map(str.strip, cells[len(self.columns) :])):
                del cells[len(self.columns) :]  # delimiters at the end of a row
            if isinstance(cells, list) and self.columns and len(cells) != len(self.columns) and not is_blank:
                cells = lines.explain_width(len(cells), len(self.columns))
            wrong_encoding = lines.wrong_encoding
            where = lines.end_row(is_bad=isinstance(cells, Fault))
            if wrong_encoding:
                yield *where, Fault("wrong encoding", f"the row is not UTF-8: {wrong_encoding}")
            elif where[1] == 0 and isinstance(cells, list) and SEPARATOR_LINE.fullmatch(self.delimiter.join(cells)):
                continue  # written by Excel
            elif not is_blank:
                yield *where, cells


class Lines:
    """The lines of a file, for `csv.reader`, which takes as many as a row has."""

    def __init__(self, file: BinaryIO, number: int = 0, offset: int = 0):
        self.file, self.number, self.offset = file, number, offset  # of the next row: its first line, and its byte offset
        self._row: list[bytes] = []  # the lines that were taken for the current row
        self._again: deque[bytes] = deque()  # lines behind the first one of a bad row
        self.wrong_encoding = ""  # why a line of the current row is not UTF-8

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self.file.readline(MAX_LINE)
        if not line:
            raise StopIteration
        self._row.append(line)
        line = line if self.offset or len(self._row) > 1 else line.removeprefix(BOM)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.wrong_encoding = error.reason
            return line.decode(errors="replace")  # with all delimiters and quotes

    def skip(self, number: int) -> None:
        for _ in range(number):
            next(self)
        self.end_row(is_bad=False)

    def end_row(self, is_bad: bool) -> tuple[int, int]:
        """Line number and byte offset of the row that was read. The lines behind the first one of a bad row come again."""
        where = self.number, self.offset
        if is_bad:
            self._again.extendleft(reversed(self._row[1:]))
            del self._row[1:]
        self.number += len(self._row)
        self.offset += sum(map(len, self._row))
        self._row.clear()
        self.wrong_encoding = ""
        return where

    def explain(self, error: csv.Error) -> Fault:
        """The fault of the current row."""
        if str(error) == "unexpected end of data" and self._is_last_line:
            return Fault(CUT_SHORT, "the file ends inside a cell in quotes")
        if "expected after" in str(error):
            return Fault("damaged table", 'a cell in quotes has a quote inside: write it twice (""), not as \\"')
        if "new-line character" not in str(error):
            return Fault("damaged table", f"the row cannot be read: {error}")
        if self._is_last_line:  # perhaps all rows are in it
            return Fault(CUT_SHORT, "carriage returns end its rows: save the file with line feeds")
        return Fault("damaged table", "the row cannot be read: a carriage return outside of quotes")

    def explain_width(self, width: int, expected: int) -> Fault:
        """The fault of the current row, which has the wrong number of cells."""
        message = f"the table has {expected} columns, the row {width}"
        if width < expected and self._is_last_line:
            return Fault(CUT_SHORT, f"{message}: the file ends inside a row")
        return Fault("damaged table", message)

    @property
    def _is_last_line(self) -> bool:
        return len(self._row) == 1 and not self._row[0].endswith(b"\n")


@dataclass(frozen=True)
class CsvFiles:
    """Tables as text: `.csv` and `.tsv`. The first rows of a file show its dialect; each row is named by its first line."""

    files: Files
    paths: Sequence[str]
    _dialects: dict[str, Dialect] = field(default_factory=dict, repr=False, compare=False)  # of the file that was read last

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            yield from group(path, ((line, offset) for line, offset, _ in self._rows(path)), max_rows)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        columns = self._dialect(span.path).columns
        for line, _, cells in islice(self._rows(span.path, span.first, span.offset), span.rows):
            if isinstance(cells, list):
                cells = cells if MISSING.isdisjoint(cells) else [None if cell in MISSING else cell for cell in cells]
                cells = dict(zip(columns, cells, strict=True))
            yield self.files.format_row(span.path, line), cells

    def _rows(self, path: str, line: int = 0, offset: int = 0) -> Iterator[tuple[int, int, list[str] | Fault]]:
        """The rows of a file without its header. Where the file is damaged, the last item is a Fault."""
        try:
            dialect = self._dialect(path)
            with self.files.open(path, offset) as file:
                for row in dialect.read(Lines(file, line, offset)):
                    line, offset, _ = row
                    yield row
        except OSError as error:
            yield line, offset, damage_fault(error)

    def _dialect(self, path: str) -> Dialect:
        """The dialect of a file. It is kept for the next span: a compressed file would have to be read from its start."""
        if path not in self._dialects:
            sample = b""
            try:
                with self.files.open(path) as file:
                    while len(sample) < SAMPLE_SIZE and (content := file.read1(SAMPLE_SIZE - len(sample))):
                        sample += content
            except OSError as error:
                damage_fault(error)  # raises errors of a disk; damage is reported where the rows are read
            self._dialects.clear()
            self._dialects[path] = find_dialect(sample, "\t" if ".tsv" in path.lower() else DELIMITERS)
        return self._dialects[path]


def find_dialect(sample: bytes, delimiters: str = DELIMITERS) -> Dialect:
    """The dialect of a table, from its beginning."""
    if is_cut := len(sample) == SAMPLE_SIZE:
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    num_skipped = _count_comments(sample, delimiters)
    num_skipped += _count_titles(sample.split(b"\n")[num_skipped:], delimiters)
    best = _find_quoting(sample, delimiters, is_cut, num_skipped)
    if num_skipped and best.width < 2:  # texts that begin with #
        best = _find_quoting(sample, delimiters, is_cut, 0)
    dialect, rows = best.dialect, best.rows
    header = rows[0] if rows and _is_header(rows[0]) else ()
    return replace(dialect, header=header, columns=_name_cells(header) if header else _name_columns(rows))


def _find_quoting(sample: bytes, delimiters: str, is_cut: bool, num_skipped: int) -> "_Sample":
    """The first rows in the dialect that fits best."""

    def read(delimiter: str, **quoting: bool) -> _Sample:
        return _Sample.read(Dialect(delimiter, num_skipped=num_skipped, **quoting), sample, is_cut)

    best = max(map(read, delimiters), key=lambda option: (option.num_known, option.score, option.num_pictures))
    if best.width < 2:
        return read(NO_DELIMITER)
    delimiter = best.dialect.delimiter
    if delimiter in "\t|":
        raw = read(delimiter, has_quotes=False)
        best = best if _has_quotes(best, raw) else raw
    behind = [cell for row in best.rows for cell in row[1:] if cell]
    if behind and sum(cell.startswith(" ") for cell in behind) > 0.9 * len(behind):
        return read(delimiter, has_quotes=best.dialect.has_quotes, has_spaces=True)
    return best


def _count_comments(sample: bytes, delimiters: str) -> int:
    """The number of lines that begin with # before the first other one, without the last if it has names of columns."""
    lines = list(takewhile(lambda line: line.startswith(b"#"), io.BytesIO(sample.removeprefix(BOM))))
    last = lines[-1].decode(errors="replace") if lines else ""
    has_names = any(delimiter in last and any(map(_is_known, last.split(delimiter))) for delimiter in delimiters)
    return len(lines) - has_names


def _count_titles(lines: Sequence[bytes], delimiters: str) -> int:
    """The number of lines before a header with several known names, without such names or pictures: a title, blank lines."""
    for number, line in enumerate(lines[:MAX_TITLE_LINES]):
        text = line.removeprefix(BOM).decode(errors="replace")
        rows = [[cell.strip(' "\r') for cell in text.split(delimiter)] for delimiter in delimiters]
        if any(sum(map(_is_known, row)) > 1 for row in rows):
            return number
        is_header = plain_name(text.strip()) in COLUMN_NAMES["text"]  # of a table with one column
        if is_header or any(any(map(_is_picture, row)) or (len(row) > 1 and any(map(_is_known, row))) for row in rows):
            return 0
    return 0


@dataclass(frozen=True)
class _Sample:
    """The first rows of a file, read in a dialect."""

    dialect: Dialect
    rows: Sequence[list[str]]  # as wide as the first one
    num_others: int  # rows that are wider or narrower, or cannot be read

    @classmethod
    def read(cls, dialect: Dialect, sample: bytes, is_cut: bool) -> "_Sample":
        file, rows = io.BytesIO(sample), []
        for _, _, cells in islice(dialect.read(Lines(file)), SAMPLE_ROWS):
            if is_cut and isinstance(cells, Fault) and file.tell() == len(sample):
                break  # the end of a cell in quotes is behind the sample
            rows.append(cells)
        width = next((len(cells) for cells in rows if isinstance(cells, list)), 0)
        alike = [cells for cells in rows if isinstance(cells, list) and len(cells) == width]
        return cls(dialect, alike, len(rows) - len(alike))

    @property
    def width(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    @property
    def num_known(self) -> int:
        """Names of columns that are known, in the first row, if it has several."""
        return sum(map(_is_known, self.rows[0])) if self.width > 1 else 0

    @property
    def num_pictures(self) -> int:
        """Columns of pictures."""
        return sum(all(map(_is_picture, cells)) for cells in zip(*self.rows, strict=True))

    @property
    def score(self) -> int:
        """How well the dialect fits, if it gives several columns."""
        return len(self.rows) - self.num_others if self.width > 1 else -len(self.rows)


def _has_quotes(quoted: _Sample, raw: _Sample) -> bool:
    """Whether quotes enclose cells, from the same rows read with and without quotes. Where they do, a cell with a quote
    inside is itself in quotes."""
    cells = [cell for row in raw.rows for cell in row if '"' in cell]
    if not quoted.num_others:
        return len(quoted.rows) < len(raw.rows) or bool(raw.num_others) or all(cell.startswith('"') for cell in cells)
    num_enclosed = sum(bool(ENCLOSED.fullmatch(cell)) for cell in cells)
    return 2 * num_enclosed >= len(cells)


def _is_known(name: str) -> bool:
    return plain_name(name.strip("# \r\n")) in KNOWN_NAMES


def _is_header(row: Sequence[str]) -> bool:
    """Whether a first row has names of columns: known ones, or any words, but no picture, address, number or long text."""
    cells = [cell.strip() for cell in row]
    if any(map(_is_picture, cells)):
        return False
    if any(map(_is_known, cells)):
        return True
    is_name = [cell and len(cell) <= MAX_NAME and not is_number(cell) for cell in cells]
    return all(is_name) and len({*cells}) == len(cells)


def _is_picture(cell: str) -> bool:
    return looks_like_picture(cell) or is_address(cell)


def _name_cells(header: Sequence[str]) -> list[str]:
    """The names of columns in a header. NumPy writes a # before the first one."""
    first, *others = header
    names = [first.strip("# ") if _is_known(first) else first.strip(), *map(str.strip, others)]
    return unique_names(name or f"column {number}" for number, name in enumerate(names, 1))


def _name_columns(rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Names for columns without a header: the first with pictures or addresses is `image`, and of the others the one with
    the longest cells is `caption`, or `text` without pictures."""
    columns = list(zip(*rows, strict=True))
    names = [f"column {number}" for number in range(1, len(columns) + 1)]
    images = [n for n, cells in enumerate(columns) if all(map(_is_picture, cells))]
    others = [n for n in range(len(columns)) if n not in images]
    for n in images[:1]:
        names[n] = "image"
    if others:
        longest = max(others, key=lambda n: sum(map(len, columns[n])))
        names[longest] = "caption" if images else "text"
    return tuple(names)
