"""COCO's annotations to records."""

from collections.abc import Iterator, Sequence
from typing import Any

from transfusion.data.raw import Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.container import Span, damage_fault
from transfusion.data.reading.files import Files, ListedPath
from transfusion.data.reading.json_files import parse_object


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
