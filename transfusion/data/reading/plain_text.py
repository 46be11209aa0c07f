"""Text files to records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from transfusion.data.raw import Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.container import BOM, Span, damage_fault, group
from transfusion.data.reading.files import Files

PASSAGE_BYTES = 20_000  # of plain text; after them the next blank line ends a document
MAX_PASSAGE_BYTES = 80_000  # after them the next line ends it


@dataclass(frozen=True)
class PlainText:
    """Text files. Each is one document; a long one is split after blank lines into several. No character is lost."""

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            yield from group(path, ((row, offset) for row, offset, _ in self._passages(path)), max_rows)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        passages = self._passages(span.path, span.first, span.offset)
        for _, (row, _, content) in zip(range(span.rows), passages, strict=False):
            where = f"{self.files.relative_path(span.path)}:passage {row + 1}"
            yield where, content if isinstance(content, Fault) else {"text": content if row else content.removeprefix(BOM)}

    def _passages(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, bytes | Fault]]:
        """(row, byte offset, content) of passages that are not blank. Each offset is a valid start for the rest."""
        lines, size, has_text, after_blank = [], 0, False, False
        try:
            with self.files.open(path, offset) as file:
                for line in _short_lines(file):
                    is_blank = line.strip() in (b"", BOM)
                    is_full = size >= MAX_PASSAGE_BYTES - 4 or (size >= PASSAGE_BYTES and after_blank)
                    if has_text and not is_blank and is_full:
                        yield row, offset, b"".join(lines)
                        lines, row, offset, size, has_text = [], row + 1, offset + size, 0, False
                    lines.append(line)
                    size, has_text, after_blank = size + len(line), has_text or not is_blank, is_blank
            if has_text:
                yield row, offset, b"".join(lines)
        except OSError as error:
            yield row, offset, damage_fault(error)


def _short_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; one that is too long is split between two characters."""
    tail = b""
    while line := tail + file.readline(MAX_PASSAGE_BYTES - len(tail)):
        tail = b""
        if len(line) == MAX_PASSAGE_BYTES and not line.endswith(b"\n"):  # split before its last character
            size = next((n for n in range(1, 5) if line[-n] & 0xC0 != 0x80), 1)
            line, tail = line[:-size], line[-size:]
        yield line
