"""Helpers for reading sources in tests: fixtures, small files, and other file systems."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from transfusion.data.raw import Fault, RawDocument, RawText
from transfusion.data.reading.account import Account
from transfusion.data.reading.readers import Reader, ReaderOptions, open_reader

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))


def read(reader: Reader, max_rows: int = 1000) -> list[RawDocument | Fault]:
    return [document for unit in reader.units(max_rows) for document in reader.read(unit)]


def read_at(source: str | Path, max_rows: int = 1000, **options) -> list[RawDocument | Fault]:
    return read(open_reader(str(source), ReaderOptions(**options)), max_rows)


def close_account(reader: Reader, max_rows: int = 1000) -> Account:
    """The account of all records and files of a source. ValueError when it does not close."""
    account = Account()
    for unit in reader.units(max_rows):
        part = Account()
        list(reader.read(unit, part))
        account.add(Account.from_json(json.loads(json.dumps(part.to_json()))))  # as the shards of several processes keep it
    reader.close_account(account)
    account.check()
    return account


def texts(documents: list) -> list[str]:
    """The first text of each document, or the message of a fault."""
    return [str(item) if isinstance(item, Fault) else next(part.text for part in item.segments if isinstance(part, RawText))
            for item in documents]  # fmt: skip


def write_lines(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Other file systems


class Bucket(AbstractFileSystem):
    """A file system like cloud storage: paths without a leading slash, no real folders, files fetched in blocks."""

    protocol = "bucket"
    contents: dict[str, bytes] = {}

    def ls(self, path, detail=True, **_):
        path, entries = self._strip_protocol(path), {}
        folder = f"{path}/" if path else ""
        for name, content in self.contents.items():
            if name == path:
                entries[name] = {"name": name, "type": "file", "size": len(content)}
            elif name.startswith(folder):
                child = folder + name.removeprefix(folder).partition("/")[0]
                kind = {"type": "file", "size": len(content)} if child == name else {"type": "directory", "size": 0}
                entries[child] = {"name": child, **kind}
        if not entries:
            raise FileNotFoundError(path)
        return list(entries.values()) if detail else list(entries)

    def _open(self, path, mode="rb", **_):
        return Block(self, path, block_size=700)


class Block(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return Bucket.contents[self.path][start:end]


@contextmanager
def other_disks() -> Iterator[None]:
    """memory:// and bucket://, empty at the start; their contents are restored or removed at the end."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    memory = fsspec.filesystem("memory")
    saved = dict(memory.store)
    memory.store.clear()
    try:
        yield
    finally:
        memory.store.clear()
        memory.store.update(saved)
        Bucket.contents.clear()


def put(address: str, content: bytes | str) -> None:
    content = content.encode() if isinstance(content, str) else content
    if address.startswith("bucket://"):
        Bucket.contents[address.removeprefix("bucket://")] = content
    elif address.startswith("memory://"):
        fsspec.filesystem("memory").pipe(address, content)
    else:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        Path(address).write_bytes(content)
