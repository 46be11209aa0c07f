"""One JSON object that is a whole data set: its records."""

import posixpath
from typing import Any

from transfusion.data.raw import Fault
from transfusion.data.reading.records import COLUMN_NAMES, LIST_COLUMNS, detect_form, find_column
from transfusion.data.reading.values import looks_like_picture

KNOWN_NAMES = {name for names in COLUMN_NAMES.values() for name in names}


def unwrap(data: dict[str, Any]) -> list[Any]:
    """The records of an object, which may be

    - columns: {"image": [...], "caption": [...]}, or {"image": {"0": ...}, ...}, as pandas writes by default,
    - rows with names: {"columns": ["image", "caption"], "data": [[...], ...]}, pandas' orient="split",
    - records by their keys: {"0": {...}, ...}, or captions by the names of pictures: {"bird.jpg": "a red bird"},
    - an envelope: {"data": [{...}, ...], "version": 1}, such as Karpathy's splits of Flickr8k, Flickr30k and COCO,
    - otherwise one record.
    """
    values = list(data.values())
    columns, rows = data.get("columns"), data.get("data")
    if isinstance(columns, list) and isinstance(rows, list) and all(isinstance(row, list) for row in rows):
        return [dict(zip(columns, row, strict=False)) if len(row) == len(columns) else row for row in rows]
    if _is_table(data):
        keys = values[0] if isinstance(values[0], dict) else range(len(values[0]))
        return [{name: column[key] for name, column in data.items()} for key in keys]
    if values and all(isinstance(value, dict) for value in values):
        return [_with_picture(key, record) for key, record in data.items()]
    if values and all(map(looks_like_picture, data)) and all(isinstance(value, str | list) for value in values):
        return [{"image": name, "caption": caption} for name, caption in data.items()]
    lists = [value for value in values if isinstance(value, list) and {*map(type, value)} == {dict}]
    if len(lists) == 1 and not _is_record(data):
        return [_read_karpathy(record) for record in lists[0]]
    return [data]


def _is_table(data: dict[str, Any]) -> bool:
    """Whether the values are columns: of the same rows, and some of them with a known name."""
    values = list(data.values())
    if not any(name.lower() in KNOWN_NAMES for name in data) or any(name in data for name, *_ in LIST_COLUMNS.values()):
        return False
    if all(isinstance(value, dict) for value in values):
        return all(value.keys() == values[0].keys() for value in values)
    return len(values) > 1 and all(isinstance(value, list) and len(value) == len(values[0]) for value in values)


def _with_picture(key: str, record: dict[str, Any]) -> dict[str, Any]:
    return record if not looks_like_picture(key) or find_column(record, "image") else {"image": key, **record}


def _is_record(data: dict[str, Any]) -> bool:
    try:
        return bool(detect_form(data))
    except Fault:
        return False


def _read_karpathy(record: dict[str, Any]) -> dict[str, Any]:
    """A picture with a list of sentences, as Karpathy's splits have them; any other record as it is."""
    sentences = record.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(item, dict) and "raw" in item for item in sentences):
        return record
    path = posixpath.join(str(record.get("filepath") or ""), str(record.get("filename") or ""))
    return {"image": path, "captions": [sentence["raw"] for sentence in sentences], "split": record.get("split")}
