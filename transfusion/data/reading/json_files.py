"""JSON files to records: one object per line, or one list of objects."""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from transfusion.data.raw import CUT_SHORT, Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.container import BOM, MAX_RECORD_SIZE, Span, damage_fault, group
from transfusion.data.reading.files import Files
from transfusion.data.reading.streams import error_line

READ_SIZE = 2**20  # bytes read at a time


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line. Rows are line numbers; empty lines count, but are not records."""

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            yield from group(path, ((row, offset) for row, offset, _ in self._lines(path)), max_rows)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        lines = self._lines(span.path, span.first, span.offset)
        for _, (row, _, line) in zip(range(span.rows), lines, strict=False):
            yield self.files.format_row(span.path, row), line if isinstance(line, Fault) else _parse_line(line)

    def _lines(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, bytes | Fault]]:
        """(row, byte offset, line). Where decompression fails, the last item is a Fault."""
        try:
            with self.files.open(path, offset) as file:
                for line in file:
                    if line.strip() not in (b"", BOM):
                        yield row, offset, line
                    row, offset = row + 1, offset + len(line)
        except OSError as error:
            yield row, offset, damage_fault(error)


def _parse_line(line: bytes) -> dict | Fault:
    """A JSON object, or a Fault. An object without its last bracket in a line without its line break is cut short."""
    value, content = parse_object(line), line.removeprefix(BOM).strip()
    if isinstance(value, Fault) and line[-1:] != b"\n" and content.startswith(b"{") and not content.endswith(b"}"):
        return Fault(CUT_SHORT, "the file ends inside a JSON object")
    return value


def parse_object(content: bytes | str) -> dict | Fault:
    """A JSON object, or a Fault when the content is not one."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return Fault("wrong encoding", f"it is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Fault("bad JSON", f"it is not valid JSON: {error}")
    return value if isinstance(value, dict) else _not_an_object(value)


def _not_an_object(value: Any) -> Fault:
    kinds = {list: "a list", str: "text", type(None): "null"}  # the value itself may be of any length and depth
    return Fault("bad JSON", f"it must be a JSON object, not {kinds.get(type(value), value)}")


@dataclass(frozen=True)
class JsonList:
    """One JSON list of objects, read in pieces, so its length is not limited."""

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            yield from group(path, ((row, offset) for row, offset, _ in self._elements(path)), max_rows)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        elements = self._elements(span.path, span.first, span.offset)
        for _, (row, _, value) in zip(range(span.rows), elements, strict=False):
            if not isinstance(value, dict | Fault):
                value = _not_an_object(value)
            yield self.files.format_row(span.path, row), value

    def _elements(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, Any]]:
        """(row, byte offset, element). Where the rest cannot be read, the last item is a Fault."""
        with self.files.open(path, offset) as file:
            text = _TextBuffer(file, offset)
            if not offset:  # otherwise an element starts there
                text.skip_all(_SPACE)
                if not text.starts_with("["):
                    fault = text.end_fault if text.is_damaged else Fault("bad JSON", "the file does not contain a list")
                    yield row, 0, fault
                    return
                text.skip(text.position + 1)
            while True:
                text.skip_all(_SEPARATOR)
                if text.starts_with("]"):
                    return
                value, end = text.parse_element()
                yield row, text.offset, value
                if end == text.position:
                    return
                text.skip(end)
                row += 1


_DECODER = json.JSONDecoder()
_BRACKETS = re.compile(r'[][{}]|"(?:[^"\\]|\\.)*(?:"|$)', re.DOTALL)  # and texts, which may have brackets
_SPACE, _SEPARATOR = re.compile("[ \n\r\t\ufeff]*"), re.compile("[ \n\r\t,]*")


class _TextBuffer:
    """The text of a file from a byte offset. Bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, file: BinaryIO, offset: int):
        self.file, self.text, self.position = file, "", 0  # the buffered text, and the next character in it
        self.offset = offset  # of the next character, in bytes of the file
        self.end_fault: Fault | None = None  # the reason why there is no more text
        self.is_damaged = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def read_more(self) -> bool:
        """Add to the buffer, more each time; False at the end."""
        if self.end_fault:
            return False
        try:
            content = self.file.read1(max(READ_SIZE, len(self.text) - self.position))
            if not content:
                self.end_fault = Fault(CUT_SHORT, "the list has no end: the file is cut short")
        except OSError as error:
            content, self.end_fault, self.is_damaged = b"", damage_fault(error), True
        self.text, self.position = self.text[self.position :] + self._decoder.decode(content, final=not content), 0
        return True

    def skip(self, position: int) -> None:
        self.offset += len(self.text[self.position : position].encode(errors="surrogateescape"))
        self.position = position

    def skip_all(self, characters: re.Pattern) -> None:
        """Skip all of these characters, and read until another character or the end."""
        while True:
            self.skip(characters.match(self.text, self.position).end())
            if self.position < len(self.text) or not self.read_more():
                return

    def starts_with(self, character: str) -> bool:
        return self.text.startswith(character, self.position)

    def parse_element(self) -> tuple[Any, int]:
        """The JSON value at the current position, and the position after it; a Fault instead of a wrong value. Where the
        next element cannot be found either, the position does not change."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                if end < len(self.text):  # otherwise a number may continue
                    break
            except json.JSONDecodeError as error:
                value, end = Fault("bad JSON", f"it is not valid JSON: {error.msg}"), self.position
                if error.pos < len(self.text) - 16 and not error.msg.startswith("Unterminated"):
                    return self._skip_element(value)  # more text cannot help
            except (ValueError, RecursionError) as error:
                return self._skip_element(Fault("bad JSON", f"it cannot be read: {error_line(error)}"))
            if len(self.text) - self.position > MAX_RECORD_SIZE or not self.read_more():
                break
        size = (len(self.text) if end == self.position else end) - self.position
        if size > MAX_RECORD_SIZE:
            message = f"it has over {MAX_RECORD_SIZE:,} characters, the rest of the file is not read"
            return Fault(CUT_SHORT, message), self.position
        if end == self.position:
            is_at_end = self.position == len(self.text) or self.is_damaged
            return (self.end_fault, self.position) if is_at_end else self._skip_element(value)
        try:
            self.text[self.position : end].encode()
        except UnicodeEncodeError:  # lone surrogates: see the decoder
            value = Fault("wrong encoding", "it is not UTF-8")
        return value, end

    def _skip_element(self, fault: Fault) -> tuple[Fault, int]:
        """The fault of an element, and the position after its last bracket; if the next one cannot be found, a fault of the
        rest of the file."""
        while self.text[self.position] in "[{":
            depth, end = 0, self.position
            for part in _BRACKETS.finditer(self.text, self.position):
                depth, end = depth + {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0), part.end()
                if depth == 0:
                    break
            following = self.text[end : end + 1000].lstrip()
            if depth == 0 and following:
                if following[0] in ",]":
                    return fault, end
                break
            if len(self.text) - self.position > MAX_RECORD_SIZE or not self.read_more():
                break
        return Fault(CUT_SHORT, f"{fault.message}; the rest of the file is not read"), self.position
