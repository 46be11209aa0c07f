"""Folders of pictures to records: captions in files beside the pictures, or in the names of their folders."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transfusion.data.raw import Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.columns import COLUMN_NAMES
from transfusion.data.reading.container import Span, damage_fault
from transfusion.data.reading.files import Files
from transfusion.data.reading.images import ListedPath
from transfusion.data.reading.json_files import parse_object
from transfusion.data.reading.listing import Listing
from transfusion.data.reading.splits import split_of_name, split_of_path
from transfusion.data.reading.values import strip_caption

CAPTION_SUFFIXES = ("txt", "caption", "json")  # of a file beside a picture; the first one that exists is read
REPEATS = re.compile(r"\d+_(?=\D)")  # 10_dog: kohya's folders start with a number of repeats
GENERIC_NAME = re.compile(r"(image|img|jpe?g|jpegimage|png|picture|pic|photo|sample|data|dataset|all)s?|\d{4,}", re.I)


@dataclass(frozen=True)
class PictureFolder:
    """Pictures, each with a caption from a file beside it or from its folder's name, or without captions.

    captions: "beside" (in `bird.txt`, `bird.caption`, `bird.jpg.txt`, or the fields of `bird.json`), "folder", or "".
    """

    files: Files
    listing: Listing
    indices: Sequence[int]  # of the pictures in the listing
    captions: str

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for first in range(0, len(self.indices), max_rows):
            yield Span("", first, min(max_rows, len(self.indices) - first))

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        for index in self.indices[span.first : span.first + span.rows]:
            path = self.listing.path(index)
            image, record = ListedPath(path), {}
            if self.captions == "beside":
                record = self._read_caption(index)
            elif self.captions == "folder":
                record = {"caption": _folder_caption(self.listing[index])}
            yield self.files.relative_path(path), record if isinstance(record, Fault) else {**record, "image": image}

    def decide(self) -> None:
        """What becomes of the pictures and of the files beside them."""
        for index in self.indices:
            self.listing.decide(index, "picture", is_read=True)
            for number, beside in enumerate(find_beside(self.listing, index) if self.captions == "beside" else ()):
                if not number:
                    self.listing.decide(beside, "caption", is_read=True)
                elif self.listing.is_undecided(beside):
                    self.listing.decide(beside, "beside another caption of the same picture")

    def _read_caption(self, index: int) -> dict[str, Any] | Fault:
        """The caption from a text, or the fields of a .json; without one, the name of a folder with a number of repeats."""
        beside = find_beside(self.listing, index)
        if not beside:
            path = self.listing[index]
            return {"caption": _folder_caption(path) if REPEATS.match(_folder_name(path)) else None}
        path = self.listing.path(beside[0])
        try:
            content = self.files.read(path)
        except OSError as error:
            return damage_fault(error)
        if not path.lower().endswith(".json"):
            return {"caption": strip_caption(content)}
        fields = parse_object(content)
        if isinstance(fields, Fault):
            return Fault(fields.kind, f"{self.files.relative_path(path)}: {fields.message}")
        return fields


def find_beside(listing: Listing, index: int) -> list[int]:
    """The files with the caption of a picture, the one to be read first. They are its neighbours: paths are sorted."""
    found = {}
    for number, rest in listing.siblings(index):
        middle, _, suffix = rest.rpartition(".")
        if suffix.lower() in CAPTION_SUFFIXES and (not middle or listing[index].endswith(f".{middle}")):
            found[CAPTION_SUFFIXES.index(suffix.lower()), middle] = number
    return [found[key] for key in sorted(found)]


def find_captions(files: Files, listing: Listing, indices: Sequence[int], split: str) -> str:
    """Where the captions of these pictures are (see `PictureFolder`)."""
    is_read = False
    for index in indices:
        beside = find_beside(listing, index)
        if beside and not listing[beside[0]].lower().endswith(".json"):
            return "beside"
        if beside and not is_read:  # the first .json shows what they are
            fields, is_read = parse_object(files.read(listing.path(beside[0]))), True
            if isinstance(fields, dict) and any(fields.get(name) for name in COLUMN_NAMES["caption"]):
                return "beside"
    names = {_folder_name(listing[index]) for index in indices}
    are_splits = all(split_of_name(name, split) for name in names)
    if are_splits or any(not name or GENERIC_NAME.fullmatch(name) for name in names):
        return ""
    is_class = len(names) > 1 or REPEATS.match(*names) or split_of_path(listing[indices[0]], split, with_file=False)
    return "folder" if is_class else ""


def _folder_caption(path: str) -> str:
    return REPEATS.sub("", _folder_name(path)).replace("_", " ")


def _folder_name(path: str) -> str:
    return path.rpartition("/")[0].rpartition("/")[2]
