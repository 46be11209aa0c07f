"""JSON files to records: one object per line, a list of objects, or objects over several lines."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from transfusion.data.raw import CUT_SHORT, Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.coco import OTHER_ANNOTATIONS, is_coco, no_captions, read_coco
from transfusion.data.reading.container import BOM, MAX_RECORD_SIZE, Container, Span, damage_fault, group
from transfusion.data.reading.files import Files
from transfusion.data.reading.json_objects import unwrap
from transfusion.data.reading.streams import error_line
from transfusion.data.reading.values import short_repr

READ_SIZE = 2**20  # bytes read at a time
LINES_SUFFIX = re.compile(r"\.(jsonl|ndjson)(\.|$)")


def _make_object(pairs: list[tuple[str, Any]]) -> dict:
    """An object from its keys and values. ValueError when a key occurs twice: Python would keep the last value."""
    record = dict(pairs)
    if len(record) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {short_repr(counts.most_common(1)[0][0])} occurs twice in an object")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


@dataclass(frozen=True)
class JsonFiles:
    """JSON files. The first line of each shows how it is written."""

    files: Files
    paths: Sequence[str]
    _layouts: dict[str, Container] = field(default_factory=dict, repr=False, compare=False)  # of the file that was read last

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            yield from self._layout(path).spans(max_rows, account)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        yield from self._layout(span.path).records(span)

    def _layout(self, path: str) -> Container:
        if path not in self._layouts:
            self._layouts.clear()
            self._layouts[path] = _find_layout(path, *first_line(self.files, path))(self.files, [path])
        return self._layouts[path]


def _find_layout(path: str, line: bytes, is_only_line: bool) -> "type[JsonLines | JsonList | JsonObjects]":
    """How a file is written whose first line that is not blank is `line`. The lines of a .jsonl are records, unless the
    first has only a bracket; those of a .json, if the first has a whole object and is not the only one."""
    line = line.strip()
    if line.startswith(b"["):
        return JsonList
    has_lines = line != b"{" if LINES_SUFFIX.search(path.lower()) else line.endswith(b"}") and not is_only_line
    return JsonLines if has_lines else JsonObjects


def first_line(files: Files, path: str) -> tuple[bytes, bool]:
    """The first line of a file that is not blank, if it starts a list perhaps only its beginning; and whether nothing
    follows it. No line for a damaged file."""
    line = rest = b""
    try:
        with files.open(path) as file:
            while not line and (content := file.read1(2**16)):
                line = content.lstrip(b" \n\r\t\xef\xbb\xbf")
            if not line.startswith(b"[") and b"\n" not in line:
                line += file.readline()
            line, _, rest = line.partition(b"\n")
            while not rest.strip() and (content := file.read1(2**16)):
                rest = content
    except OSError as error:
        damage_fault(error)  # raises errors of a disk; damage is reported where the records are read
    return line, not rest.strip()


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
    """A JSON object, or a Fault: CUT_SHORT if the line has neither its line break nor the last bracket of the object."""
    value, content = parse_object(line), line.removeprefix(BOM).strip()
    if isinstance(value, Fault) and line[-1:] != b"\n" and content.startswith(b"{") and not content.endswith(b"}"):
        return Fault(CUT_SHORT, "the file ends inside a JSON object")
    return value


def parse_object(content: bytes | str) -> dict | Fault:
    """A JSON object, or a Fault when the content is not one."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return Fault("wrong encoding", f"it is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Fault("bad JSON", f"it is not valid JSON: {error}")
    return value if isinstance(value, dict) else _not_an_object(value)


def _not_an_object(value: Any) -> Fault:
    kinds = {list: "a list", str: "text", type(None): "null"}  # the value itself may be of any length and depth
    return Fault("bad JSON", f"it must be a JSON object, not {kinds.get(type(value), value)}")


class JsonObjects:
    """One JSON object, or several, over any number of lines. A single object may be several records: COCO's annotations, and
    see `unwrap`."""

    def __init__(self, files: Files, paths: Sequence[str]):
        self.files, self.paths = files, paths
        self._cache: tuple[str, list[Any]] = ("", [])  # path and records of the last file: each span needs the whole file

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            rows = len(self._rows(path))
            for first in range(0, rows, max_rows):
                yield Span(path, first, min(max_rows, rows - first))

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        for row, record in enumerate(self._rows(span.path)[span.first : span.first + span.rows], span.first):
            yield self.files.format_row(span.path, row), record

    def _rows(self, path: str) -> list[Any]:
        if self._cache[0] != path:
            first, *others = values = list(self._values(path))
            if not others and isinstance(first, dict):
                values = read_coco(self.files, path, first) if is_coco(first) else unwrap(first)
            self._cache = path, [value if isinstance(value, dict | Fault) else _not_an_object(value) for value in values]
        return self._cache[1]

    def _values(self, path: str) -> Iterator[Any]:
        """The values of a file; where the rest cannot be read, the last one is a Fault."""
        if path.rpartition("/")[2].startswith(OTHER_ANNOTATIONS):  # these are large
            yield no_captions()
            return
        try:
            text = self.files.read(path).decode("utf-8-sig").strip()
        except OSError as error:
            yield damage_fault(error)
            return
        except UnicodeDecodeError as error:
            yield Fault("wrong encoding", f"it is not UTF-8 at byte {error.start}")
            return
        end = 0
        while end < len(text) or not text:
            try:
                value, end = _DECODER.raw_decode(text, _SPACE.match(text, end).end())
            except (ValueError, RecursionError) as error:
                kind = CUT_SHORT if end or text.startswith("{") else "bad JSON"
                yield Fault(kind, f"it is not valid JSON, the rest of the file is not read: {error_line(error)}")
                return
            yield value


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
                    text.skip(text.position + 1)
                    text.skip_all(_SPACE)
                    if text.starts_with("["):  # lists were joined
                        text.skip(text.position + 1)
                        continue
                    if text.is_damaged or text.position < len(text.text):
                        fault = Fault(CUT_SHORT, "what is behind the end of the list is not read")
                        yield row, text.offset, text.end_fault if text.is_damaged else fault
                    return
                value, end = text.parse_element()
                yield row, text.offset, value
                if end == text.position:
                    return
                text.skip(end)
                row += 1


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
