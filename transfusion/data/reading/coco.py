"""COCO's annotations to records."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from transfusion.data.raw import Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.container import Span, damage_fault
from transfusion.data.reading.files import Files
from transfusion.data.reading.images import ListedPath
from transfusion.data.reading.json_files import parse_object

NUM_SAMPLES = 10  # pictures that show where the pictures of a file are
OTHER_ANNOTATIONS = ("instances", "person_keypoints", "panoptic", "stuff", "image_info")  # files without captions


class NoCaptionsError(ValueError):
    """A JSON file without records and without captions."""


def find_caption_files(files: Files, paths: Sequence[str]) -> Sequence[str]:
    """Those of the files that may have captions. NoCaptionsError when the first has none, ValueError when it is no JSON."""
    named = {path: path.rpartition("/")[2] for path in paths}
    possible = [path for path, name in named.items() if not name.startswith(OTHER_ANNOTATIONS)]
    captions = [path for path in possible if named[path].startswith("captions")] or possible
    if not captions:
        raise NoCaptionsError(f"{files.relative_path(paths[0])} has COCO annotations without captions")
    try:
        content = json.loads(files.read(captions[0]).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{files.relative_path(captions[0])} is not valid JSON: {error}") from None
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not isinstance(content.get("images"), list):
        raise NoCaptionsError(f"{files.relative_path(captions[0])} has neither a list of records nor COCO annotations")
    if annotations and not any(isinstance(entry, dict) and "caption" in entry for entry in annotations):
        raise NoCaptionsError(f"{files.relative_path(captions[0])} has COCO annotations without captions")
    return captions


class Coco:
    """COCO captions: one document per caption."""

    def __init__(self, files: Files, paths: Sequence[str]):
        self.files, self.paths = files, paths
        self._cache: tuple[str, list[Any]] = ("", [])  # path and rows of the last file: each span needs the whole file

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
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
        content = parse_object(files.read(path))
    except OSError as error:
        content = damage_fault(error)
    if isinstance(content, Fault):
        return [content]
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        return [Fault("bad JSON", "it has no lists of images and annotations")]
    names = {_coco_id(image, "id"): image.get("file_name") for image in images if isinstance(image, dict)}
    folder, rows = files.image_root or _find_folder(files, path, list(names.values())), []
    for number, annotation in enumerate(annotations, 1):
        key = _coco_id(annotation, "image_id")
        if key is None or not isinstance(name := names.get(key), str):
            rows.append(Fault("missing image", f"annotation {number} has no image in the list of images"))
        else:
            rows.append({"image": ListedPath(f"{folder}/{posixpath.normpath(name)}"), "caption": annotation.get("caption")})
    return rows


def _coco_id(entry: Any, name: str) -> int | str | None:
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) else None


def _find_folder(files: Files, path: str, names: Sequence[Any]) -> str:
    """The folder that COCO's file names are relative to: of annotations/captions_train2017.json it is train2017/, which the
    file names may include. Of the usual folders the one with most of the first pictures."""
    folder, _, name = path.rpartition("/")
    parent, split = folder.rpartition("/")[0], name.partition(".")[0].rpartition("_")[2]
    inner = (split, "", "images", f"images/{split}")
    usual = [f"{base}/{name}".rstrip("/") for base in (parent, folder) for name in inner]
    first = [name for name in names if isinstance(name, str)][:NUM_SAMPLES]
    counts = [sum(files.is_file(f"{candidate}/{name}") for name in first) for candidate in usual]
    return usual[counts.index(max(counts))] if any(counts) else folder
