"""Which files of a source are read, and by which container; and why the others are not read."""

import json
import posixpath
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice

from transfusion.codecs.pictures import IMAGE_SUFFIXES
from transfusion.data.raw import CUT_SHORT, Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.archives import TarArchives
from transfusion.data.reading.coco import Coco, NoCaptionsError, find_caption_files
from transfusion.data.reading.columns import COLUMN_NAMES, describe_record, path_of_picture, rename_columns
from transfusion.data.reading.container import Container
from transfusion.data.reading.files import COMPRESSIONS, Files
from transfusion.data.reading.folders import PictureFolder, find_beside, find_captions
from transfusion.data.reading.json_files import JsonLines, JsonList
from transfusion.data.reading.listing import NAMED_BY_NONE, Listing, Selection
from transfusion.data.reading.plain_text import PlainText
from transfusion.data.reading.separated import SeparatedValues
from transfusion.data.reading.splits import canonical, split_of_path
from transfusion.data.reading.tables import Tables

RECORD_KINDS = {  # the first kind of which a folder has files with records is read
    "archives": ("tar", "tgz"), "Parquet tables": ("parquet",), "Arrow tables": ("arrow",),
    "JSON lines": ("jsonl", "ndjson"), "tables": ("csv", "tsv"), "JSON": ("json",),
}  # fmt: skip
PICTURES, TEXTS = "pictures", "texts"
KINDS = {**RECORD_KINDS, PICTURES: IMAGE_SUFFIXES, TEXTS: ("txt", "text", "md", "rst")}
KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}
NUM_SAMPLES = 20  # records of a file that show what it is
NUM_SAMPLE_PICTURES = 1_000  # pictures of a folder that show whether captions are beside them


def choose_container(files: Files, listing: Listing, address: str, split: str, columns: Mapping[str, str]) -> Container:
    """The container of a source. What becomes of each file is decided in the listing. ValueError when none can be read."""
    choice = Choice(files, listing, split, columns)
    container = choice.choose()
    if container is None:
        raise ValueError(choice.describe_failure(address))
    return container


class Choice:
    """The files of a source by kind, and which of them are read."""

    def __init__(self, files: Files, listing: Listing, split: str, columns: Mapping[str, str]):
        self.files, self.listing, self.split, self.columns = files, listing, canonical(split), columns
        self.found_splits: set[str] = set()
        self.has_other_names = False  # whether files are not read because their names contain no split
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
        for kind in KINDS:
            self._select_split(kind)

    def choose(self) -> Container | None:
        kinds = [kind for kind in RECORD_KINDS if self.kinds[kind]]
        for kind in kinds:
            indices = self.kinds[kind]
            if len(kinds) > 1 or self.kinds[PICTURES]:
                reasons = [(index, self._reason_to_pass_over(kind, index)) for index in indices]
                for index, reason in reasons:
                    if reason:
                        self.listing.decide(index, reason)
                indices = [index for index, reason in reasons if not reason]
            if indices:
                return self._open(kind, indices)
        if self.kinds[PICTURES]:
            return self._open(PICTURES, self.kinds[PICTURES])
        if kinds:  # the reader shows why there is no record
            return self._open(kinds[0], self.kinds[kinds[0]])
        return self._open(TEXTS, self.kinds[TEXTS]) if self.kinds[TEXTS] else None

    def describe_failure(self, address: str) -> str:
        if not self.suffixes:
            return f"{address} has no files"
        if self.found_splits or self.has_other_names:
            existing = ", ".join(sorted(self.found_splits)) or "no files or folders that are named after a split"
            return f"there is no split {self.split} in {address}; there are {existing}"
        return f"{address} has no supported files (only {', '.join(sorted(f'.{suffix}' for suffix in self.suffixes)[:8])})"

    def _open(self, kind: str, indices: Sequence[int]) -> Container:
        """The container of these files; decides what becomes of all files."""
        listing = self.listing
        if kind == PICTURES:
            container = PictureFolder(self.files, listing, indices, find_captions(self.files, listing, indices, self.split))
            container.decide()
        else:
            container = open_container(kind, self._find_pictures(kind, indices[0]), Selection(listing, indices))
            for index in indices:
                listing.decide(index, kind, is_read=True)
        for index, path in enumerate(listing):
            if listing.is_undecided(index):
                listing.decide(index, self._reason_beside(kind, path))
        return container

    def _reason_beside(self, kind: str, path: str) -> str:
        """Why a file that is not of the kind that is read is not read."""
        suffix = suffix_of(path)
        if self.found_splits and split_of_path(path, self.split, kind == PICTURES) not in (self.split, None):
            return "of another split"
        if KIND_OF_SUFFIX.get(suffix) == PICTURES:
            return "of no split" if kind == PICTURES else NAMED_BY_NONE
        if kind == PICTURES and suffix in ("txt", "caption"):
            return "without a picture of the same name"
        return f".{suffix} beside {kind}"

    # Splits

    def _select_split(self, kind: str) -> None:
        """Keep only the files of the split, if files or folders are named after splits.

        Names of pictures and texts may have any words: they count only if all of them name a split, those of texts also if
        they name two. Of the folders of pictures one that is called like a split is enough, but train may be a class.
        """
        indices = self.kinds[kind]
        if not indices or self.files.fs.isfile(self.files.root):
            return
        for with_file in (False, True) if kind == PICTURES else (True,):
            names = []
            for index in indices:
                names.append(split_of_path(self.listing[index], self.split, with_file))
                if kind == PICTURES and with_file and names[-1] is None:
                    break
            found = {*names} - {None}
            is_split = {
                PICTURES: not with_file and bool(found - {"train"}), TEXTS: len(found) > 1,
            }.get(kind, bool(found))  # fmt: skip
            if is_split or (found and None not in names):
                break
        else:
            names, found = [None] * len(indices), set()
        self.found_splits |= found
        self.has_other_names |= self.split != "train" and not found
        wanted = None if self.split == "train" and "train" not in found else self.split  # without a name: for training
        self.kinds[kind] = array("Q", (index for index, name in zip(indices, names, strict=True) if name == wanted))
        for index, name in zip(indices, names, strict=True):
            if name != wanted and kind != PICTURES:  # records may name any picture
                self.listing.decide(index, "of another split" if name else "of no split")

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
        """A .txt without a picture of its name may be a table, as in Flickr8k: its first line has names of columns."""
        tables = []
        for index in self.kinds[TEXTS][:NUM_SAMPLES] if not self._has_captions else ():
            line = _first_line(self.files, self.listing.path(index)).decode("utf-8", "replace").lower()
            names = {name.strip(' "') for name in re.split(r"[,;|\t]", line)}
            if all(names & {*COLUMN_NAMES[field]} for field in ("image", "caption")):
                tables.append(index)
        self.kinds["tables"] = array("Q", sorted([*self.kinds["tables"], *tables]))
        self.kinds[TEXTS] = array("Q", (index for index in self.kinds[TEXTS] if index not in tables))

    def _find_pictures(self, kind: str, index: int) -> Files:
        """The files, with the folder of all pictures as the image folder if the first records name pictures that exist only
        there, not beside the file that names them."""
        folders = {self.listing[number].rpartition("/")[0] for number in self.kinds[PICTURES]}
        here = self.listing[index].rpartition("/")[0]
        if self.files.image_root or kind == "archives" or len(folders) != 1 or folders == {here}:
            return self.files
        (folder,) = folders
        container = open_container(kind, self.files, [self.listing.path(index)])
        spans = container.spans(NUM_SAMPLES, Account())
        records = (record for span in spans for _, record in container.records(span) if isinstance(record, dict))
        paths = (path_of_picture(rename_columns(record, self.columns)) for record in islice(records, NUM_SAMPLES))
        names = [path for path in paths if path]
        beside, inside = ([self.listing.find(posixpath.join(parent, name)) for name in names] for parent in (here, folder))
        if any(found is not None for found in beside) or all(found is None for found in inside):
            return self.files
        return replace(self.files, image_root=posixpath.join(self.listing.root, folder))

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

    def _reason_to_pass_over(self, kind: str, index: int) -> str:
        """Why a file with records is not read although other files can be, or "": a log, or the list of addresses that the
        pictures beside it come from. A damaged file is read, so that its damage is reported."""
        forms, are_addresses, is_empty = set(), True, True
        try:
            container = open_container(kind, self.files, [self.listing.path(index)])
            spans = container.spans(NUM_SAMPLES, Account())
            for _, record in islice((item for span in spans for item in container.records(span)), NUM_SAMPLES):
                is_empty = False
                if isinstance(record, Fault) and record.kind == CUT_SHORT:
                    return ""
                if not isinstance(record, Fault):
                    form, has_address = describe_record(rename_columns(record, self.columns))
                    forms |= {form} - {None}
                    are_addresses = are_addresses and has_address
        except NoCaptionsError:
            return "without records of a known form"
        except ValueError:  # not even JSON
            return ""
        if not forms:
            return "empty" if is_empty else "without records of a known form"
        if self._has_captions and forms == {"text"}:
            return "with texts beside pictures with captions"
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
    """The container of files of one kind. ValueError when a .json has no records."""
    match kind:
        case "archives":
            return TarArchives(files, paths)
        case "Parquet tables" | "Arrow tables":
            return Tables(files, paths)
        case "JSON lines":
            return JsonLines(files, paths)
        case "tables":
            return SeparatedValues(files, paths)
        case "JSON":
            return _open_json(files, paths)
        case _:
            return PlainText(files, paths)


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
    return Coco(files, find_caption_files(files, paths))


def _first_line(files: Files, path: str) -> bytes:
    """The first line of a file that is not blank; if it starts a list, perhaps only its beginning."""
    line = b""
    with files.open(path) as file:
        while not line and (content := file.read1(2**16)):
            line = content.lstrip(b" \n\r\t\xef\xbb\xbf")
        if not line.startswith(b"[") and b"\n" not in line:
            line += file.readline()
    return line.partition(b"\n")[0]


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
    if state.get("_indices_data_files"):
        name = files.relative_path(folder)
        raise ValueError(f"{name} was saved with an index of rows: call flatten_indices() before save_to_disk")
    return names
