"""Files to records: JSON lines, JSON lists, tar archives, image folders, plain text, COCO. `tables.py` has tables.

A container divides its files into spans, which any process can read in any order, and yields the records of a span.
Nothing is extracted to disk or executed: only images, text and JSON are read from an archive. A damaged file yields a
`Fault` instead of a record.
"""

import codecs
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import pyarrow as pa

from transfusion.data.raw import Fault
from transfusion.data.reading.files import Files, ListedPath, error_line

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
MAX_RECORD_SIZE = 256 * 2**20  # bytes of one file in an archive, characters of one element of a list
PASSAGE_BYTES = 20_000  # of plain text; after them the next blank line ends a document
MAX_PASSAGE_BYTES = 80_000  # after them the next line ends it
READ_SIZE = 2**20  # bytes read at a time
BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Span:
    """Consecutive records of one file."""

    path: str
    first: int  # row of the first, counted from 0
    rows: int
    offset: int = 0  # of its start, in a unit of the container


class Container(Protocol):
    """Files of one kind."""

    def spans(self, max_rows: int) -> Iterator[Span]:
        """All records in order, in spans of at most `max_rows`."""
        ...

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        """(where, record or Fault) for each record of a span."""
        ...


def _group(path: str, offsets: Iterator[tuple[int, int]], max_rows: int) -> Iterator[Span]:
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


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line. Rows are line numbers; empty lines count, but are not records."""

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int) -> Iterator[Span]:
        for path in self.paths:
            yield from _group(path, ((row, offset) for row, offset, _ in self._lines(path)), max_rows)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        lines = self._lines(span.path, span.first, span.offset)
        for _, (row, _, line) in zip(range(span.rows), lines, strict=False):
            yield self.files.format_row(span.path, row), line if isinstance(line, Fault) else _parse_object(line)

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


def damage_fault(error: Exception, kind: str = "cut short") -> Fault:
    """The fault of a damaged file. Errors of a disk or a network are not faults of the data and are raised again."""
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException | FileNotFoundError):
        if type(error) is not OSError or error.errno is not None:  # see `Files.open`
            raise error
    return Fault(kind, f"the file cannot be read from here on: {error_line(error)}")


def _parse_object(content: bytes | str) -> dict | Fault:
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

    def spans(self, max_rows: int) -> Iterator[Span]:
        for path in self.paths:
            yield from _group(path, ((row, offset) for row, offset, _ in self._elements(path)), max_rows)

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
                self.end_fault = Fault("cut short", "the list has no end: the file is cut short")
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
        """The JSON value at the current position, and the position after it; a Fault when no complete value is there."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
                if end < len(self.text):  # otherwise a number may continue
                    break
            except json.JSONDecodeError as error:
                value, end = Fault("bad JSON", f"it is not valid JSON, the rest is not read: {error.msg}"), self.position
                if error.pos < len(self.text) - 16 and not error.msg.startswith("Unterminated"):
                    return value, end  # more text cannot help
            except (ValueError, RecursionError) as error:
                return Fault("bad JSON", f"it cannot be read, the rest is not read: {error_line(error)}"), self.position
            if len(self.text) - self.position > MAX_RECORD_SIZE or not self.read_more():
                break
        size = (len(self.text) if end == self.position else end) - self.position
        if size > MAX_RECORD_SIZE:
            return Fault("too large", f"it has over {MAX_RECORD_SIZE:,} characters, the rest is not read"), self.position
        if end == self.position and (self.position == len(self.text) or self.is_damaged):
            return self.end_fault, self.position
        try:
            self.text[self.position : end].encode()
        except UnicodeEncodeError:  # lone surrogates: see the decoder
            value = Fault("wrong encoding", "it is not UTF-8")
        return value, end


@dataclass(frozen=True)
class TarArchives:
    """WebDataset: a tar archive in which members with the same key (their name up to the first dot) are one record. Only
    images, .txt, .caption, .cls and .json are read; other members (for example pickles) are skipped. In a truncated archive
    the last record may lack members, so it is not read."""

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int) -> Iterator[Span]:
        for path in self.paths:
            groups = ((row, offset) for row, (offset, _, _) in enumerate(self._groups(path, 0, read=False)))
            yield from _group(path, groups, max_rows)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        groups = self._groups(span.path, span.offset, read=True)
        for _, (_, key, record) in zip(range(span.rows), groups, strict=False):
            yield f"{self.files.relative_path(span.path)}:{key}".rstrip(":"), record

    def _groups(self, path: str, offset: int, read: bool) -> Iterator[tuple[int, str, Any]]:
        """(offset, key, record or Fault) in order; records are None unless `read`. Damage ends with a Fault."""
        key, contents = "", {}
        try:
            with self.files.open(path, offset) as file, _open_tar(file) as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # otherwise tarfile keeps all of them
                    if archive.offset <= member.offset:
                        raise tarfile.ReadError("a member has no size")
                    member_key, suffix = _key_and_suffix(member.name)
                    if not member.isreg() or not member_key or suffix not in _READ_SUFFIXES:
                        continue
                    if member_key != key:
                        if contents:
                            yield offset, key, _build_record(key, contents) if read else None
                        key, contents, offset = member_key, {}, member.offset
                    contents[suffix] = self._content(archive, member) if read else b""
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it has no end mark")
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
            yield offset, key, damage_fault(error)
            return
        if contents:
            yield offset, key, _build_record(key, contents) if read else None

    @staticmethod
    def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Fault:
        if member.size > MAX_RECORD_SIZE:
            return Fault("too large", f"{member.name} has {member.size:,} bytes; at most {MAX_RECORD_SIZE:,}")
        return archive.extractfile(member).read()


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    # the file is already decompressed
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace")


_TEXT_SUFFIXES = ("cls", "caption", "txt")  # the last that exists is the caption
_READ_SUFFIXES = (*IMAGE_SUFFIXES, *_TEXT_SUFFIXES, "json")


def _key_and_suffix(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of the file name."""
    folder, _, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}/{stem}" if folder and stem else stem, suffix.lower()


def _build_record(key: str, contents: dict[str, Any]) -> dict | Fault:
    fault = next((value for value in contents.values() if isinstance(value, Fault)), None)
    if fault:
        return fault
    fields = _parse_object(contents["json"]) if "json" in contents else {}
    if isinstance(fields, Fault):
        return Fault(fields.kind, f"{key}.json: {fields.message}")
    record: dict[str, Any] = dict(fields)
    for suffix in (suffix for suffix in _READ_SUFFIXES if suffix in contents):
        if suffix in IMAGE_SUFFIXES:
            record["image"] = contents[suffix]
        elif suffix in _TEXT_SUFFIXES:
            record["caption"] = _strip_caption(contents[suffix])
    return record


def _strip_caption(content: bytes) -> bytes:
    """The content of a text file without byte order mark and surrounding white space."""
    return content.removeprefix(BOM).strip()


@dataclass(frozen=True)
class ImageFolder:
    """Images, each with a caption from a .txt file of the same name or from its folder's name, or without captions."""

    files: Files
    paths: Sequence[str]
    captions: str  # "text": a .txt file of the same name; "folder": the name of its folder; "": no captions

    def spans(self, max_rows: int) -> Iterator[Span]:
        for first in range(0, len(self.paths), max_rows):
            yield Span("", first, min(max_rows, len(self.paths) - first))

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        for path in self.paths[span.first : span.first + span.rows]:
            record: dict[str, Any] = {"image": ListedPath(path)}
            if self.captions == "text":
                text_path = path.rpartition(".")[0] + ".txt"
                has_text = self.files.exists(text_path)
                record["caption"] = _strip_caption(self.files.read(text_path)) if has_text else None
            elif self.captions == "folder":
                record["caption"] = path.rpartition("/")[0].rpartition("/")[2].replace("_", " ")
            yield self.files.relative_path(path), record


@dataclass(frozen=True)
class PlainText:
    """Text files. Each is one document; a long one is split after blank lines into several. No character is lost."""

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int) -> Iterator[Span]:
        for path in self.paths:
            yield from _group(path, ((row, offset) for row, offset, _ in self._passages(path)), max_rows)

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


class Coco:
    """COCO captions: one document per caption."""

    def __init__(self, files: Files, paths: Sequence[str]):
        self.files, self.paths = files, paths
        self._cache: tuple[str, list[Any]] = ("", [])  # path and rows of the last file: each span needs the whole file

    def spans(self, max_rows: int) -> Iterator[Span]:
        for path in self.paths:
            rows = len(self._rows(path))
            for first in range(0, rows, max_rows):
                yield Span(path, first, min(max_rows, rows - first))

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        for row, record in enumerate(self._rows(span.path)[span.first : span.first + span.rows], span.first):
            yield f"{self.files.relative_path(span.path)}:annotation {row + 1}", record

    def _rows(self, path: str) -> list[Any]:
        if self._cache[0] != path:
            self._cache = (path, _read_coco(self.files, path))
        return self._cache[1]


def _read_coco(files: Files, path: str) -> list[Any]:
    try:
        content = _parse_object(files.read(path))
    except OSError as error:
        content = damage_fault(error)
    if isinstance(content, Fault):
        return [content]
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return [Fault("bad JSON", "it has no lists of images and annotations")]
    folder, rows = files.image_root or _coco_folder(files, path), []
    names = {_coco_id(image, "id"): image.get("file_name") for image in images if isinstance(image, dict)}
    for number, annotation in enumerate(annotations, 1):
        key = _coco_id(annotation, "image_id")
        if key is None or not isinstance(name := names.get(key), str):
            rows.append(Fault("missing image", f"annotation {number} has no image in the list of images"))
        else:
            rows.append({"image": ListedPath(f"{folder}/{name}"), "caption": annotation.get("caption")})
    return rows


def _coco_id(entry: Any, name: str) -> int | str | None:
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) else None


def _coco_folder(files: Files, path: str) -> str:
    """COCO's image folder: annotations/captions_train2017.json -> ../train2017 if it exists, otherwise the file's folder."""
    folder, _, name = path.rpartition("/")
    image_folder = f"{folder.rpartition('/')[0]}/{name.partition('.')[0].rpartition('_')[2]}"
    return image_folder if files.exists(image_folder) else folder
