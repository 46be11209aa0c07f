"""Splits by the names of files and folders and by columns of records, and what each split is for."""

import re
from collections.abc import Iterable, Set
from functools import cache, lru_cache
from typing import Any

SPLITS = {  # name -> words in paths and columns: those of `datasets`, and Karpathy's restval, a training part of COCO
    "train": ("train", "training", "restval"), "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip
GENERIC = re.compile(r"((image|img|picture|pic|photo|data|set|split|file|v)s?|[-_.\d ])*")  # words in names of folders
COLUMNS = ("split", "set", "partition", "subset")  # of records; the first one that names a split decides
ALL = "all"  # --split all: splits are not distinguished


def canonical(split: str) -> str:
    """The name of a split that has several: val -> validation."""
    return next((name for name, words in SPLITS.items() if split.lower() in words), split.lower())


def uses_of_splits(found: Set[str], split: str | None) -> dict[str, str]:
    """What the documents of each split are for: "train", "heldout", or "" if `heldout.py` decides. Other splits are not
    read. The split "" is that of documents without one. `found`: the splits of a source; `split`: the only one to read."""
    if split is not None and canonical(split) not in ("train", ALL):
        return {canonical(split): ""}
    heldout = heldout_split(found) if split is None else None
    return {"train": "train", "": "train", heldout: "heldout"} if heldout else {"train": "", "": ""}


def heldout_split(found: Set[str]) -> str | None:
    """The split that is held out: validation, or test without one."""
    return next((name for name in ("validation", "test") if name in found), None)


def describe_missing_split(split: str, address: str, found: Set[str]) -> str:
    """The message of an error."""
    existing = ", ".join(sorted(found - {""}))
    advice = f"{existing}; choose one with --split, or --split {ALL}" if existing else "no names of splits in it"
    return f"there is no split {canonical(split)} in {address}; there are {advice}"


@cache
def _patterns(split: str, is_anywhere: bool) -> list[tuple[str, re.Pattern]]:
    escaped = {name: "|".join(map(re.escape, words)) for name, words in {split: (split,), **SPLITS}.items()}
    end = r"(?![a-z])" if is_anywhere else r"\d*([-_.]v?\d+(-of-\d+)?)*(\.|$)"  # a year, a shard or a version may follow
    return [(name, re.compile(rf"^({words})(?![a-z])|(?<![a-z])({words}){end}")) for name, words in escaped.items()]


def split_of_name(name: str, split: str, is_anywhere: bool = False) -> str | None:
    """The split that the name of a file or folder starts or ends with, before the number of a shard, a version or a
    year. Inside a name a word may have another meaning: it counts only with `is_anywhere`. `split`: one more split to look
    for, by its canonical name."""
    return next((found for found, pattern in _patterns(split, is_anywhere) if pattern.search(name.lower())), None)


def split_of_path(path: str, split: str, with_file: bool, is_anywhere: bool = False) -> str | None:
    """The split of a path: the outermost folder that names one decides; with `with_file` also the name of the file."""
    *folders, name = path.split("/")
    for part in (*folders, name) if with_file else folders:
        if found := split_of_name(part, split, is_anywhere):
            return found
    return None


def splits_of_folders(names: Iterable[str], split: str) -> dict[str, str]:
    """Folder -> split. Of folders with pictures test_tube is a class, not a split. So other words in a name must mean
    nothing, as in test_images, or be in the name of another split too."""
    splits_of_rest: dict[str, set[str]] = {}  # the name without the word -> splits
    found = {name: found for name in names if (found := split_of_name(name, split))}
    rests = {name: re.sub("|".join(map(re.escape, sorted({*SPLITS.get(of, ()), of}, key=len)[::-1])), "", name.lower())
             for name, of in found.items()}  # fmt: skip
    for name, rest in rests.items():
        splits_of_rest.setdefault(rest, set()).add(found[name])
    return {name: of for name, of in found.items() if GENERIC.fullmatch(rests[name]) or len(splits_of_rest[rests[name]]) > 1}


def split_of_record(record: dict[str, Any], split: str) -> str | None:
    """The split that a record names in one of `COLUMNS`, if it is a known one or `split`; None for any other value."""
    for column in COLUMNS:
        if isinstance(value := record.get(column), str) and (found := _split_of_value(value, split)):
            return found
    return None


@lru_cache(1024)
def _split_of_value(value: str, split: str) -> str | None:
    """The split that a value names: one of its words, perhaps with a number or a part as in val2014, test-dev or testA."""
    value = value.strip().lower()
    words = {name: "|".join(map(re.escape, words)) for name, words in {split: (split,), **SPLITS}.items()}
    return next((name for name in words if re.fullmatch(rf"({words[name]})([ab]|\d+|[-_]\w.*)?", value)), None)
