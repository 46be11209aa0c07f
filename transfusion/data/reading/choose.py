"""Which files of a source are read, and by which container; and why the others are not read."""

import json
import posixpath
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice

from transfusion.codecs.pictures import IMAGE_SUFFIXES
from transfusion.data.raw import CUT_SHORT, Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.archives import TarArchives
from transfusion.data.reading.arrow_tables import ArrowTables
from transfusion.data.reading.columns import (
    COLUMN_NAMES,
    describe_record,
    find_column,
    path_of_picture,
    plain_name,
    rename_columns,
)  # fmt: skip
from transfusion.data.reading.container import Container
from transfusion.data.reading.csv_files import CsvFiles, find_dialect
from transfusion.data.reading.files import COMPRESSIONS, Files
from transfusion.data.reading.folders import PictureFolder, find_beside, find_captions
from transfusion.data.reading.json_files import JsonFiles, first_line
from transfusion.data.reading.listing import NAMED_BY_NONE, Listing, Selection
from transfusion.data.reading.plain_text import PlainText
from transfusion.data.reading.splits import (
    ALL,
    canonical,
    describe_missing_split,
    heldout_split,
    split_of_path,
    splits_of_folders,
)  # fmt: skip
from transfusion.data.reading.values import possible_paths, printable

RECORD_KINDS = {  # the first kind of which a folder has files with records is read
    "archives": ("tar", "tgz"), "Parquet tables": ("parquet",), "Arrow tables": ("arrow", "feather"),
    "JSON lines": ("jsonl", "ndjson"), "tables": ("csv", "tsv", "token"), "JSON": ("json",),
}  # fmt: skip
PICTURES, TEXTS = "pictures", "texts"
KINDS = {**RECORD_KINDS, PICTURES: IMAGE_SUFFIXES, TEXTS: ("txt", "text", "md", "rst")}
KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}
MAX_FIRST_LINE = 4096  # bytes of a text that show whether it is a table
NUM_SAMPLES = 20  # records of a file that show what it is
MAX_PICTURE_FOLDERS = 100  # in which the pictures of the first records are looked for
NUM_SAMPLE_PICTURES = 1_000  # pictures of a folder that show whether captions are beside them


def choose_containers(
    files: Files, listing: Listing, address: str, split: str | None, columns: Mapping[str, str]
) -> tuple[dict[str, Container], Mapping[str, str]]:
    """The containers of a source by their split, "" without one: of `split`, or if it is None of the split to train on and
    the split that is held out. And the columns, with that of the names of pictures if its values are known only from the
    pictures. What becomes of each file is decided in the listing. ValueError when none can be read."""
    choice = Choice(files, listing, split, columns)
    containers = choice.choose()
    if not containers:
        raise ValueError(choice.describe_failure(address))
    return containers, choice.columns


class Choice:
    """The files of a source by kind and split, and which of them are read."""

    def __init__(self, files: Files, listing: Listing, split: str | None, columns: Mapping[str, str]):
        self.files, self.listing, self.columns = files, listing, columns
        self.has_heldout = split is None  # whether the split that is held out is also read
        self.split = canonical(split or "train")
        self.read_splits = {self.split}
        self.suffixes: set[str] = set()  # of all files
        self.kinds = {kind: array("Q") for kind in KINDS}  # indices of files
        for index, path in enumerate(listing):
            if not listing.is_undecided(index):
                continue
            suffix = suffix_of(path)
            self.suffixes.add(suffix)
            if kind := KIND_OF_SUFFIX.get(suffix):
                self.kinds[kind].append(index)
            elif suffix != "caption":
                listing.decide(index, f".{suffix}" if suffix else "without a suffix")
        self._select_saved_tables()
        if self.kinds[PICTURES]:  # the .json of one picture is not a list of records
            self.kinds["JSON"] = array("Q", (n for n in self.kinds["JSON"] if not self._is_beside_picture(n)))
            self._move_tables_in_text()
        self.splits = {kind: self._group_by_split(kind) for kind in KINDS}  # kind -> split, "" without one -> indices

    def choose(self) -> dict[str, Container]:
        kind, indices = self._choose_kind()
        if not indices and self.has_heldout and len(self.found_splits) == 1:  # a column may name rows to train on
            (self.split,), self.read_splits, self.has_heldout = self.found_splits, self.found_splits, False
            kind, indices = self._choose_kind()
        if not indices:
            return {}
        groups = self.splits[kind]
        containers = {self.split if self.split in groups else "": self._open(kind, self.split, indices)}
        if self.has_heldout and (heldout := heldout_split(groups.keys())):
            self.read_splits.add(heldout)
            indices = self._without_logs(kind, groups[heldout]) if kind in RECORD_KINDS else groups[heldout]
            if indices:
                containers[heldout] = self._open(kind, heldout, indices)
        self._decide_others(kind)
        return containers

    def describe_failure(self, address: str) -> str:
        if not self.suffixes:
            return f"{address} has no files"
        if self.found_splits:
            return describe_missing_split(self.split, address, self.found_splits)
        return f"{address} has no supported files (only {', '.join(sorted(f'.{suffix}' for suffix in self.suffixes)[:8])})"

    def _choose_kind(self) -> tuple[str, Sequence[int]]:
        """The kind of files that is read, and the files to train on; no files if none can be read."""
        pictures, texts = (self._files_of(kind, self.split) for kind in (PICTURES, TEXTS))
        kinds = {kind: indices for kind in RECORD_KINDS if (indices := self._files_of(kind, self.split))}
        for kind, indices in kinds.items():
            if len(kinds) > 1 or pictures:
                indices = self._without_logs(kind, indices)
            if indices:
                return kind, indices
        if pictures:
            return PICTURES, pictures
        return next(iter(kinds.items()), (TEXTS, texts))  # without a record the reader shows why

    def _open(self, kind: str, split: str, indices: Sequence[int]) -> Container:
        """The container of the files of a split."""
        listing = self.listing
        if kind == PICTURES:
            container = PictureFolder(self.files, listing, indices, find_captions(self.files, listing, indices, self.split))
            container.decide()
        else:
            pictures = self._files_of(PICTURES, split) or self.splits[PICTURES].get("", ())
            container = open_container(kind, self._find_pictures(kind, indices[0], pictures), Selection(listing, indices))
            for index in indices:
                listing.decide(index, kind, is_read=True)
        return container

    def _decide_others(self, kind: str) -> None:
        """What becomes of the files that are not read."""
        for other, groups in self.splits.items():
            for name, indices in groups.items() if other != PICTURES else ():  # records may name any picture
                is_read = name in self.read_splits or (not name and self._files_of(other, self.split) is groups[""])
                for index in indices if not is_read else ():
                    self.listing.decide(index, "of another split" if name else "of no split")
        for index, path in enumerate(self.listing):
            if self.listing.is_undecided(index):
                self.listing.decide(index, self._reason_beside(kind, path))

    def _reason_beside(self, kind: str, path: str) -> str:
        """Why a file that is not of the kind that is read is not read."""
        suffix = suffix_of(path)
        if self.found_splits and split_of_path(path, self.split, kind == PICTURES) not in {*self.read_splits, None}:
            return "of another split"
        if KIND_OF_SUFFIX.get(suffix) == PICTURES:
            return "of no split" if kind == PICTURES else NAMED_BY_NONE
        if kind == PICTURES and suffix in ("txt", "caption"):
            return "without a picture of the same name"
        return f".{suffix} beside {kind}"

    # Splits

    @cached_property
    def found_splits(self) -> set[str]:
        """The splits that names of files or folders name."""
        return {name for groups in self.splits.values() for name in groups} - {""}

    def _files_of(self, kind: str, split: str) -> Sequence[int]:
        """The files of a split. Files without one are for training if no others are; if none has one, records decide."""
        groups = self.splits[kind]
        is_nameless = split not in groups and (split == "train" or not self.found_splits)
        return groups.get("" if is_nameless else split, ())

    def _group_by_split(self, kind: str) -> dict[str, Sequence[int]]:
        """The files by their split, "" without one, if files or folders are named after splits.

        One file that is called like a split is enough, but a word inside a name, or train as a folder of pictures, counts
        only beside another split. Names of pictures and texts may have any words: they count only if all of them name a
        split, those of texts also if they name two.
        """
        indices = self.kinds[kind]
        if not indices or self.split == ALL or self.files.fs.isfile(self.files.root):
            return {"": indices} if indices else {}
        for way in {PICTURES: ("folder", "file"), TEXTS: ("file",)}.get(kind, ("anywhere", "file")):
            names = self._name_splits(indices, way)
            found = {*names} - {None}
            is_of_all = bool(found) and None not in names
            is_split = {
                ("folder", PICTURES): is_of_all or bool(found - {"train"}), ("file", PICTURES): is_of_all,
                ("file", TEXTS): is_of_all or len(found) > 1, ("anywhere", kind): bool(found - {"train"}),
            }.get((way, kind), bool(found))  # fmt: skip
            if is_split:
                groups = {name or "": array("Q") for name in names}
                for index, name in zip(indices, names, strict=True):
                    groups[name or ""].append(index)
                return groups
        return {"": indices}

    def _name_splits(self, indices: Sequence[int], way: str) -> list[str | None]:
        """The split of each file: by its folders, or by its whole path, where a word counts at the ends of a name ("file")
        or anywhere in it."""
        if way != "folder":
            return [split_of_path(self.listing[index], self.split, with_file=True, is_anywhere=way == "anywhere")
                    for index in indices]  # fmt: skip
        parts = {folder: folder.split("/") for folder in {self.listing[index].rpartition("/")[0] for index in indices}}
        splits = splits_of_folders({part for folders in parts.values() for part in folders}, self.split)
        found = {folder: next((splits[part] for part in folders if part in splits), None)
                 for folder, folders in parts.items()}  # fmt: skip
        return [found[self.listing[index].rpartition("/")[0]] for index in indices]

    # Other files

    def _select_saved_tables(self) -> None:
        """Without the cache files beside the tables of saved data sets."""
        states: dict[str, set[str] | None] = {}  # folder -> names of its tables
        kept = array("Q")
        for index in self.kinds["Arrow tables"]:
            folder, _, name = self.listing.path(index).rpartition("/")
            if folder not in states:
                states[folder] = read_saved_tables(self.files, folder)
            if states[folder] is None or name in states[folder]:
                kept.append(index)
            else:
                self.listing.decide(index, "cached by the library datasets")
        self.kinds["Arrow tables"] = kept

    def _move_tables_in_text(self) -> None:
        """A .txt without a picture of its name may be a table, as in Flickr8k: its first line has names of columns, or the
        name of a picture and a text."""
        tables = []
        for index in self.kinds[TEXTS][:NUM_SAMPLES] if not self._has_captions else ():
            line, _ = first_line(self.files, self.listing.path(index))
            dialect = find_dialect(line[:MAX_FIRST_LINE])
            names = {*map(plain_name, dialect.columns)}
            has_pairs = all(names & {*COLUMN_NAMES[field]} for field in ("image", "caption"))
            if has_pairs and (dialect.header or b" " in line):  # otherwise numbers or labels
                tables.append(index)
        self.kinds["tables"] = array("Q", sorted([*self.kinds["tables"], *tables]))
        self.kinds[TEXTS] = array("Q", (index for index in self.kinds[TEXTS] if index not in tables))

    def _find_pictures(self, kind: str, index: int, pictures: Sequence[int]) -> Files:
        """The files, with the only folder that has the pictures of the first records as the image folder, if they are not
        beside the file that names them. Which column has their names may be known only from the pictures."""
        folders = {self.listing[number].rpartition("/")[0] for number in pictures}
        if self.files.image_root or kind == "archives" or not 0 < len(folders) <= MAX_PICTURE_FOLDERS:
            return self.files
        here = self.listing[index].rpartition("/")[0]
        container = open_container(kind, self.files, [self.listing.path(index)])
        spans = container.spans(NUM_SAMPLES, Account())
        items = (record for span in spans for _, record in container.records(span))
        records = [record for record in islice(items, NUM_SAMPLES) if isinstance(record, dict)]
        renamed = [rename_columns(record, self.columns) for record in records]
        names = [name for record in renamed if (name := path_of_picture(record))]
        if not names and records and all(describe_record(record)[0] == "text" for record in renamed):
            text = self.columns.get("text", find_column(renamed[0], "text"))
            for column in (name for name in records[0] if plain_name(name) != plain_name(text)):
                values = [str(record.get(column) or "") for record in records]
                if any(all(self._has_picture(folder, name) for name in values) for folder in (here, *folders)):
                    self.columns, names = {**self.columns, "image": column}, values
                    break
        found = {folder for folder in (here, *folders) if any(self._has_picture(folder, name) for name in names)}
        if here in found or len(found) != 1:
            return self.files
        return replace(self.files, image_root=posixpath.join(self.listing.root, *found))

    def _has_picture(self, folder: str, name: str) -> bool:
        path = posixpath.normpath(posixpath.join(folder, name))
        return bool(name) and any(self.listing.find(path) is not None for path in possible_paths(path))

    def _is_beside_picture(self, index: int) -> bool:
        """Whether a file has the name of a picture, with another suffix or with more of them."""
        stem = longer = self.listing[index].rpartition(".")[0]
        while "." in longer.rpartition("/")[2]:
            if suffix_of(longer) in IMAGE_SUFFIXES and self.listing.find(longer) is not None:
                return True
            longer = longer.rpartition(".")[0]
        for step in (-1, 1):
            number = index + step
            while 0 <= number < len(self.listing) and (other := self.listing[number]).startswith(stem + "."):
                if other[len(stem) + 1 :].lower() in IMAGE_SUFFIXES:
                    return True
                number += step
        return False

    @cached_property
    def _has_captions(self) -> bool:
        """Whether pictures have files with captions beside them."""
        return any(find_beside(self.listing, index) for index in islice(self.kinds[PICTURES], NUM_SAMPLE_PICTURES))

    def _without_logs(self, kind: str, indices: Sequence[int]) -> Sequence[int]:
        """The files with records that are to be read; decides what becomes of the others."""
        kept = array("Q")
        for index in indices:
            if reason := self._reason_to_pass_over(kind, index):
                self.listing.decide(index, reason)
            else:
                kept.append(index)
        return kept

    def _reason_to_pass_over(self, kind: str, index: int) -> str:
        """Why a file with records is not read although other files can be, or "": a log, or the list of addresses that the
        pictures beside it come from. A damaged file is read, so that its damage is reported."""
        forms, are_addresses, first_fault, is_empty = set(), True, "", True
        container = open_container(kind, self.files, [self.listing.path(index)])
        spans = container.spans(NUM_SAMPLES, Account())
        for _, record in islice((item for span in spans for item in container.records(span)), NUM_SAMPLES):
            is_empty = False
            if isinstance(record, Fault) and record.kind == CUT_SHORT:
                return ""
            if isinstance(record, Fault):
                first_fault = first_fault or record.message
            else:
                form, has_address = describe_record(rename_columns(record, self.columns))
                forms |= {form} - {None}
                are_addresses = are_addresses and has_address
        if not forms:
            reason = "without records of a known form" + f" ({printable(first_fault)})" * bool(first_fault)
            return "empty" if is_empty else reason
        if self._has_captions and forms in ({"text"}, {"image"}):
            return f"with {forms.pop()}s beside pictures with captions"
        if self._has_captions and are_addresses and forms <= {"pair", "image"}:
            return "with addresses of pictures, which are read from this folder"
        return ""


def suffix_of(path: str) -> str:
    """The suffix in lower case, without that of a compression."""
    name = path.rpartition("/")[2].lower()
    for suffix in COMPRESSIONS:
        if suffix != ".tgz":
            name = name.removesuffix(suffix)
    return name.rpartition(".")[2] if "." in name else ""


def open_container(kind: str, files: Files, paths: Sequence[str]) -> Container:
    """The container of files of one kind."""
    match kind:
        case "archives":
            return TarArchives(files, paths)
        case "Parquet tables" | "Arrow tables":
            return ArrowTables(files, paths)
        case "JSON lines" | "JSON":
            return JsonFiles(files, paths)
        case "tables":
            return CsvFiles(files, paths)
        case _:
            return PlainText(files, paths)


def read_saved_tables(files: Files, folder: str) -> set[str] | None:
    """The names of the tables of a data set that `save_to_disk` wrote into this folder; None for another folder. ValueError
    when it was saved with an index of rows: without it, order and rows would be wrong."""
    path = f"{folder}/state.json"
    if not files.is_file(path):
        return None
    try:
        state = json.loads(files.read(path))
        names = {entry["filename"] for entry in state["_data_files"]}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{files.relative_path(path)} is damaged: save the data set again") from None
    name = files.relative_path(folder)
    if missing := [table for table in sorted(names) if not files.is_file(f"{folder}/{table}")]:
        raise ValueError(f"{name} lacks {missing[0]}, which its state.json names: copy the folder again")
    if state.get("_indices_data_files"):
        raise ValueError(f"{name} was saved with an index of rows: call flatten_indices() before save_to_disk")
    return names
