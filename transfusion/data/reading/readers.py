"""What people have, read: a path, an address or a name -> a reader that gives documents and faults, unit by unit.

A unit is some records that are prepared together, by any process, into one shard. Units follow from the files alone.
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

from transfusion.config import BUILT_IN, DigitsConfig, ShapesConfig
from transfusion.data.built_in.digits import Digits
from transfusion.data.built_in.emoji import Emoji
from transfusion.data.built_in.photographs import Photographs
from transfusion.data.built_in.shapes import Shapes
from transfusion.data.built_in.topics import Topics
from transfusion.data.raw import Fault, RawDocument
from transfusion.data.reading.containers import (
    PICTURES,
    Archives,
    Coco,
    Container,
    JsonLines,
    JsonList,
    PictureFolder,
    PlainText,
    Span,
)  # fmt: skip
from transfusion.data.reading.files import COMPRESSED, Files
from transfusion.data.reading.records import FORMS, Form, columns_of, form_of, rename, to_document
from transfusion.data.reading.tables import CsvTables, Tables

SUFFIXES = {  # in this order: what a folder holds is the first that is found there
    "tar": ("tar", "tgz"), "parquet": ("parquet",), "arrow": ("arrow",), "jsonl": ("jsonl", "ndjson"),
    "csv": ("csv", "tsv"), "json": ("json",), "pictures": PICTURES, "text": ("txt", "text", "md", "rst"),
}  # fmt: skip
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test")  # words that name a split in a path
ALSO = {"train": ("training",), "validation": ("valid", "val", "dev")}  # what else a split is called
MADE_HELDOUT = 500  # held-out documents of a source that needs no files
LOOK = 100  # records that are looked at to learn their form


@dataclass(frozen=True)
class Options:
    """How a source is read; what is left out is found out."""

    form: Form | None = None  # of its records
    columns: Mapping[str, str] = field(default_factory=dict)  # our word -> its column; to nothing: not read
    pictures: str | None = None  # the folder from which the paths of pictures are counted
    split: str = "train"  # where files or folders are named after splits
    limit: int | None = None  # only so many records
    shapes: ShapesConfig = ShapesConfig()


@dataclass(frozen=True)
class Unit:
    """Records that are read together."""

    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        return sum(span.rows for span in self.spans)


class Reader:
    """A source of documents. `name` is what it is called in a data set and in the settings of a run."""

    def __init__(self, name: str, address: str, container: Container, files: Files | None, options: Options):
        self.name, self.address, self.container, self.files, self.options = name, address, container, files, options
        self.columns: set[str] = set()  # of the first records
        self.form = options.form if files is None else self._find_form()

    def units(self, most: int) -> list[Unit]:
        """All records in order, at most about so many a unit. ValueError when there are none."""
        units: list[Unit] = []
        waiting: list[Span] = []
        left = self.options.limit
        for span in self.container.spans(most):
            if left is not None:
                span = replace(span, rows=min(span.rows, left))
                left -= span.rows
            if waiting and sum(one.rows for one in waiting) + span.rows > most:
                units.append(Unit(tuple(waiting)))
                waiting = []
            waiting += [span] if span.rows else []
            if left == 0:
                break
        units += [Unit(tuple(waiting))] if waiting else []
        if not units:
            raise ValueError(f"{self.address} holds no records")
        return units

    def read(self, unit: Unit) -> Iterator[RawDocument | Fault]:
        """Its documents in order, and a fault in place of each that cannot be read."""
        for span in unit.spans:
            for where, found in self.container.records(span):
                yield self._document(where, found, span)

    def _document(self, where: str, found: Any, span: Span) -> RawDocument | Fault:
        where = _in_one_line(where)
        if isinstance(found, RawDocument):
            return replace(found, where=where, kin=where)
        if isinstance(found, Fault):
            return _at(found, where)
        try:
            record = rename(found, self.options.columns)
            document = to_document(self.form, record, self.files.beside(span.path or self.files.root + "/."))
        except Fault as fault:
            return _at(fault, where)
        except RecursionError:
            return Fault("bad JSON", "it is nested too deeply", where)
        kin = found.get("kin") if isinstance(self.container, Coco) else None
        return replace(document, where=where, kin=kin or document.kin or document.name or where)

    def fingerprint(self) -> str:
        """Of the names, sizes and times of its files: another one when any was changed, added or renamed.

        Of a source that needs no files: of what it says of the font, or the version of Python, that it comes from.
        """
        digest = hashlib.sha256()
        for mark in (self.files or self.container).marks():
            digest.update(repr(mark).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """How it is read, and what of it is not, in one line."""
        if self.files is None:
            beside = f"; what lies here under that name is ./{self.address}" if os.path.exists(self.address) else ""
            return f"{self.name}: built in{beside}"
        used = columns_of(self.form, self.columns)
        rest = sorted(self.columns - {*used, "kin"})
        line = f"{self.name}: each record is read as {self.form}" + (f" ({', '.join(used)})" if used else "")
        line += f"; columns not read: {', '.join(rest[:8])}{', ...' if len(rest) > 8 else ''}" if rest else ""
        unread = self._unread()
        kinds = ", ".join(f"{count:,} .{suffix}" for suffix, count in unread.most_common(6))
        return _in_one_line(line + (f"; files not read: {kinds}" if unread else ""))

    def _unread(self) -> Counter[str]:
        """Files that could have been read and are not, by suffix. Pictures that records name are none of them."""
        used = set(getattr(self.container, "paths", ()))
        passed_over = set() if isinstance(self.container, PictureFolder) else set(PICTURES)
        if isinstance(self.container, PictureFolder) and self.container.captions == "text":
            passed_over.add("txt")
        suffixes = (_suffix(path) for path in self.files.list() if path not in used)
        known = {suffix for kind in SUFFIXES.values() for suffix in kind} - passed_over
        return Counter(suffix for suffix in suffixes if suffix in known)

    def _find_form(self) -> Form:
        """The form asked for, or that most of the first records have. ValueError when none of them has any."""
        seen: Counter[Form] = Counter()
        faults: list[Fault] = []
        columns = self.columns
        records = (found for span in self.container.spans(LOOK) for found in self.container.records(span))
        for where, found in islice(records, LOOK):
            try:
                if isinstance(found, Fault):
                    raise found
                columns.update(found)
                seen[self.options.form or form_of(rename(found, self.options.columns))] += 1
            except Fault as fault:
                faults.append(_at(fault, _in_one_line(where)))
        missing = [theirs for theirs in self.options.columns.values() if theirs and theirs not in columns]
        if self.options.form is not None and not missing:
            return self.options.form
        if columns and missing:
            raise ValueError(f"{self.address} has no column {missing[0]!r}, only {_in_one_line(', '.join(sorted(columns)))}")
        if not seen:
            if faults:
                raise ValueError(f"{self.address}: nothing in it can be read; first {faults[0]}")
            raise ValueError(f"{self.address} holds no records")
        form = seen.most_common(1)[0][0]
        return "pair" if form == "image" and seen["pair"] else form  # some captions are missing: that is a fault


def _at(fault: Fault, where: str) -> Fault:
    return Fault(fault.kind, _in_one_line(fault.message), where)


def _in_one_line(text: str) -> str:
    """What files and columns are called may hold anything."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def open_reader(source: str, options: Options = Options()) -> Reader:  # noqa: B008 (frozen)
    """A source by `[name=]what`: a path, an address of fsspec, `owner/name` on the hub, or one of `MADE`.

    ValueError or OSError says in one line what is not there or not understood.
    """
    name, equals, address = source.partition("=")
    if not equals or "/" in name or "." in name:
        name, address = "", source
    if name and not all(letter.isalnum() or letter in "-_" for letter in name):
        raise ValueError(f"{name!r} cannot name a source: letters, digits, - and _ can")
    if name in BUILT_IN and address != name:
        raise ValueError(f"{name} is the name of a source that needs no files: choose another for {address}")
    if options.form is not None and options.form not in FORMS:
        raise ValueError(f"there is no form {options.form!r}; there are {', '.join(FORMS)}")
    if address in BUILT_IN:
        return Reader(name or address, address, Made(address, options), None, options)
    files = Files.at(address, options.pictures)
    container = _container_of(files, address, options)
    return Reader(name or _name_of(address), address, container, files, options)


class Made:
    """The sources that need no files: their documents are their records, the first of them held out."""

    def __init__(self, name: str, options: Options):
        self.train, heldout = (open_built_in(name, split, shapes=options.shapes) for split in ("train", "heldout"))
        most = MADE_HELDOUT if options.limit is None else min(MADE_HELDOUT, options.limit // 20)
        self.heldout = [heldout[n] for n in range(min(len(heldout), most))]

    def marks(self) -> list[tuple[str, Any]]:
        """What its documents depend on besides this package, where they depend on anything."""
        return sorted(self.train.describe().items()) if hasattr(self.train, "describe") else []

    def spans(self, most: int) -> Iterator[Span]:
        rows = len(self.heldout) + len(self.train)
        for first in range(0, rows, most):
            yield Span("", first, min(most, rows - first))

    def records(self, span: Span) -> Iterator[tuple[str, RawDocument]]:
        for row in range(span.first, span.first + span.rows):
            inside = row < len(self.heldout)
            found = self.heldout[row] if inside else self.train[row - len(self.heldout)]
            split = "heldout" if inside else "train"
            yield f"{split}:{found.id}", replace(found, split=split)


def open_built_in(
    name: str, split: str, digits: DigitsConfig = DigitsConfig(), shapes: ShapesConfig = ShapesConfig()  # noqa: B008
) -> Any:
    """A source that needs no files, by its name. ValueError when there is none."""
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


def _name_of(address: str) -> str:
    """A short name for a source, that can be a folder's."""
    last = address.rstrip("/").partition("*")[0].rstrip("/").rpartition("/")[2]
    kept = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in last.split(".")[0])
    kept = kept.strip("_") or "data"
    return f"my_{kept}" if kept in BUILT_IN else kept


def _container_of(files: Files, address: str, options: Options) -> Container:
    """What kind of files these are: by their suffixes, and for JSON by what stands in them."""
    if files.exists(f"{files.root}/dataset_dict.json"):  # several splits, as `save_to_disk` writes them
        files = replace(files, root=f"{files.root}/{options.split}")
        if not files.exists(files.root):
            raise FileNotFoundError(f"there is no split {options.split} in {address}")
    paths = files.list()
    kinds: dict[str, list[str]] = {kind: [] for kind in SUFFIXES}
    for path in paths:
        for kind, suffixes in SUFFIXES.items():
            if _suffix(path) in suffixes:
                kinds[kind].append(path)
    kinds = {kind: _of_split(files, found, kind, options.split) for kind, found in kinds.items() if found}
    if "arrow" in kinds:
        kinds["arrow"] = _saved(files, kinds["arrow"])
        kinds.pop("json", None)  # the state that lies beside
    if "pictures" in kinds and "json" in kinds and not any(_holds_records(files, path) for path in kinds["json"]):
        kinds.pop("json")  # settings of some program
    if "pictures" in kinds and not kinds.keys() - {"pictures", "text"}:
        return PictureFolder(files, kinds["pictures"], _captions(files, kinds))
    if not kinds:
        shown = ", ".join(sorted({f".{_suffix(path)}" for path in paths})[:8])
        raise ValueError(
            f"{address} holds nothing that can be read (only {shown})" if paths else f"{address} holds no files"
        )
    match next(iter(kinds)):
        case "parquet" | "arrow" as kind:
            return Tables(files, kinds[kind])
        case "tar":
            return Archives(files, kinds["tar"])
        case "jsonl":
            return JsonLines(files, kinds["jsonl"])
        case "csv":
            return CsvTables(files, kinds["csv"])
        case "json":
            return _json(files, kinds["json"], options)
        case _:
            return PlainText(files, kinds["text"])


def _json(files: Files, paths: Sequence[str], options: Options) -> Container:
    """A list of records, COCO's annotations, or one object a line, whatever the name says."""
    beginnings = ((path, _beginning(files, path)) for path in paths)
    path, beginning = next((found for found in beginnings if found[1]), (paths[0], b""))
    if beginning.startswith(b"["):
        return JsonList(files, paths)
    try:
        if isinstance(found := json.loads(beginning), dict) and "annotations" not in found:
            return JsonLines(files, paths)
    except (ValueError, RecursionError):
        pass
    try:
        about = json.loads(files.read(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{files.shown(path)} is no JSON: {error}") from None
    lists = isinstance(about, dict) and [about.get("annotations"), about.get("images")]
    if not lists or not all(isinstance(found, list) for found in lists):
        raise ValueError(f"{files.shown(path)} is neither a list of records nor annotations in COCO's manner")
    captions = [path for path in paths if path.rpartition("/")[2].startswith("captions")]  # boxes may lie beside
    return Coco(files, captions or paths)


def _holds_records(files: Files, path: str) -> bool:
    """Is there a list in it, or a record of some form, or COCO's annotations?"""
    beginning = _beginning(files, path)
    try:
        form_of(json.loads(beginning))
    except (Fault, AttributeError):
        return beginning.startswith(b"[") or b'"annotations"' in beginning
    except (ValueError, RecursionError):
        return beginning.startswith(b"[") or b'"annotations"' in files.read(path)
    return True


def _beginning(files: Files, path: str) -> bytes:
    """The first line of a file that is not blank; of a list less."""
    found = b""
    with files.open(path) as file:
        while not found and (more := file.read1(2**16)):
            found = more.lstrip(b" \n\r\t\xef\xbb\xbf")
        if not found.startswith(b"[") and b"\n" not in found:
            found += file.readline()
    return found.partition(b"\n")[0]


def _suffix(path: str) -> str:
    name = path.rpartition("/")[2].lower()
    for packed in COMPRESSED:
        if packed != ".tgz":
            name = name.removesuffix(packed)
    return name.rpartition(".")[2] if "." in name else ""


def _of_split(files: Files, paths: list[str], kind: str, split: str) -> list[str]:
    """The files whose path names the split; all of them where no path names any.

    Of pictures and texts, whose names may hold any word, only where every path names some split.
    """

    def names(path: str, words: Sequence[str]) -> bool:
        """Does a part of the path begin with the word, or end with it (and a year)? In between it means something else."""
        shown = files.shown(path).lower()
        found = (rf"(^|/){word}(?![a-z])|(?<![a-z]){word}\d*(?=\.|/|$)" for word in map(re.escape, map(str.lower, words)))
        return any(re.search(pattern, shown) for pattern in found)

    whole = files.fs.isfile(files.root) or (
        kind in ("pictures", "text") and not all(names(path, (*SPLITS, split)) for path in paths)
    )
    found = [path for path in paths if names(path, (split, *ALSO.get(split, ())))]
    return paths if whole or not found else found


def _captions(files: Files, kinds: Mapping[str, list[str]]) -> str:
    """Where the captions of a folder of pictures stand (see `PictureFolder`)."""
    stems = {path.rpartition(".")[0] for path in kinds.get("text", ()) if path.endswith(".txt")}
    if any(path.rpartition(".")[0] in stems for path in kinds["pictures"]):
        return "text"
    folders = {files.shown(path).rpartition("/")[0].rpartition("/")[2] for path in kinds["pictures"]}
    return "" if "" in folders or folders <= {*SPLITS} else "folder"


def _saved(files: Files, paths: list[str]) -> list[str]:
    """The tables of a saved data set: caches that were left beside them are none of it.

    ValueError when its order is a list beside it: it would be read in another, or with rows that it left out.
    """
    state = f"{files.root}/state.json"
    if not files.exists(state):
        return paths
    try:
        about = json.loads(files.read(state))
        names = {f"{files.root}/{one['filename']}" for one in about["_data_files"]}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{files.root}/state.json is damaged: save the data set once more") from None
    if about.get("_indices_data_files"):
        raise ValueError(f"{files.root} was saved with a list of rows beside it: call flatten_indices() before save_to_disk")
    return [path for path in paths if path in names]
