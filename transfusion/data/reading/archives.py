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
from transfusion.data.reading.container import BOM, MAX_RECORD_SIZE, Span, damage_fault
from transfusion.data.reading.files import Files
from transfusion.data.reading.json_files import parse_object
from transfusion.data.reading.splits import split_of_path
from transfusion.data.reading.streams import BUFFER_SIZE

TEXT_SUFFIXES = ("txt", "caption", "cls")  # the first one that exists is the caption
READ_SUFFIXES = (*IMAGE_SUFFIXES, *TEXT_SUFFIXES, "json")
KEY_TWICE = "with a key that was read: members of one key must be neighbours"
REPEATED = "an earlier record has this key: members of one key must be neighbours"
BESIDE_ANOTHER = "beside another one of the same kind and key"
END = bytes(tarfile.BLOCKSIZE)  # the mark of an archive's end is two of these


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    name: str
    key: str
    offset: int
    reason: str = ""  # why it cannot be part of a record
    content: bytes | Fault | None = None


@dataclass
class Group:
    """Consecutive members with one key."""

    key: str
    offset: int  # of its first member
    contents: dict[str, Any] = field(default_factory=dict)  # suffix -> content; None if it is not read now
    names: dict[str, str] = field(default_factory=dict)  # suffix -> name of the member
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # name and reason of members that are not read
    fault: Fault | None = None  # of the archive, from here on

    def add(self, member: Member, suffix: str) -> None:
        """Add a member; of several pictures, texts or .json with this key one is read."""
        kind = next((kind for kind in (IMAGE_SUFFIXES, TEXT_SUFFIXES, ("json",)) if suffix in kind), ())
        rival = next((name for name in self.contents if name in kind), None)
        if not kind:
            self.passed_over.append((member.name, f".{suffix}"))
        elif rival is None or (kind == TEXT_SUFFIXES and kind.index(suffix) < kind.index(rival)):
            if rival is not None:
                self.passed_over.append((self.names.pop(rival), BESIDE_ANOTHER))
                del self.contents[rival]
            self.contents[suffix], self.names[suffix] = member.content, member.name
        else:
            self.passed_over.append((member.name, BESIDE_ANOTHER))


@dataclass(frozen=True)
class TarArchives:
    """WebDataset: a tar archive in which consecutive members with the same key (their name up to the first dot) are one
    record. Only images, .txt, .caption, .cls and .json are read; other members (for example pickles) are not.

    If that leaves nothing of a key to be read, its members have dots in their names (`22.05.jpg`, `22.05.txt`): then the key
    ends at the last dot. A key that returns later is a fault. Archives that are appended to an archive are read. In a
    truncated archive the last record may lack members, so it is not read. The records of a span have one split.
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
        members: list[Member] = []  # with one key
        others: list[tuple[str, str]] = []  # beside them: name and reason
        try:
            with self.files.open(path, offset) as file:
                for member, read_content in _members(file, offset):
                    if member.reason:
                        others.append((member.name, member.reason))
                        continue
                    if members and member.key != members[0].key:
                        yield from _group(members, others)
                        members, others = [], []
                    members.append(member)
                    if read:
                        members[-1] = replace(member, content=read_content())
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
            first = members[0] if members else Member("", "", offset)
            others += [(member.name, CUT_SHORT) for member in members]
            yield Group(first.key, first.offset, passed_over=others, fault=damage_fault(error))
        else:
            yield from _group(members, others)


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
            yield Member(f"{size:,} bytes", "", offset, "behind the end of the archive"), bytes
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
    folder, _, last = info.name.rpartition("/")
    stem, _, suffix = last.partition(".")
    reason = ""
    if not info.isreg():
        reason = "link or device"
    elif not stem:
        reason = "hidden"
    elif not _suffixes(info.name) & {*READ_SUFFIXES}:
        reason = f".{suffix.lower()}" if suffix else "without a suffix"
    return Member(info.name, f"{folder}/{stem}" if folder and stem else stem, info.offset, reason)


def _read_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | Fault:
    if info.size > MAX_RECORD_SIZE:
        return Fault("too large", f"{info.name} has {info.size:,} bytes; at most {MAX_RECORD_SIZE:,}")
    return archive.extractfile(info).read()


def _suffixes(name: str) -> set[str]:
    """What follows the first and the last dot of a file name, in lower case."""
    last = name.rpartition("/")[2].lower()
    return {last.partition(".")[2], last.rpartition(".")[2]}


def _group(members: Sequence[Member], others: Sequence[tuple[str, str]]) -> list[Group]:
    """The groups of consecutive members whose names have the same beginning up to the first dot: one, or if none of them can
    be read, one for each beginning up to the last dot."""
    groups: list[Group] = []
    has_dots = not any(_suffix(member.name) in READ_SUFFIXES for member in members)
    for member in members:
        key, suffix = member.key, _suffix(member.name)
        if has_dots:
            folder, _, last = member.name.rpartition("/")
            stem, _, suffix = last.rpartition(".")
            key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
        if not groups or groups[-1].key != key:
            groups.append(Group(key, member.offset))
        groups[-1].add(member, suffix)
    groups = groups or [Group("", 0)]
    groups[-1].passed_over += others
    return groups


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].lower().partition(".")[2]


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


def strip_caption(content: bytes) -> bytes:
    """The content of a text file without byte order mark and surrounding white space."""
    return content.removeprefix(BOM).strip()
