"""Files to records: JSON lines, a JSON list, tar archives, folders of pictures, plain text, COCO; tables are in `tables.py`.

A container cuts its files into spans, which can be read in any order and by any process, and gives the records of a span
one by one. Nothing is unpacked to the disk and nothing is ever executed: of an archive only pictures, text and JSON are
read. A file that is damaged gives a `Fault` in place of a record.
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
from transfusion.data.reading.files import Files, Found, reason_of

PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
MOST_MEMBER = 256 * 2**20  # bytes of one file in an archive, letters of one element of a list
PASSAGE = 20_000  # bytes of plain text after which the next blank line ends a document
LONGEST_PASSAGE = 80_000  # ... and after which the next line does
CHUNK = 2**20  # bytes read at a time
BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Span:
    """Records that stand side by side in one file."""

    path: str
    first: int  # row of the first, counted from 0
    rows: int
    offset: int = 0  # where it begins, in whatever the container counts


class Container(Protocol):
    """Files of one kind."""

    def spans(self, most: int) -> Iterator[Span]:
        """All that is there in order, at most so many records each."""
        ...

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        """(where, record or Fault) for each record of a span."""
        ...


def _chop(path: str, offsets: Iterator[tuple[int, int]], most: int) -> Iterator[Span]:
    """(row, offset) of every record to spans of at most `most`. A file that fails on the way keeps what came before it."""
    begun: tuple[int, int] | None = None
    count = 0
    for row, offset in offsets:
        if count == most:
            yield Span(path, begun[0], count, begun[1])
            begun, count = None, 0
        begun, count = begun or (row, offset), count + 1
    if begun:
        yield Span(path, begun[0], count, begun[1])


@dataclass(frozen=True)
class JsonLines:
    """One object a line. Rows are lines, counted with the empty ones, which are no records."""

    files: Files
    paths: Sequence[str]

    def spans(self, most: int) -> Iterator[Span]:
        for path in self.paths:
            yield from _chop(path, ((row, offset) for row, offset, _ in self._lines(path)), most)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        lines = self._lines(span.path, span.first, span.offset)
        for _, (row, _, line) in zip(range(span.rows), lines, strict=False):
            yield self.files.row(span.path, row), line if isinstance(line, Fault) else _object(line)

    def _lines(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, bytes | Fault]]:
        """(row, byte offset, line). What cannot be unpacked is a Fault, and the last."""
        try:
            with self.files.open(path, offset) as file:
                for line in file:
                    if line.strip() not in (b"", BOM):
                        yield row, offset, line
                    row, offset = row + 1, offset + len(line)
        except OSError as error:
            yield row, offset, damage(error)


def damage(error: Exception, kind: str = "cut short") -> Fault:
    """What is wrong with a file. A disk or a network that fails is no fault of the data, and is raised again."""
    if isinstance(error, OSError) and not isinstance(error, pa.ArrowException | FileNotFoundError):
        if type(error) is not OSError or error.errno is not None:  # see `Files.open`
            raise error
    return Fault(kind, f"it cannot be read from here on: {reason_of(error)}")


def _object(content: bytes | str) -> dict | Fault:
    """A JSON object, or what is wrong with it."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return Fault("wrong encoding", f"it is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Fault("bad JSON", f"it is no JSON: {error}")
    return value if isinstance(value, dict) else _no_object(value)


def _no_object(value: Any) -> Fault:
    kinds = {list: "a list", str: "text", type(None): "null"}  # the value itself may be of any length and depth
    return Fault("bad JSON", f"it must be a JSON object, not {kinds.get(type(value), value)}")


@dataclass(frozen=True)
class JsonList:
    """One list of objects, read piece by piece however long it is."""

    files: Files
    paths: Sequence[str]

    def spans(self, most: int) -> Iterator[Span]:
        for path in self.paths:
            yield from _chop(path, ((row, offset) for row, offset, _ in self._elements(path)), most)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        elements = self._elements(span.path, span.first, span.offset)
        for _, (row, _, value) in zip(range(span.rows), elements, strict=False):
            if not isinstance(value, dict | Fault):
                value = _no_object(value)
            yield self.files.row(span.path, row), value

    def _elements(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, Any]]:
        """(row, byte offset, element). One behind which nothing can be read is a Fault, and the last."""
        with self.files.open(path, offset) as file:
            text = _Letters(file, offset)
            if not offset:  # else some element stands there
                text.pass_over(_SPACE)
                if not text.begins_with("["):
                    yield row, 0, text.end if text.damaged else Fault("bad JSON", "the file holds no list")
                    return
                text.skip(text.at + 1)
            while True:
                text.pass_over(_BETWEEN)
                if text.begins_with("]"):
                    return
                value, end = text.element()
                yield row, text.offset, value
                if end == text.at:
                    return
                text.skip(end)
                row += 1


_DECODER = json.JSONDecoder()
_SPACE, _BETWEEN = re.compile("[ \n\r\t\ufeff]*"), re.compile("[ \n\r\t,]*")


class _Letters:
    """The text of a file from some byte on. Bytes that are no UTF-8 stay in it as halves of surrogates."""

    def __init__(self, file: BinaryIO, offset: int):
        self.file, self.text, self.at = file, "", 0  # what is held of it, and the letter that comes next
        self.offset = offset  # of that letter, in bytes of the file
        self.end: Fault | None = None  # why there is no more
        self.damaged = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def more(self) -> bool:
        """Read on, further each time; False at the end."""
        if self.end:
            return False
        try:
            content = self.file.read1(max(CHUNK, len(self.text) - self.at))
            if not content:
                self.end = Fault("cut short", "the list has no end: the file is cut short")
        except OSError as error:
            content, self.end, self.damaged = b"", damage(error), True
        self.text, self.at = self.text[self.at :] + self._decoder.decode(content, final=not content), 0
        return True

    def skip(self, to: int) -> None:
        self.offset += len(self.text[self.at : to].encode(errors="surrogateescape"))
        self.at = to

    def pass_over(self, letters: re.Pattern) -> None:
        """Skip all of these, and see that something is held behind them if anything is there."""
        while True:
            self.skip(letters.match(self.text, self.at).end())
            if self.at < len(self.text) or not self.more():
                return

    def begins_with(self, letter: str) -> bool:
        return self.text.startswith(letter, self.at)

    def element(self) -> tuple[Any, int]:
        """The JSON value that stands here and the letter behind it; a Fault, if there is none that is whole."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text):  # else it may be a number that goes on
                    break
            except json.JSONDecodeError as error:
                value, end = Fault("bad JSON", f"it is no JSON, nor read further: {error.msg}"), self.at
                if error.pos < len(self.text) - 16 and not error.msg.startswith("Unterminated"):
                    return value, end  # whatever else comes
            except (ValueError, RecursionError) as error:
                return Fault("bad JSON", f"it cannot be read, nor what follows: {reason_of(error)}"), self.at
            if len(self.text) - self.at > MOST_MEMBER or not self.more():
                break
        if end - self.at > MOST_MEMBER or (end == self.at and len(self.text) - self.at > MOST_MEMBER):
            return Fault("too large", f"it has more than {MOST_MEMBER:,} letters, and is not read further"), self.at
        if end == self.at and (self.at == len(self.text) or self.damaged):
            return self.end, self.at
        try:
            self.text[self.at : end].encode()
        except UnicodeEncodeError:  # these letters stand for bytes: see the decoder
            value = Fault("wrong encoding", "it is not UTF-8")
        return value, end


@dataclass(frozen=True)
class Archives:
    """WebDataset: a tar whose members of one key (their name up to the first dot) are one record.

    Only pictures, .txt, .caption, .cls and .json are read; whatever else lies there (pickles, say) is passed over. Of an
    archive that breaks off the last group may lack members: it is not read.
    """

    files: Files
    paths: Sequence[str]

    def spans(self, most: int) -> Iterator[Span]:
        for path in self.paths:
            groups = ((row, offset) for row, (offset, _, _) in enumerate(self._groups(path, 0, reading=False)))
            yield from _chop(path, groups, most)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        groups = self._groups(span.path, span.offset, reading=True)
        for _, (_, key, found) in zip(range(span.rows), groups, strict=False):
            yield f"{self.files.shown(span.path)}:{key}".rstrip(":"), found

    def _groups(self, path: str, offset: int, reading: bool) -> Iterator[tuple[int, str, Any]]:
        """(offset, key, record or Fault) in order, without contents unless `reading`. Damage is a Fault, and the last."""
        key, contents = "", {}
        try:
            with self.files.open(path, offset) as file, _open_tar(file) as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # it would remember all of them
                    if archive.offset <= member.offset:
                        raise tarfile.ReadError("a member has no size")
                    own, suffix = _key_and_suffix(member.name)
                    if not member.isreg() or not own or suffix not in _READ:
                        continue
                    if own != key:
                        if contents:
                            yield offset, key, _record(key, contents) if reading else None
                        key, contents, offset = own, {}, member.offset
                    contents[suffix] = self._content(archive, member) if reading else b""
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it has no end mark")
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
            yield offset, key, damage(error)
            return
        if contents:
            yield offset, key, _record(key, contents) if reading else None

    @staticmethod
    def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Fault:
        if member.size > MOST_MEMBER:
            return Fault("too large", f"{member.name} has {member.size:,} bytes")
        return archive.extractfile(member).read()


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    # whoever opened the file has undone its compression
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace")


_TEXTS = ("cls", "caption", "txt")  # the last that is there counts
_READ = (*PICTURES, *_TEXTS, "json")


def _key_and_suffix(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}/{stem}" if folder and stem else stem, suffix.lower()


def _record(key: str, contents: dict[str, Any]) -> dict | Fault:
    fault = next((value for value in contents.values() if isinstance(value, Fault)), None)
    if fault:
        return fault
    about = _object(contents["json"]) if "json" in contents else {}
    if isinstance(about, Fault):
        return Fault(about.kind, f"{key}.json: {about.message}")
    record: dict[str, Any] = dict(about)
    for suffix in (suffix for suffix in _READ if suffix in contents):
        if suffix in PICTURES:
            record["image"] = contents[suffix]
        elif suffix in _TEXTS:
            record["caption"] = _caption(contents[suffix])
    return record


def _caption(content: bytes) -> bytes:
    """What a text file says, without what editors put around it."""
    return content.removeprefix(BOM).strip()


@dataclass(frozen=True)
class PictureFolder:
    """Pictures, each with its caption in a .txt beside it, or captioned with its folder's name, or alone."""

    files: Files
    paths: Sequence[str]
    captions: str  # "text": a .txt beside each; "folder": the name of its folder; "": none

    def spans(self, most: int) -> Iterator[Span]:
        for first in range(0, len(self.paths), most):
            yield Span("", first, min(most, len(self.paths) - first))

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        for path in self.paths[span.first : span.first + span.rows]:
            record: dict[str, Any] = {"image": Found(path)}
            if self.captions == "text":
                beside = path.rpartition(".")[0] + ".txt"
                record["caption"] = _caption(self.files.read(beside)) if self.files.exists(beside) else None
            elif self.captions == "folder":
                record["caption"] = path.rpartition("/")[0].rpartition("/")[2].replace("_", " ")
            yield self.files.shown(path), record


@dataclass(frozen=True)
class PlainText:
    """Text files: each is a document, or several where it is long, cut behind a blank line. Not a letter is lost."""

    files: Files
    paths: Sequence[str]

    def spans(self, most: int) -> Iterator[Span]:
        for path in self.paths:
            yield from _chop(path, ((row, offset) for row, offset, _ in self._passages(path)), most)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        passages = self._passages(span.path, span.first, span.offset)
        for _, (row, _, content) in zip(range(span.rows), passages, strict=False):
            where = f"{self.files.shown(span.path)}:passage {row + 1}"
            yield where, content if isinstance(content, Fault) else {"text": content if row else content.removeprefix(BOM)}

    def _passages(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, bytes | Fault]]:
        """(row, byte offset, content). From the offset of any passage on, the same ones follow; none is blank."""
        found, size, says, ended = [], 0, False, False
        try:
            with self.files.open(path, offset) as file:
                for line in _short_lines(file):
                    blank = line.strip() in (b"", BOM)
                    if says and not blank and (size >= LONGEST_PASSAGE - 4 or (size >= PASSAGE and ended)):
                        yield row, offset, b"".join(found)
                        found, row, offset, size, says = [], row + 1, offset + size, 0, False
                    found.append(line)
                    size, says, ended = size + len(line), says or not blank, blank
            if says:
                yield row, offset, b"".join(found)
        except OSError as error:
            yield row, offset, damage(error)


def _short_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; one that is too long comes in pieces, cut between two letters."""
    tail = b""
    while line := tail + file.readline(LONGEST_PASSAGE - len(tail)):
        tail = b""
        if len(line) == LONGEST_PASSAGE and not line.endswith(b"\n"):  # cut before its last letter
            letter = next((n for n in range(1, 5) if line[-n] & 0xC0 != 0x80), 1)
            line, tail = line[:-letter], line[-letter:]
        yield line


class Coco:
    """COCO captions: one document per caption; those of one picture are kin."""

    def __init__(self, files: Files, paths: Sequence[str]):
        self.files, self.paths = files, paths
        self._held: tuple[str, list[Any]] = ("", [])  # the file read last: every span of it needs the whole

    def spans(self, most: int) -> Iterator[Span]:
        for path in self.paths:
            rows = len(self._rows(path))
            for first in range(0, rows, most):
                yield Span(path, first, min(most, rows - first))

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        for row, found in enumerate(self._rows(span.path)[span.first : span.first + span.rows], span.first):
            yield f"{self.files.shown(span.path)}:annotation {row + 1}", found

    def _rows(self, path: str) -> list[Any]:
        if self._held[0] != path:
            self._held = (path, _read_coco(self.files, path))
        return self._held[1]


def _read_coco(files: Files, path: str) -> list[Any]:
    try:
        about = _object(files.read(path))
    except OSError as error:
        about = damage(error)
    if isinstance(about, Fault):
        return [about]
    images, annotations = about.get("images"), about.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return [Fault("bad JSON", "it holds no lists of images and annotations")]
    folder, rows = files.pictures or _coco_folder(files, path), []
    names = {_coco_id(one, "id"): one.get("file_name") for one in images if isinstance(one, dict)}
    for number, one in enumerate(annotations, 1):
        key = _coco_id(one, "image_id")
        if key is None or not isinstance(name := names.get(key), str):
            rows.append(Fault("missing picture", f"annotation {number} names no picture of the list"))
        else:
            rows.append({"image": Found(f"{folder}/{name}"), "caption": one.get("caption"), "kin": json.dumps(key)})
    return rows


def _coco_id(one: Any, name: str) -> int | str | None:
    value = one.get(name) if isinstance(one, dict) else None
    return value if isinstance(value, int | str) else None


def _coco_folder(files: Files, path: str) -> str:
    """Where COCO's own layout has the pictures: annotations/captions_train2017.json -> ../train2017, else beside."""
    folder, _, name = path.rpartition("/")
    beside = f"{folder.rpartition('/')[0]}/{name.partition('.')[0].rpartition('_')[2]}"
    return beside if files.exists(beside) else folder
