"""Reading sources in tests: the fixtures, small files, and disks other than this one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from transfusion.data.raw import Fault, RawDocument, RawText
from transfusion.data.reading.readers import Reader, ReaderOptions, open_reader

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))


def read(reader: Reader, most: int = 1000) -> list[RawDocument | Fault]:
    return [one for unit in reader.units(most) for one in reader.read(unit)]


def read_at(source: str | Path, most: int = 1000, **options) -> list[RawDocument | Fault]:
    return read(open_reader(str(source), ReaderOptions(**options)), most)


def texts(found: list) -> list[str]:
    """The first text of each document. A fault among them is shown as what it says."""
    return [str(one) if isinstance(one, Fault) else next(part.text for part in one.segments if isinstance(part, RawText))
            for one in found]  # fmt: skip


def write_lines(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Other disks


class Bucket(AbstractFileSystem):
    """A disk as the clouds have it: no stroke before its paths, no folders, and files that are fetched in blocks."""

    protocol = "bucket"
    held: dict[str, bytes] = {}

    def ls(self, path, detail=True, **_):
        path, found = self._strip_protocol(path), {}
        folder = f"{path}/" if path else ""
        for name, content in self.held.items():
            if name == path:
                found[name] = {"name": name, "type": "file", "size": len(content)}
            elif name.startswith(folder):
                child = folder + name.removeprefix(folder).partition("/")[0]
                kind = {"type": "file", "size": len(content)} if child == name else {"type": "directory", "size": 0}
                found[child] = {"name": child, **kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path, mode="rb", **_):
        return Block(self, path, block_size=700)


class Block(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return Bucket.held[self.path][start:end]


@contextmanager
def other_disks() -> Iterator[None]:
    """memory:// and bucket://, empty before and after."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    memory = fsspec.filesystem("memory")
    kept = dict(memory.store)
    memory.store.clear()
    try:
        yield
    finally:
        memory.store.clear()
        memory.store.update(kept)
        Bucket.held.clear()


def put(address: str, content: bytes | str) -> None:
    content = content.encode() if isinstance(content, str) else content
    if address.startswith("bucket://"):
        Bucket.held[address.removeprefix("bucket://")] = content
    elif address.startswith("memory://"):
        fsspec.filesystem("memory").pipe(address, content)
    else:
        Path(address).parent.mkdir(parents=True, exist_ok=True)
        Path(address).write_bytes(content)
