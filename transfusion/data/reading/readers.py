"""Readers: a path, an address or a name -> documents and faults, unit by unit.

A unit is a number of records that one process prepares into one shard. Units depend only on the files.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transfusion.codecs.pictures import IMAGE_SUFFIXES
from transfusion.config import BUILT_IN, DigitsConfig, ShapesConfig
from transfusion.data.built_in.digits import Digits
from transfusion.data.built_in.emoji import Emoji
from transfusion.data.built_in.photographs import Photographs
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.built_in.topics import Topics
from transfusion.data.raw import Fault, RawDocument
from transfusion.data.reading.account import Account
from transfusion.data.reading.archives import TarArchives
from transfusion.data.reading.coco import Coco
from transfusion.data.reading.container import Container, Span
from transfusion.data.reading.files import COMPRESSIONS, Files
from transfusion.data.reading.folders import ImageFolder
from transfusion.data.reading.json_files import JsonLines, JsonList
from transfusion.data.reading.plain_text import PlainText
from transfusion.data.reading.records import FORMS, Form, detect_form, rename_columns, to_document, used_columns
from transfusion.data.reading.tables import CsvTables, Tables

SUFFIXES = {  # the first kind of which a folder has files is read
    "tar": ("tar", "tgz"), "parquet": ("parquet",), "arrow": ("arrow",), "jsonl": ("jsonl", "ndjson"),
    "csv": ("csv", "tsv"), "json": ("json",), "images": IMAGE_SUFFIXES, "text": ("txt", "text", "md", "rst"),
}  # fmt: skip
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test")  # names of splits in paths
SPLIT_ALIASES = {"train": ("training",), "validation": ("valid", "val", "dev")}
MAX_BUILT_IN_HELDOUT = 500  # held-out documents of a built-in source
NUM_SAMPLES = 100  # records that are read to detect their form


@dataclass(frozen=True)
class ReaderOptions:
    """How a source is read."""

    form: Form | None = None  # of its records; None: detected
    columns: Mapping[str, str] = field(default_factory=dict)  # our name -> its column; "": not read
    image_root: str | None = None  # the folder that image paths are relative to
    split: str = "train"  # when files or folders are named after splits
    limit: int | None = None  # number of records
    shapes: ShapesConfig = ShapesConfig()


@dataclass(frozen=True)
class Unit:
    """Records that are prepared together."""

    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        return sum(span.rows for span in self.spans)


class Reader:
    """A source of documents. `name` is its name in a data set and in the configuration of a run."""

    def __init__(self, name: str, address: str, container: Container, files: Files | None, options: ReaderOptions):
        self.name, self.address, self.container, self.files, self.options = name, address, container, files, options
        self.columns: set[str] = set()  # of the sampled records
        self.listed = Account()  # of what `units` lists
        self.form = options.form if files is None else self._detect_form()

    @property
    def declares_split(self) -> bool:
        """Whether each of its documents is declared as training or held-out."""
        return self.files is None

    def units(self, max_rows: int) -> list[Unit]:
        """All records in order, in units of about `max_rows` records at most. ValueError if there are no records."""
        self.listed = Account()
        units: list[Unit] = []
        pending: list[Span] = []
        remaining = self.options.limit
        for span in self.container.spans(max_rows, self.listed):
            if remaining is not None:
                span = replace(span, rows=min(span.rows, remaining))
                remaining -= span.rows
            if pending and sum(earlier.rows for earlier in pending) + span.rows > max_rows:
                units.append(Unit(tuple(pending)))
                pending = []
            pending += [span] if span.rows else []
            if remaining == 0:
                break
        units += [Unit(tuple(pending))] if pending else []
        if not units:
            raise ValueError(f"{self.address} has no records")
        self.listed.find("records", sum(unit.rows for unit in units))
        return units

    def read(self, unit: Unit, account: Account | None = None) -> Iterator[RawDocument | Fault]:
        """The unit's documents in order; a fault instead of each record that cannot be read. What becomes of each record is
        counted in the account."""
        account = account or Account()
        for span in unit.spans:
            for where, record in self.container.records(span):
                item = self._document(where, record, span)
                if isinstance(item, Fault):
                    account.pass_over("records", item.kind, item.where)
                else:
                    account.read("records", "document")
                yield item

    def close_account(self, account: Account) -> None:
        """Add what is known from listing the files to the account of all units. After that it is closed."""
        account.add(self.listed)
        account.named = bytearray()

    def _document(self, where: str, record: Any, span: Span) -> RawDocument | Fault:
        where = _printable(where)
        if isinstance(record, RawDocument):
            return replace(record, where=where)
        if isinstance(record, Fault):
            return _locate_fault(record, where)
        try:
            renamed = rename_columns(record, self.options.columns)
            images = self.files.image_reader(span.path or self.files.root + "/.")
            document = to_document(self.form, renamed, images)
        except Fault as fault:
            return _locate_fault(fault, where)
        except RecursionError:
            return Fault("bad JSON", "it is nested too deeply", where)
        return replace(document, where=where)

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and times of its files: it differs after any file is changed, added or renamed. For a
        built-in source: over the font or the Python version that its documents depend on."""
        digest = hashlib.sha256()
        for version in (self.files or self.container).versions():
            digest.update(repr(version).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """How it is read, and which columns and files are not read, in one line."""
        if self.files is None:
            hint = f"; the local path of this name is ./{self.address}" if os.path.exists(self.address) else ""
            return f"{self.name}: built in{hint}"
        used = used_columns(self.form, self.columns)
        unused = sorted(self.columns - {*used})
        line = f"{self.name}: each record is read as {self.form}" + (f" ({', '.join(used)})" if used else "")
        line += f"; columns not read: {', '.join(unused[:8])}{', ...' if len(unused) > 8 else ''}" if unused else ""
        ignored = self._count_ignored()
        kinds = ", ".join(f"{count:,} .{suffix}" for suffix, count in ignored.most_common(6))
        return _printable(line + (f"; files not read: {kinds}" if ignored else ""))

    def _count_ignored(self) -> Counter[str]:
        """Number of readable files that are not read, by suffix. Images that records may name do not count."""
        used = set(getattr(self.container, "paths", ()))
        excluded = set() if isinstance(self.container, ImageFolder) else set(IMAGE_SUFFIXES)
        if isinstance(self.container, ImageFolder) and self.container.captions == "text":
            excluded.add("txt")
        suffixes = (_suffix(path) for path in self.files.list() if path not in used)
        readable = {suffix for kind in SUFFIXES.values() for suffix in kind} - excluded
        return Counter(suffix for suffix in suffixes if suffix in readable)

    def _detect_form(self) -> Form:
        """The configured form, or the most frequent one of the first records. ValueError when no record has a form."""
        counts: Counter[Form] = Counter()
        faults: list[Fault] = []
        columns = self.columns
        spans = self.container.spans(NUM_SAMPLES, Account())
        records = (record for span in spans for record in self.container.records(span))
        for where, record in islice(records, NUM_SAMPLES):
            try:
                if isinstance(record, Fault):
                    raise record
                columns.update(record)
                counts[self.options.form or detect_form(rename_columns(record, self.options.columns))] += 1
            except Fault as fault:
                faults.append(_locate_fault(fault, _printable(where)))
        missing = [name for name in self.options.columns.values() if name and name not in columns]
        if self.options.form is not None and not missing:
            return self.options.form
        if columns and missing:
            raise ValueError(f"{self.address} has no column {missing[0]!r}, only {_printable(', '.join(sorted(columns)))}")
        if not counts:
            if faults:
                raise ValueError(f"{self.address}: no record can be read; the first fault: {faults[0]}")
            raise ValueError(f"{self.address} has no records")
        form = counts.most_common(1)[0][0]
        return "pair" if form == "image" and counts["pair"] else form  # images without a caption are then faults


def _locate_fault(fault: Fault, where: str) -> Fault:
    return Fault(fault.kind, _printable(fault.message), where)


def _printable(text: str) -> str:
    """One line of text: names of files and columns may have any characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def open_reader(source: str, options: ReaderOptions = ReaderOptions()) -> Reader:  # noqa: B008 (frozen)
    """A reader of `[name=]source`: a path, an fsspec address, `owner/name` on the hub, or one of `BUILT_IN`. ValueError or
    OSError, in one line, when it does not exist or is not supported."""
    name, equals, address = source.partition("=")
    if not equals or "/" in name or "." in name:
        name, address = "", source
    if name and not all(c.isalnum() or c in "-_" for c in name):
        raise ValueError(f"{name!r} is not a valid source name: use letters, digits, - and _")
    if name in BUILT_IN and address != name:
        raise ValueError(f"{name} is the name of a built-in source: choose another name for {address}")
    if options.form is not None and options.form not in FORMS:
        raise ValueError(f"there is no form {options.form!r}; use one of {', '.join(FORMS)}")
    if address in BUILT_IN:
        return Reader(name or address, address, BuiltInContainer(address, options), None, options)
    files = Files.from_address(address, options.image_root)
    container = _open_container(files, address, options)
    return Reader(name or _derive_name(address), address, container, files, options)


class BuiltInContainer:
    """A built-in source, whose records are documents: first the held-out ones, then the training ones."""

    def __init__(self, name: str, options: ReaderOptions):
        self.train, heldout = (open_built_in(name, split, shapes=options.shapes) for split in ("train", "heldout"))
        limit = MAX_BUILT_IN_HELDOUT if options.limit is None else min(MAX_BUILT_IN_HELDOUT, options.limit // 20)
        self.heldout = [heldout[n] for n in range(min(len(heldout), limit))]

    def versions(self) -> list[tuple[str, Any]]:
        """What its documents depend on besides this package, for example a font."""
        return sorted(self.train.describe().items()) if hasattr(self.train, "describe") else []

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        rows = len(self.heldout) + len(self.train)
        for first in range(0, rows, max_rows):
            yield Span("", first, min(max_rows, rows - first))

    def records(self, span: Span) -> Iterator[tuple[str, RawDocument]]:
        for row in range(span.first, span.first + span.rows):
            is_heldout = row < len(self.heldout)
            document = self.heldout[row] if is_heldout else self.train[row - len(self.heldout)]
            split = "heldout" if is_heldout else "train"
            yield f"{split}:{document.id}", replace(document, split=split)


def open_built_in(
    name: str, split: str, digits: DigitsConfig = DigitsConfig(), shapes: ShapesConfig = ShapesConfig()  # noqa: B008
) -> Any:
    """A built-in source by its name. ValueError for an unknown name."""
    match name:
        case "digits":
            return Digits(split, digits.interleaved)
        case "shapes":
            return Shapes(level=shapes.level, size=shapes.size, split=split)
        case "topics":
            return Topics(split)
        case "emoji":
            return Emoji(split)
        case "photographs":
            return Photographs(split)
        case _:
            raise ValueError(f"there is no source {name!r}; there are {', '.join(BUILT_IN)}")


def _derive_name(address: str) -> str:
    """A short name for a source that is valid as a folder name."""
    last = address.rstrip("/").partition("*")[0].rstrip("/").rpartition("/")[2]
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in last.split(".")[0])
    name = name.strip("_") or "data"
    return f"my_{name}" if name in BUILT_IN else name


def _open_container(files: Files, address: str, options: ReaderOptions) -> Container:
    """The container for the kind of these files: by their suffixes, and for JSON by their content."""
    if files.exists(f"{files.root}/dataset_dict.json"):  # several splits, written by `save_to_disk`
        files = replace(files, root=f"{files.root}/{options.split}")
        if not files.exists(files.root):
            raise FileNotFoundError(f"there is no split {options.split} in {address}")
    paths = files.list()
    kinds: dict[str, list[str]] = {kind: [] for kind in SUFFIXES}
    for path in paths:
        for kind, suffixes in SUFFIXES.items():
            if _suffix(path) in suffixes:
                kinds[kind].append(path)
    kinds = {kind: _select_split(files, listed, kind, options.split) for kind, listed in kinds.items() if listed}
    if "arrow" in kinds:
        kinds["arrow"] = _select_saved(files, kinds["arrow"])
        kinds.pop("json", None)  # state.json
    if "images" in kinds and "json" in kinds and not any(_has_records(files, path) for path in kinds["json"]):
        kinds.pop("json")  # settings of another program
    if "images" in kinds and not kinds.keys() - {"images", "text"}:
        return ImageFolder(files, kinds["images"], _find_captions(files, kinds))
    if not kinds:
        suffixes = ", ".join(sorted({f".{_suffix(path)}" for path in paths})[:8])
        raise ValueError(f"{address} has no supported files (only {suffixes})" if paths else f"{address} has no files")
    match next(iter(kinds)):
        case "parquet" | "arrow" as kind:
            return Tables(files, kinds[kind])
        case "tar":
            return TarArchives(files, kinds["tar"])
        case "jsonl":
            return JsonLines(files, kinds["jsonl"])
        case "csv":
            return CsvTables(files, kinds["csv"])
        case "json":
            return _open_json(files, kinds["json"])
        case _:
            return PlainText(files, kinds["text"])


def _open_json(files: Files, paths: Sequence[str]) -> Container:
    """Lists of records, COCO's annotations, or one object per line; the content of the first file decides."""
    first_lines = ((path, _first_line(files, path)) for path in paths)
    path, line = next((pair for pair in first_lines if pair[1]), (paths[0], b""))
    if line.startswith(b"["):
        return JsonList(files, paths)
    try:
        if isinstance(record := json.loads(line), dict) and "annotations" not in record:
            return JsonLines(files, paths)
    except (ValueError, RecursionError):
        pass
    try:
        content = json.loads(files.read(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{files.relative_path(path)} is not valid JSON: {error}") from None
    lists = isinstance(content, dict) and [content.get("annotations"), content.get("images")]
    if not lists or not all(isinstance(value, list) for value in lists):
        raise ValueError(f"{files.relative_path(path)} has neither a list of records nor COCO annotations")
    captions = [path for path in paths if path.rpartition("/")[2].startswith("captions")]  # not files of boxes
    return Coco(files, captions or paths)


def _has_records(files: Files, path: str) -> bool:
    """Whether a JSON file has a list, a record of any form, or COCO's annotations."""
    line = _first_line(files, path)
    try:
        detect_form(json.loads(line))
    except (Fault, AttributeError):
        return line.startswith(b"[") or b'"annotations"' in line
    except (ValueError, RecursionError):
        return line.startswith(b"[") or b'"annotations"' in files.read(path)
    return True


def _first_line(files: Files, path: str) -> bytes:
    """The first line of a file that is not blank; if it starts a list, perhaps only its beginning."""
    line = b""
    with files.open(path) as file:
        while not line and (content := file.read1(2**16)):
            line = content.lstrip(b" \n\r\t\xef\xbb\xbf")
        if not line.startswith(b"[") and b"\n" not in line:
            line += file.readline()
    return line.partition(b"\n")[0]


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2].lower()
    for suffix in COMPRESSIONS:
        if suffix != ".tgz":
            name = name.removesuffix(suffix)
    return name.rpartition(".")[2] if "." in name else ""


def _select_split(files: Files, paths: list[str], kind: str, split: str) -> list[str]:
    """The files whose path contains the split's name; all files when none does. Image and text file names may contain any
    word: they are selected only when every path contains a split's name."""

    def has_any(path: str, words: Sequence[str]) -> bool:
        """Whether a part of the path starts or ends with a word (and a year). Inside a part it has another meaning."""
        name = files.relative_path(path).lower()
        escaped = map(re.escape, map(str.lower, words))
        patterns = (rf"(^|/){word}(?![a-z])|(?<![a-z]){word}\d*(?=\.|/|$)" for word in escaped)
        return any(re.search(pattern, name) for pattern in patterns)

    is_whole = files.fs.isfile(files.root) or (
        kind in ("images", "text") and not all(has_any(path, (*SPLITS, split)) for path in paths)
    )
    selected = [path for path in paths if has_any(path, (split, *SPLIT_ALIASES.get(split, ())))]
    return paths if is_whole or not selected else selected


def _find_captions(files: Files, kinds: Mapping[str, list[str]]) -> str:
    """Where the captions of an image folder are (see `ImageFolder`)."""
    stems = {path.rpartition(".")[0] for path in kinds.get("text", ()) if path.endswith(".txt")}
    if any(path.rpartition(".")[0] in stems for path in kinds["images"]):
        return "text"
    folders = {files.relative_path(path).rpartition("/")[0].rpartition("/")[2] for path in kinds["images"]}
    return "" if "" in folders or folders <= {*SPLITS} else "folder"


def _select_saved(files: Files, paths: list[str]) -> list[str]:
    """The tables of a saved data set, without the cache files next to them. ValueError when it was saved with an index of
    rows: without it, order and rows would be wrong."""
    state_path = f"{files.root}/state.json"
    if not files.exists(state_path):
        return paths
    try:
        state = json.loads(files.read(state_path))
        names = {f"{files.root}/{entry['filename']}" for entry in state["_data_files"]}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{files.root}/state.json is damaged: save the data set again") from None
    if state.get("_indices_data_files"):
        raise ValueError(f"{files.root} was saved with an index of rows: call flatten_indices() before save_to_disk")
    return [path for path in paths if path in names]
