"""COCO's annotations to records: one for each caption."""

import posixpath
from collections.abc import Sequence
from typing import Any

from transfusion.data.raw import Fault
from transfusion.data.reading.files import Files
from transfusion.data.reading.images import ListedPath

NUM_SAMPLES = 10  # pictures that show where the pictures of a file are
OTHER_ANNOTATIONS = ("instances_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")  # files without captions


def is_coco(data: dict[str, Any]) -> bool:
    """Whether an object is a file of annotations."""
    return all(isinstance(data.get(name), list) for name in ("images", "annotations"))


def read_coco(files: Files, path: str, data: dict[str, Any]) -> list[dict[str, Any] | Fault]:
    """The records of the annotations in this file; a Fault if none has a caption."""
    images, annotations = data["images"], data["annotations"]
    if not any(isinstance(entry, dict) and "caption" in entry for entry in annotations):
        return [no_captions()]
    names = {_coco_id(image, "id"): image.get("file_name") for image in images if isinstance(image, dict)}
    folder, rows = files.image_root or _find_folder(files, path, list(names.values())), []
    for number, annotation in enumerate(annotations, 1):
        key = _coco_id(annotation, "image_id")
        if key is None or not isinstance(name := names.get(key), str):
            rows.append(Fault("missing image", f"annotation {number} has no image in the list of images"))
        else:
            rows.append({"image": ListedPath(f"{folder}/{posixpath.normpath(name)}"), "caption": annotation.get("caption")})
    return rows


def no_captions() -> Fault:
    return Fault("missing column", "it has COCO annotations without captions")


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
