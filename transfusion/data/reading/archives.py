"""Tar archives to records, by WebDataset's rule."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any, BinaryIO

from transfusion.codecs.pictures import IMAGE_SUFFIXES
from transfusion.data.raw import CUT_SHORT, Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.container import MAX_RECORD_SIZE, Span, damage_fault
from transfusion.data.reading.files import Files
from transfusion.data.reading.json_files import parse_object
from transfusion.data.reading.splits import split_of_path
from transfusion.data.reading.streams import BUFFER_SIZE
from transfusion.data.reading.values import strip_caption

TEXT_SUFFIXES = ("txt", "caption", "cls")  # the first one that exists is the caption
LIST_SUFFIXES = ("jsonl", "csv", "tsv", "parquet")
READ_SUFFIXES = (*IMAGE_SUFFIXES, *TEXT_SUFFIXES, "json")
KEY_TWICE = "with a key that was read: members of one key must be neighbours"
REPEATED = "an earlier record has this key: members of one key must be neighbours"
BESIDE_ANOTHER = "beside another one of the same kind and key"
MAX_AHEAD, MAX_BYTES_AHEAD = 100, 64 * 2**20  # members and bytes that are read before it is known where a key ends
END = bytes(tarfile.BLOCKSIZE)  # the mark of an archive's end is two of these


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    offset: int
    size: int
    reason: str = ""  # why it cannot be part of a record
    content: bytes | Fault | None = None

    def key(self, at_last_dot: bool = False) -> str:
        """Its name up to the first dot of the last part, or up to the last dot."""
        folder, _, last = self.name.rpartition("/")
        stem = last.rpartition(".")[0] if at_last_dot else last.partition(".")[0]
        return f"{folder}/{stem}" if folder and stem else stem

    def suffix(self, at_last_dot: bool = False) -> str:
        """What follows its key and a dot, in lower case."""
        last = self.name.rpartition("/")[2].lower()
        return last.rpartition(".")[2] if at_last_dot else last.partition(".")[2]


@dataclass
class Group:
    """Consecutive members with one key."""

    key: str
    offset: int  # of its first member
    at_last_dot: bool = False  # whether the key ends there
    contents: dict[str, Any] = field(default_factory=dict)  # suffix -> content; None if it is not read now
    names: dict[str, str] = field(default_factory=dict)  # suffix -> name of the member
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # name and reason of members that are not read
    fault: Fault | None = None  # of the archive, from here on

    def includes(self, member: Member) -> bool:
        return member.key(self.at_last_dot) == self.key

    def add(self, member: Member, suffix: str, read_content: Callable[[], bytes | Fault | None]) -> None:
        """Add a member; of several pictures, texts or .json with this key one is read."""
        kind = next((kind for kind in (IMAGE_SUFFIXES, TEXT_SUFFIXES, ("json",)) if suffix in kind), ())
        rival = next((name for name in self.contents if name in kind), None)
        if not kind:
            self.passed_over.append((member.name, f".{suffix}"))
        elif rival is None or (kind == TEXT_SUFFIXES and kind.index(suffix) < kind.index(rival)):
            if rival is not None:
                self.passed_over.append((self.names.pop(rival), BESIDE_ANOTHER))
                del self.contents[rival]
            self.contents[suffix], self.names[suffix] = read_content(), member.name
        else:
            self.passed_over.append((member.name, BESIDE_ANOTHER))


@dataclass(frozen=True)
class TarArchives:
    """WebDataset: a tar archive in which consecutive members with the same key (their name up to the first dot) are one
    record. Only images, .txt, .caption, .cls and .json are read; other members (for example pickles) are not.

    If that leaves nothing of a key to be read, its members have dots in their names. `0.input.jpg` and `0.outputs.txt`, with
    one word between the dots, are a record; of others (`22.05.jpg`, `22.05.txt`) the key ends at the last dot. At most
    `MAX_AHEAD` members and `MAX_BYTES_AHEAD` decide this, so that memory is bounded if all members have the same beginning.
    A key that returns later is a fault. Archives that are appended to an archive are read. In a truncated archive the last
    record may lack members, so it is not read. The records of a span have one split.
    """

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            row, count, offset, kind, seen = 0, 0, 0, (False, ""), set()  # count: records of the next span, from offset on
            for group in self._groups(path, 0, read=False):
                digest = blake2b(group.key.encode(errors="replace"), digest_size=8).digest()
                is_twice = bool(group.contents) and digest in seen
                next_kind = (is_twice, split_of_path(group.key, "train", with_file=False) or "")
                has_record = bool(group.contents or group.fault)
                if has_record and count and (count == max_rows or next_kind != kind):
                    yield Span(path, row, count, offset, *kind)
                    row, count = row + count, 0
                self._count_members(path, group, is_twice, account)  # after the yield: a limit may end the list there
                if has_record:
                    seen.add(digest)
                    offset, count, kind = offset if count else group.offset, count + 1, next_kind
            if count:
                yield Span(path, row, count, offset, *kind)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        groups = (group for group in self._groups(span.path, span.offset, read=True) if group.contents or group.fault)
        for _, group in zip(range(span.rows), groups, strict=False):
            where = f"{self.files.relative_path(span.path)}:{group.key}".rstrip(":")
            if span.is_repeated:
                yield where, Fault("repeated key", f"{', '.join(group.names.values())}: {REPEATED}")
            else:
                yield where, group.fault or _build_record(group)

    def _count_members(self, path: str, group: Group, is_twice: bool, account: Account) -> None:
        archive = self.files.relative_path(path)
        account.find("members", len(group.contents) + len(group.passed_over))
        for suffix, name in group.names.items():
            if is_twice:
                account.pass_over("members", KEY_TWICE, f"{archive}:{name}")
            else:
                account.read("members", f".{suffix}")
        for name, reason in group.passed_over:
            account.pass_over("members", reason, f"{archive}:{name}")

    def _groups(self, path: str, offset: int, read: bool) -> Iterator[Group]:
        """All members in groups, in order; only groups with contents are records. Contents are None unless `read`. Damage
        ends with a group that has a fault."""
        grouping = Grouping()
        try:
            with self.files.open(path, offset) as file:
                for member, read_content in _members(file, offset):
                    yield from grouping.add(member, read_content if read else lambda: None)
            yield from grouping.close()
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
            names = [*(grouping.group.names.values() if grouping.group else ()), *(member.name for member in grouping.ahead)]
            key, start = grouping.start or ("", offset)
            yield Group(key, start, passed_over=[(name, CUT_SHORT) for name in names], fault=damage_fault(error))


class Grouping:
    """Groups the members of an archive by record. A member that is not read is yielded in a separate group without contents,
    because a record may have any number of them."""

    def __init__(self) -> None:
        self.group: Group | None = None  # the open one
        self.ahead: list[Member] = []  # members with one key up to the first dot, before it is known where it ends

    @property
    def start(self) -> tuple[str, int] | None:
        """Key and offset of the first record that is not complete."""
        if self.group:
            return self.group.key, self.group.offset
        return (self.ahead[0].key(), self.ahead[0].offset) if self.ahead else None

    def add(self, member: Member, read_content: Callable[[], bytes | Fault | None]) -> Iterator[Group]:
        """The groups that are complete before this member."""
        if member.reason:
            yield Group("", member.offset, passed_over=[(member.name, member.reason)])
            return
        if not (self.group.includes(member) if self.group else self.ahead and self.ahead[0].key() == member.key()):
            yield from self.close()
        if self.group:
            self.group.add(member, member.suffix(self.group.at_last_dot), read_content)
        else:
            self.ahead.append(member)
            self.ahead[-1] = replace(member, content=read_content())
            if member.suffix() in READ_SUFFIXES:
                self._open(at_last_dot=False)
            elif len(self.ahead) > MAX_AHEAD or sum(other.size for other in self.ahead) > MAX_BYTES_AHEAD:
                self._open(at_last_dot=True)
        if self.group:
            yield from self._give_passed_over()
            if self.ahead:
                yield self._take_group()

    def close(self) -> Iterator[Group]:
        """The groups of all members, which are complete."""
        while self.group or self.ahead:
            if not self.group:
                self._open(at_last_dot=True)
                yield from self._give_passed_over()
            yield self._take_group()

    def _open(self, at_last_dot: bool) -> None:
        """Open a group with the first members that are ahead. `at_last_dot`: none of them has a readable suffix."""
        first, is_pair = self.ahead[0], at_last_dot and _are_picture_and_text(self.ahead)
        self.group = Group(first.key(at_last_dot and not is_pair), first.offset, at_last_dot and not is_pair)
        size = next((n for n, member in enumerate(self.ahead) if not self.group.includes(member)), len(self.ahead))
        for member in self.ahead[:size]:
            self.group.add(member, member.suffix(at_last_dot), lambda member=member: member.content)
        del self.ahead[:size]

    def _take_group(self) -> Group:
        group, self.group = self.group, None
        return group

    def _give_passed_over(self) -> Iterator[Group]:
        if names := self.group.passed_over:
            self.group.passed_over = []
            yield Group("", self.group.offset, passed_over=names)


def _members(file: BinaryIO, offset: int) -> Iterator[tuple[Member, Callable[[], bytes | Fault]]]:
    """The members of an archive from an offset, and of archives that are appended to it, without folders; and a function
    that reads the member, before the next one is asked for."""
    while True:
        # the file is already decompressed
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # otherwise tarfile keeps all of them
                if archive.offset <= info.offset:
                    raise tarfile.ReadError("a member has no size")
                if not info.isdir():
                    yield _describe_member(info), partial(_read_member, archive, info)
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != END:
            raise tarfile.ReadError("it has no end mark")
        offset, size = _skip_padding(file, archive.offset + tarfile.BLOCKSIZE)
        if size:
            yield Member(f"{size:,} bytes", offset, size, "behind the end of the archive"), bytes
        if size is not None:
            return


def _skip_padding(file: BinaryIO, offset: int) -> tuple[int, int | None]:
    """Skip the zeros behind an archive: the offset after them, and the number of bytes that follow; None if they are another
    archive, to which the file is moved."""
    try:
        while (block := file.read(tarfile.BLOCKSIZE)) and not any(block):
            offset += len(block)
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError:
            return offset, len(block) + sum(map(len, iter(partial(file.read, BUFFER_SIZE), b"")))
        file.seek(offset)
        return offset, None
    except OSError as error:
        damage_fault(error)  # raises errors of a disk
        return offset, 1


def _describe_member(info: tarfile.TarInfo) -> Member:
    member, reason = Member(info.name, info.offset, info.size), ""
    if not info.isreg():
        reason = "link or device"
    elif info.name.rpartition("/")[2].startswith("."):
        reason = "hidden"
    elif member.suffix(at_last_dot=True) in LIST_SUFFIXES:
        reason = "list of records in an archive, which is not read: unpack the archive"
    elif not {member.suffix(), member.suffix(at_last_dot=True)} & {*READ_SUFFIXES}:
        reason = f".{member.suffix()}" if member.suffix() else "without a suffix"
    return replace(member, reason=reason) if reason else member


def _read_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | Fault:
    if info.size > MAX_RECORD_SIZE:
        return Fault("too large", f"{info.name} has {info.size:,} bytes; at most {MAX_RECORD_SIZE:,}")
    return archive.extractfile(info).read()


def _are_picture_and_text(members: Sequence[Member]) -> bool:
    """Whether these are one picture and one text, each with another word before its suffix: input.jpg, outputs.txt."""
    if len(members) != 2:
        return False
    (first, _, end), (second, _, other_end) = (member.suffix().rpartition(".") for member in members)
    is_pair = any(a in IMAGE_SUFFIXES and b in TEXT_SUFFIXES for a, b in ((end, other_end), (other_end, end)))
    return is_pair and first != second and first.isalpha() and second.isalpha()


def _build_record(group: Group) -> dict | Fault:
    contents = group.contents
    fault = next((value for value in contents.values() if isinstance(value, Fault)), None)
    if fault:
        return fault
    fields = parse_object(contents["json"]) if "json" in contents else {}
    if isinstance(fields, Fault):
        return Fault(fields.kind, f"{group.names['json']}: {fields.message}")
    record: dict[str, Any] = {"image": None, "caption": None, **fields}  # a record without one of them is no other form
    for suffix, content in contents.items():
        if suffix in IMAGE_SUFFIXES:
            record["image"] = {"bytes": content, "path": group.names[suffix]}
        elif suffix in TEXT_SUFFIXES:
            record["caption"] = strip_caption(content)
    return record
