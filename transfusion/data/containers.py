"""Files to records: JSON lines, a JSON list, parquet and Arrow tables, tar archives, folders of pictures, plain text, COCO.

A container cuts its files into spans, which can be read in any order and by any process, and gives the records of a span
one by one. Nothing is unpacked to the disk and nothing is ever executed: of an archive only pictures, text and JSON are
read. A file that is damaged gives a `Fault` in place of a record.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from transfusion.data.files import Files
from transfusion.data.raw import Fault

PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
MOST_MEMBER = 256 * 2**20  # bytes of one file in an archive, letters of one element of a list
PASSAGE = 20_000  # bytes of plain text after which the next blank line ends a document
LONGEST_PASSAGE = 80_000  # ... and after which the next line does
CHUNK = 2**20  # bytes or letters read at a time
ROWS = 16  # of a table that are turned into records at a time: each may hold a picture


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
            yield self.files.row(span.path, row), _object(line)

    def _lines(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, bytes]]:
        with self.files.open(path, offset) as file:
            for line in file:
                if line.strip():
                    yield row, offset, line
                row, offset = row + 1, offset + len(line)


def _object(content: bytes | str) -> dict | Fault:
    """A JSON object, or what is wrong with it."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return Fault("wrong encoding", f"it is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Fault("bad JSON", f"it is no JSON: {error}")
    return value if isinstance(value, dict) else Fault("bad JSON", f"it must be a JSON object, not {str(value)[:40]}")


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
                value = Fault("bad JSON", f"it must be a JSON object, not {str(value)[:40]}")
            yield self.files.row(span.path, row), value

    def _elements(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, Any]]:
        """(row, byte offset, element). The first that cannot be read is a Fault, and the last."""
        with self.files.open(path, offset) as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8", newline="")
            if not offset:
                head = text.read(CHUNK)
                opening = head.index("[") + 1  # whoever chose this container has seen it
                buffer, offset = head[opening:], len(head[:opening].encode())
            else:
                buffer = ""
            whole = False
            while True:
                rest = buffer.lstrip(" ,\n\r\t")
                offset, buffer = offset + len(buffer) - len(rest), rest  # all of these are one byte each
                if buffer.startswith("]"):
                    return
                try:
                    value, end = _DECODER.raw_decode(buffer)
                    enough = end < len(buffer)  # else it may be a number that goes on
                except (ValueError, RecursionError) as error:
                    value, end, enough = Fault("bad JSON", f"it is no JSON, nor read further: {error}"), len(buffer), False
                if not enough and not whole and len(buffer) < MOST_MEMBER:
                    try:
                        more = text.read(max(CHUNK, len(buffer)))
                    except UnicodeDecodeError as error:
                        yield row, offset, Fault("wrong encoding", f"it is not UTF-8, nor read further: {error.reason}")
                        return
                    buffer, whole = buffer + more, not more
                    continue
                if not buffer:
                    value = Fault("cut short", "the list has no end: the file is cut short")
                yield row, offset, value
                if isinstance(value, Fault):
                    return
                row, offset, buffer = row + 1, offset + len(buffer[:end].encode("utf-8", "surrogatepass")), buffer[end:]


_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Tables:
    """Parquet, and Arrow as Hugging Face's `save_to_disk` writes it. A class label becomes its name."""

    files: Files
    paths: Sequence[str]

    def spans(self, most: int) -> Iterator[Span]:
        for path in self.paths:
            try:
                sizes = self._sizes(path)
            except (pa.ArrowException, OSError) as error:
                _pass_on(error)
                yield Span(path, 0, 1, -1)  # reading it says why
                continue
            row = begun = first = 0
            for group, size in enumerate(sizes):
                if row > begun and row + size - begun > most:
                    yield Span(path, begun, row - begun, first)
                    begun, first = row, group
                row += size
            if row > begun:
                yield Span(path, begun, row - begun, first)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        row = span.first
        try:
            for batch in self._batches(span):
                names = _label_names(batch.schema)
                for record in batch.to_pylist():
                    for column, labels in names.items():
                        label = record.get(column)
                        record[column] = labels[label] if isinstance(label, int) and 0 <= label < len(labels) else label
                    yield self.files.row(span.path, row), record
                    row += 1
        except (pa.ArrowException, OSError) as error:
            _pass_on(error)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield self.files.row(span.path, row), Fault("damaged table", f"it cannot be read from here on: {reason}")

    def _sizes(self, path: str) -> list[int]:
        """Rows of each part that can be read by itself."""
        if path.endswith(".parquet"):
            with self.files.open(path) as file:
                about = pq.ParquetFile(file).metadata
                return [about.row_group(n).num_rows for n in range(about.num_row_groups)]
        return [len(batch) for batch in self._arrow(path)]

    def _batches(self, span: Span) -> Iterator[pa.RecordBatch]:
        if span.path.endswith(".parquet"):
            with self.files.open(span.path) as file:
                table, groups, rows = pq.ParquetFile(file), [], 0
                while rows < span.rows:
                    groups.append(max(0, span.offset) + len(groups))
                    rows += table.metadata.row_group(groups[-1]).num_rows
                yield from table.iter_batches(batch_size=ROWS, row_groups=groups)
            return
        rows = 0
        for number, batch in enumerate(self._arrow(span.path)):
            if number >= span.offset and rows < span.rows:
                yield from (batch.slice(n, ROWS) for n in range(0, len(batch), ROWS))
                rows += len(batch)

    def _arrow(self, path: str) -> Iterator[pa.RecordBatch]:
        source = self.files.map(path)
        try:
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            found = pa.ipc.open_file(source)
            yield from (found.get_batch(n) for n in range(found.num_record_batches))


def _pass_on(error: Exception) -> None:
    """A disk or a network that fails is no fault of the data."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        raise error


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of class labels by column, as Hugging Face notes them in a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: f["names"] for name, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError):
        return {}


@dataclass(frozen=True)
class Archives:
    """WebDataset: a tar whose members of one key (their name up to the first dot) are one record.

    Only pictures, .txt, .caption, .cls and .json are read; whatever else lies there (pickles, say) is passed over.
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
            yield f"{self.files.shown(span.path)}:{key}", found

    def _groups(self, path: str, offset: int, reading: bool) -> Iterator[tuple[int, str, Any]]:
        """(offset, key, record or Fault) in order, without contents unless `reading`. Damage is a Fault, and the last."""
        key, contents = "", {}
        with self.files.open(path, offset) as file:
            try:  # whoever opened the file has undone its compression
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        archive.members = []  # it would remember all of them
                        own, suffix = _key_and_suffix(member.name)
                        if not member.isreg() or not own or suffix not in _READ:
                            continue
                        if own != key:
                            if contents:
                                yield offset, key, _record(key, contents) if reading else None
                            key, contents, offset = own, {}, member.offset
                        contents[suffix] = self._content(archive, member) if reading else b""
                    file.seek(archive.offset)
                    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                        raise tarfile.ReadError("it has no end mark")
            except (tarfile.TarError, EOFError, OSError) as error:
                _pass_on(error)
                yield offset, key, Fault("cut short", f"the archive is cut short here, or damaged: {error}")
                return
        if contents:
            yield offset, key, _record(key, contents) if reading else None

    @staticmethod
    def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Fault:
        if member.size > MOST_MEMBER:
            return Fault("too large", f"{member.name} has {member.size:,} bytes")
        return archive.extractfile(member).read()


_TEXTS = ("txt", "caption", "cls")
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
    for suffix, content in contents.items():
        if suffix in PICTURES:
            record["image"] = content
        elif suffix in _TEXTS:
            record["caption"] = content.removesuffix(b"\n")
    return record


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
            record: dict[str, Any] = {"image": path}
            if self.captions == "text":
                beside = path.rpartition(".")[0] + ".txt"
                content = self.files.read(beside) if self.files.exists(beside) else None
                record["caption"] = content and content.removeprefix(b"\xef\xbb\xbf").strip()
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
            content = content.removeprefix(b"\xef\xbb\xbf") if row == 0 else content
            yield f"{self.files.shown(span.path)}:passage {row + 1}", {"text": content}

    def _passages(self, path: str, row: int = 0, offset: int = 0) -> Iterator[tuple[int, int, bytes]]:
        """(row, byte offset, content). From the offset of any passage on, the same ones follow."""
        found, size, ended, tail = [], 0, False, b""
        with self.files.open(path, offset) as file:
            while line := tail + file.readline(LONGEST_PASSAGE - len(tail)):
                tail = b""
                if len(line) == LONGEST_PASSAGE and not line.endswith(b"\n"):  # cut before its last letter
                    letter = next((n for n in range(1, 5) if line[-n] & 0xC0 != 0x80), 1)
                    line, tail = line[:-letter], line[-letter:]
                if size >= LONGEST_PASSAGE - 4 or (size >= PASSAGE and ended and line.strip()):
                    yield row, offset, b"".join(found)
                    found, row, offset, size = [], row + 1, offset + size, 0
                found.append(line)
                size, ended = size + len(line), not line.strip()
        if b"".join(found).strip():
            yield row, offset, b"".join(found)


class Coco:
    """COCO captions: one document per caption; those of one picture are kin."""

    def __init__(self, files: Files, paths: Sequence[str], folder: str):
        self.files, self.paths, self.folder = files, paths, folder  # the folder is that of the pictures
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
            self._held = (path, _read_coco(self.files, path, self.folder))
        return self._held[1]


def _read_coco(files: Files, path: str, folder: str) -> list[Any]:
    about = _object(files.read(path))
    if isinstance(about, Fault):
        return [about]
    names = {one.get("id"): one.get("file_name") for one in about.get("images", ()) if isinstance(one, dict)}
    rows: list[Any] = []
    for number, one in enumerate(about.get("annotations", ())):
        name = names.get(one.get("image_id")) if isinstance(one, dict) else None
        if not isinstance(name, str):
            rows.append(Fault("missing picture", f"annotation {number + 1} names no picture of the list"))
        else:
            rows.append({"image": f"{folder}/{name}", "caption": one.get("caption"), "kin": f"{one['image_id']}"})
    return rows
