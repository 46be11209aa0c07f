"""Splits by the names of files and folders, and by the column `split` of records."""

import re
from functools import cache
from typing import Any

SPLITS = {  # name -> words in paths
    "train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing"),
}  # fmt: skip


def canonical(split: str) -> str:
    """The name of a split that has several: val -> validation."""
    return next((name for name, words in SPLITS.items() if split.lower() in words), split.lower())


@cache
def _patterns(split: str) -> list[tuple[str, re.Pattern]]:
    escaped = {name: "|".join(map(re.escape, words)) for name, words in {split: (split,), **SPLITS}.items()}
    end = r"\d*([-_.]v?\d+(-of-\d+)?)*(\.|$)"  # a year, a shard or a version may follow
    return [(name, re.compile(rf"^({words})(?![a-z])|(?<![a-z])({words}){end}")) for name, words in escaped.items()]


def split_of_name(name: str, split: str) -> str | None:
    """The split that the name of a file or folder starts or ends with, before the number of a shard, a version or a
    year: inside a name a word has another meaning. `split`: one more split to look for, by its canonical name."""
    return next((found for found, pattern in _patterns(split) if pattern.search(name.lower())), None)


def split_of_path(path: str, split: str, with_file: bool) -> str | None:
    """The split of a path: the outermost folder that names one decides; with `with_file` also the name of the file."""
    *folders, name = path.split("/")
    for part in (*folders, name) if with_file else folders:
        if found := split_of_name(part, split):
            return found
    return None


def split_of_record(record: dict[str, Any], split: str) -> str | None:
    """The split that the column `split` of a record names, if it is a known one or `split`; None for any other value."""
    value = record.get("split")
    name = canonical(value) if isinstance(value, str) else None
    return name if name in {*SPLITS, split} else None
