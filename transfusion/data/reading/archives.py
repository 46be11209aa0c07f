"""Tar archives to records, by WebDataset's rule."""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from transfusion.codecs.pictures import IMAGE_SUFFIXES
from transfusion.data.raw import Fault
from transfusion.data.reading.account import Account
from transfusion.data.reading.container import BOM, MAX_RECORD_SIZE, Span, damage_fault, group
from transfusion.data.reading.files import Files
from transfusion.data.reading.json_files import parse_object


@dataclass(frozen=True)
class TarArchives:
    """WebDataset: a tar archive in which members with the same key (their name up to the first dot) are one record. Only
    images, .txt, .caption, .cls and .json are read; other members (for example pickles) are skipped. In a truncated archive
    the last record may lack members, so it is not read."""

    files: Files
    paths: Sequence[str]

    def spans(self, max_rows: int, account: Account) -> Iterator[Span]:
        for path in self.paths:
            groups = ((row, offset) for row, (offset, _, _) in enumerate(self._groups(path, 0, read=False)))
            yield from group(path, groups, max_rows)

    def records(self, span: Span) -> Iterator[tuple[str, Any]]:
        groups = self._groups(span.path, span.offset, read=True)
        for _, (_, key, record) in zip(range(span.rows), groups, strict=False):
            yield f"{self.files.relative_path(span.path)}:{key}".rstrip(":"), record

    def _groups(self, path: str, offset: int, read: bool) -> Iterator[tuple[int, str, Any]]:
        """(offset, key, record or Fault) in order; records are None unless `read`. Damage ends with a Fault."""
        key, contents = "", {}
        try:
            with self.files.open(path, offset) as file, _open_tar(file) as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # otherwise tarfile keeps all of them
                    if archive.offset <= member.offset:
                        raise tarfile.ReadError("a member has no size")
                    member_key, suffix = _key_and_suffix(member.name)
                    if not member.isreg() or not member_key or suffix not in _READ_SUFFIXES:
                        continue
                    if member_key != key:
                        if contents:
                            yield offset, key, _build_record(key, contents) if read else None
                        key, contents, offset = member_key, {}, member.offset
                    contents[suffix] = self._content(archive, member) if read else b""
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it has no end mark")
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
            yield offset, key, damage_fault(error)
            return
        if contents:
            yield offset, key, _build_record(key, contents) if read else None

    @staticmethod
    def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Fault:
        if member.size > MAX_RECORD_SIZE:
            return Fault("too large", f"{member.name} has {member.size:,} bytes; at most {MAX_RECORD_SIZE:,}")
        return archive.extractfile(member).read()


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    # the file is already decompressed
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace")


_TEXT_SUFFIXES = ("cls", "caption", "txt")  # the last that exists is the caption
_READ_SUFFIXES = (*IMAGE_SUFFIXES, *_TEXT_SUFFIXES, "json")


def _key_and_suffix(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of the file name."""
    folder, _, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}/{stem}" if folder and stem else stem, suffix.lower()


def _build_record(key: str, contents: dict[str, Any]) -> dict | Fault:
    fault = next((value for value in contents.values() if isinstance(value, Fault)), None)
    if fault:
        return fault
    fields = parse_object(contents["json"]) if "json" in contents else {}
    if isinstance(fields, Fault):
        return Fault(fields.kind, f"{key}.json: {fields.message}")
    record: dict[str, Any] = dict(fields)
    for suffix in (suffix for suffix in _READ_SUFFIXES if suffix in contents):
        if suffix in IMAGE_SUFFIXES:
            record["image"] = contents[suffix]
        elif suffix in _TEXT_SUFFIXES:
            record["caption"] = strip_caption(contents[suffix])
    return record


def strip_caption(content: bytes) -> bytes:
    """The content of a text file without byte order mark and surrounding white space."""
    return content.removeprefix(BOM).strip()
