"""One JSON object that is a whole data set: its records."""

import posixpath
from typing import Any

from transfusion.data.reading.columns import KNOWN_NAMES, LIST_COLUMNS, TURN_LISTS, plain_name, rename_columns
from transfusion.data.reading.splits import SPLITS, canonical
from transfusion.data.reading.values import looks_like_picture


def unwrap(data: dict[str, Any]) -> list[Any]:
    """The records of an object, which may be

    - columns: {"image": [...], "caption": [...]}, or {"image": {"0": ...}, ...}, as pandas writes by default,
    - rows with names: {"columns": ["image", "caption"], "data": [[...], ...]}, pandas' orient="split",
    - records by their keys: {"0": {...}, ...}, or captions by the names of pictures: {"bird.jpg": "a red bird"},
    - lists by split: {"train": [{...}, ...], "val": [...]},
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
    has_names = bool(data) and all(map(looks_like_picture, data))
    if _are_alike(values) or (has_names and all(isinstance(value, dict) for value in values)):
        return [{"key": key, **record} for key, record in data.items()]
    if has_names and all(isinstance(value, str | list) for value in values):
        return [{"image": name, "caption": caption} for name, caption in data.items()]
    lists = {name: value for name, value in data.items() if isinstance(value, list) and {*map(type, value)} == {dict}}
    if lists and all(canonical(name) in SPLITS for name in lists):
        return [{**record, "split": split} for split, records in lists.items() for record in records]
    if len(lists) == 1 and not _has_list_column(data):
        return [_read_karpathy(record) for records in lists.values() for record in records]
    return [data]


def _is_table(data: dict[str, Any]) -> bool:
    """Whether the values are columns: of the same rows, and some of them with a known name."""
    values = list(data.values())
    if _has_list_column(data) or not any(plain_name(name) in KNOWN_NAMES for name in data):
        return False
    are_lists = len(values) > 1 and all(isinstance(value, list) and len(value) == len(values[0]) for value in values)
    return are_lists or _are_alike(values)


def _are_alike(values: list[Any]) -> bool:
    """Whether these are objects with the same keys."""
    return len(values) > 1 and all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values)


def _has_list_column(data: dict[str, Any]) -> bool:
    """Whether it is a record with a list, such as a conversation."""
    turns = rename_columns({name: data[name] for name in TURN_LISTS if name in data}, {})
    return any(name in data or name in turns for name, *_ in LIST_COLUMNS.values())


def _read_karpathy(record: dict[str, Any]) -> dict[str, Any]:
    """A picture with a list of sentences, as Karpathy's splits have them; any other record as it is."""
    sentences = record.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(item, dict) and "raw" in item for item in sentences):
        return record
    path = posixpath.join(str(record.get("filepath") or ""), str(record.get("filename") or ""))
    return {"image": path, "captions": [sentence["raw"] for sentence in sentences], "split": record.get("split")}
