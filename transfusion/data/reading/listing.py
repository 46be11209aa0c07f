"""The files of a source and what becomes of each. Kept compactly: a folder may have millions of pictures."""

import os
import posixpath
from array import array
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Sequence

from transfusion.data.reading.account import NUM_EXAMPLES, OTHERS, Account
from transfusion.data.reading.values import printable

NAMED_BY_NONE = "named by no record"  # why a picture is not read
NOT_A_FILE = "neither a file nor a folder"  # a pipe, a device, a link to nothing: reading one may never end
IGNORED_NAMES = ("README", "LICENSE")  # with any suffix


class Listing(Sequence[str]):
    """Paths relative to `root`, sorted by their bytes, each with a fate: what it is read as, or why it is not read.

    The paths are one byte string: about 10 bytes more than the path itself for each file, and no Python object.
    """

    def __init__(self, root: str, entries: Iterable[tuple[str, str]]):
        """`entries`: path, and the reason not to read it or "": it is to be decided."""
        self.root = root
        self._names, self._ends = bytearray(), array("Q", [0])
        self._fates = bytearray()  # of each path, a number in `_labels`
        self._labels: dict[tuple[str, bool], int] = {("", False): 0}  # label, and whether it is read -> number
        is_sorted, last = True, b""
        for path, reason in entries:
            encoded = _encode(path)
            self._append(encoded, self._label_number(reason, is_read=False))
            is_sorted, last = is_sorted and last <= encoded, encoded
        if not is_sorted:
            self._sort()

    def __len__(self) -> int:
        return len(self._fates)

    def __getitem__(self, index: int) -> str:
        return self._encoded(index).decode("utf-8", "surrogateescape")

    def path(self, index: int) -> str:
        """The whole path."""
        return posixpath.join(self.root, self[index])

    def find(self, path: str) -> int | None:
        """The index of a relative path, if it is in the list."""
        target = _encode(path)
        index = bisect_left(range(len(self)), target, key=self._encoded)
        return index if index < len(self) and self._encoded(index) == target else None

    def index_of(self, whole_path: str) -> int | None:
        """The same for a whole path."""
        is_inside = whole_path.startswith(f"{self.root}/")
        return self.find(whole_path[len(self.root) + 1 :]) if is_inside else None

    def siblings(self, index: int) -> Iterator[tuple[int, str]]:
        """The other files whose paths begin with this one up to its last dot: their indices, and the rest of their paths."""
        names, ends = self._names, self._ends
        start, end = ends[index : index + 2]
        stem = names[start : names.rfind(b".", start, end) + 1]
        for step in (-1, 1) if stem else ():
            number = index + step
            while 0 <= number < len(self) and names.startswith(stem, ends[number], ends[number + 1]):
                if self.is_file(number):
                    yield number, names[ends[number] + len(stem) : ends[number + 1]].decode("utf-8", "surrogateescape")
                number += step

    def is_file(self, index: int) -> bool:
        """Not a pipe, a device or a link to nothing."""
        return self._fates[index] != self._labels.get((NOT_A_FILE, False))

    def is_undecided(self, index: int) -> bool:
        return not self._fates[index]

    def decide(self, index: int, label: str, is_read: bool = False) -> None:
        """What becomes of a file: `label` is what it is read as, or why it is not read."""
        self._fates[index] = self._label_number(label, is_read)

    def count(self, account: Account) -> None:
        """Add all files to an account. A file that a record names is read, whatever was decided when it was listed."""
        account.find("files", len(self))
        fates = self._fates
        if any(account.named):
            fates = self._fates[:]
            number = self._label_number("picture", is_read=True)
            for index, is_named in enumerate(account.named):
                fates[index] = number if is_named else fates[index]
        is_partial = "records" in account.tallies and account.tallies["records"].unexplained > 0
        for (label, is_read), number in self._labels.items():
            count = fates.count(number)
            label += " so far" if label == NAMED_BY_NONE and is_partial else ""
            if is_read and count:
                account.read("files", label, count)
            elif number and count:
                account.pass_over("files", label, *self._examples(fates, number), count=count)

    def _examples(self, fates: bytearray, number: int) -> Iterator[str]:
        index = -1
        for _ in range(NUM_EXAMPLES):
            index = fates.find(number, index + 1)
            if index < 0:
                return
            yield printable(self[index])

    def _append(self, encoded: bytes, fate: int) -> None:
        self._names += encoded
        self._ends.append(len(self._names))
        self._fates.append(fate)

    def _sort(self) -> None:
        entries = sorted(zip(map(self._encoded, range(len(self))), self._fates, strict=True))
        self._names, self._ends, self._fates = bytearray(), array("Q", [0]), bytearray()
        for encoded, fate in entries:
            self._append(encoded, fate)

    def _encoded(self, index: int) -> bytes:
        return bytes(self._names[self._ends[index] : self._ends[index + 1]])

    def _label_number(self, label: str, is_read: bool) -> int:
        is_full = len(self._labels) == 255 and (label, is_read) not in self._labels  # a fate is one byte
        return self._labels.setdefault((OTHERS, False) if is_full else (label, is_read), len(self._labels))


class Selection(Sequence[str]):
    """The whole paths of some files of a listing."""

    def __init__(self, listing: Listing, indices: Sequence[int]):
        self.listing, self.indices = listing, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> str:
        return self.listing.path(self.indices[number])


def walk(root: str) -> Iterator[tuple[str, str]]:
    """(path relative to a local folder, reason not to read it or "") of every file. A folder that is not entered is one
    entry, whose path ends with "/".

    Real folders come first, sorted. Linked folders are entered after them, unless their files are listed already: a circle
    has no end, and no file is read twice.
    """
    entered: set[tuple[int, int]] = set()  # device and inode of each folder
    real_root = os.path.realpath(root)
    links = yield from _walk_folders(root, "", entered)
    for link in links:  # grows: linked folders may have links
        target = os.path.realpath(os.path.join(root, link))
        if f"{real_root}/".startswith(f"{target.rstrip('/')}/") or _identify(target) in entered:
            yield link, "linked folder, listed already"
        else:
            links += yield from _walk_folders(root, link, entered)


def _walk_folders(root: str, start: str, entered: set[tuple[int, int]]) -> Generator[tuple[str, str], None, list[str]]:
    """The entries of a folder and of the real folders in it; returns the links to folders, sorted."""
    links: list[str] = []
    stack = [("", [os.fsencode(start)])] if start else [("", _list_folder(root, "", links, entered))]
    while stack:
        parent, names = stack[-1]
        if not names:
            stack.pop()
            continue
        name, mark, _ = os.fsdecode(names.pop()).partition("\0")
        path = parent + name
        if not path.endswith("/"):
            is_file = not mark or os.path.isfile(os.path.join(root, path))
            yield path, reason_of_name(path) or ("" if is_file else NOT_A_FILE)
        elif name.startswith((".", "_")):
            yield path, "hidden"
        else:
            try:
                stack.append((path, _list_folder(root, path, links, entered)))
            except PermissionError:
                yield path, "folder without permission to read"
    return sorted(links)


def _list_folder(root: str, parent: str, links: list[str], entered: set[tuple[int, int]]) -> list[bytes]:
    """The names in a folder, last first. Those of folders end with "/", those of other things than files with a zero byte.
    Links to folders are added to `links`."""
    folder, names = os.path.join(root, parent), []
    entered.add(_identify(folder))
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                names.append(entry.name + b"/")
            elif entry.is_file(follow_symlinks=False):
                names.append(entry.name)
            elif entry.is_dir() and not entry.name.startswith((b".", b"_")):
                links.append(f"{parent}{os.fsdecode(entry.name)}/")
            else:
                names.append(entry.name + b"\0")
    return sorted(names, reverse=True)


def _identify(folder: str) -> tuple[int, int]:
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def reason_of_name(path: str) -> str:
    """Why files of this name are not read, or ""."""
    *folders, name = path.split("/")
    if name.startswith(".") or any(folder.startswith((".", "_")) for folder in folders):
        return "hidden"
    return "README or LICENSE" if name.partition(".")[0].upper() in IGNORED_NAMES else ""


def _encode(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")
